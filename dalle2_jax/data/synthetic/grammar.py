"""The grammar of captions for `dalle2_jax.data.synthetic.shapes`: every caption of a scene.

A caption is picked by a tuple of choices (template, size words, relation word, which object comes
first, background or not), so that all paraphrases can be listed and one can be chosen by number.
Articles agree ("an orange star"). Every caption names size, colour and shape of each object; only the size and shape
where the colours of the scene have no names.

Held-out templates are for captions of split ``val``: none of them occurs in training, but all of their words do.
"""

import math

import numpy as np

from dalle2_jax.data.synthetic.scenes import Scene, SceneObject, relation_of

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_NEXT_TO_IT = {
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}

# {it}: noun with its article; {bare}: without; {tail}: empty, or the words for the background.
_ONE = (
    "{it}{tail}",
    "a picture of {it}{tail}",
    "there is {it}{tail}",
    "{colour} {shape}, {size}{tail}",
    "one {bare}{tail}",
    "this image shows {colour_it} that is {size}{tail}",
    "the {shape} is {colour} and {size}{tail}",
)
_ONE_HELD_OUT = (
    "this image shows {it}{tail}",
    "there is {colour_it} that is {size}{tail}",
    "one {colour} {shape}, {size}{tail}",
)
# {a} stands in {relation} to {b}; {b} is {next_to} {a}.
_TWO = (
    "{a} {relation} {b}{tail}",
    "a picture of {a} {relation} {b}{tail}",
    "there is {a} {relation} {b}{tail}",
    "{colour} {shape}, {size}, {relation} {b}{tail}",
    "{a} with {b} {next_to}{tail}",
    "{relation} {b} is {a}{tail}",
    "{a} and {b}, the first {relation} the second{tail}",
)
_TWO_HELD_OUT = (
    "there is {a} with {b} {next_to}{tail}",
    "a picture of {a} and {b}, the first {relation} the second{tail}",
    "{relation} {b} there is {a}{tail}",
)
_BACKGROUND = " on {article} {colour} background"


def captions(scene: Scene, held_out: bool = False) -> tuple[str, ...]:
    """Returns every paraphrase of a scene with one or two objects, in a fixed order, by the held-out templates or the
    others."""
    return tuple(_caption(scene, number, held_out) for number in range(_count(scene, held_out)))


def caption(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> str:
    """Samples one paraphrase; half of them name the background."""
    return _caption(scene, int(rng.integers(_count(scene, held_out))), held_out)


def mentions_background(text: str) -> bool:
    """Whether a caption of this grammar names the background."""
    return "background" in text


def _templates(scene: Scene, held_out: bool) -> tuple[str, ...]:
    if len(scene.objects) == 1:
        templates = _ONE_HELD_OUT if held_out else _ONE
    else:
        templates = _TWO_HELD_OUT if held_out else _TWO
    if all(thing.has_named_colour for thing in scene.objects):
        return templates
    return tuple(template for template in templates if "{colour}" not in template)


def _count(scene: Scene, held_out: bool) -> int:
    return math.prod(_radices(scene, held_out))


def _radices(scene: Scene, held_out: bool) -> tuple[int, ...]:
    """How many choices each part offers: background, size words, template, and for two also relation word, order."""
    templates = len(_templates(scene, held_out))
    return (2, 2, templates) if len(scene.objects) == 1 else (2, 2, templates, 2, 2, 2)


def _caption(scene: Scene, number: int, held_out: bool) -> str:
    choices = []
    for radix in _radices(scene, held_out):
        number, choice = divmod(number, radix)
        choices.append(choice)
    named, word, chosen, *more = choices
    template = _templates(scene, held_out)[chosen]
    tail = _BACKGROUND.format(article=_article(scene.background), colour=scene.background) if named else ""
    if len(scene.objects) == 1:
        return template.format(**_nouns(scene.objects[0], word), tail=tail)
    other_word, relation_word, swapped = more
    first, second = scene.objects[::-1] if swapped else scene.objects
    relation = relation_of(*scene.objects)
    relation = CONVERSE[relation] if swapped else relation
    nouns = _nouns(first, word)
    return template.format(
        **nouns,
        a=nouns["it"],
        b=_nouns(second, other_word)["it"],
        relation=RELATION_WORDS[relation][relation_word],
        next_to=_NEXT_TO_IT[CONVERSE[relation]][relation_word],
        tail=tail,
    )


def _nouns(thing: SceneObject, word: int) -> dict[str, str]:
    size = SIZE_WORDS[thing.size][word]
    coloured = f"{thing.colour} {thing.shape}" if thing.has_named_colour else thing.shape
    bare = f"{size} {coloured}"
    return {
        "size": size,
        "colour": thing.colour,
        "shape": thing.shape,
        "bare": bare,
        "it": f"{_article(bare)} {bare}",
        "colour_it": f"{_article(coloured)} {coloured}",
    }


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
