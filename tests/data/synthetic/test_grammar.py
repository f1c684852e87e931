import re
from dataclasses import replace

import numpy as np
import pytest

from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.scenes import Scene, SceneObject
from dalle2_jax.data.synthetic.shapes import COLOURS, SHAPES, ShapesSource

STAR = SceneObject("star", "orange", "large", 0.25, 0.5)
CROSS = SceneObject("cross", "blue", "small", 0.75, 0.5)


def _read_caption(text):
    """Parses a two-object caption independently: returns which object is left, right, above or below of which."""
    mentions = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)
    words = {"left": "left", "right": "right", "above": "above", "over": "above", "below": "below", "under": "below"}
    (word,) = re.findall(rf"\b({'|'.join(words)})\b", text)
    relation, converse = words[word], grammar.CONVERSE[words[word]]
    of_first = relation
    if re.search(r"\bits\b|\bit\b", text):  # "A with B to its right": B is the one placed
        of_first = converse
    elif re.match(rf"(to the )?({'|'.join(words)})\b", text):  # "left of B is A": B comes first
        of_first = converse
    return mentions, of_first


@pytest.mark.parametrize(("held_out", "least"), [(False, 2 * 2 * 7), (True, 2 * 2 * 3)])
def test_every_caption_of_one_object_names_all_its_attributes(held_out, least):
    captions = grammar.captions(Scene((STAR,), "gray"), held_out)
    assert len(set(captions)) == len(captions) == least
    for text in captions:
        assert "orange" in text and "star" in text and ("large" in text or "big" in text)
        assert "a orange" not in text and "an large" not in text
    named = [grammar.mentions_background(text) for text in captions]
    assert sum(named) * 2 == len(named)
    assert all(("gray" in text) == name for text, name in zip(captions, named, strict=True))


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_leave_out_colours_without_a_name(held_out):
    star, cross = (replace(thing, colour="#a1b2c3") for thing in (STAR, CROSS))
    for scene, words in ((Scene((star,), "gray"), ["star"]), (Scene((star, cross), "gray"), ["star", "cross"])):
        captions = grammar.captions(scene, held_out)
        assert len(set(captions)) == len(captions)
        for text in captions:
            assert "#" not in text and "  " not in text and all(word in text for word in words)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("shift", [(0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5)])
def test_every_caption_of_two_objects_is_true(shift, held_out):
    other = SceneObject("cross", "blue", "small", STAR.x + shift[0], STAR.y + shift[1])
    scene = Scene((STAR, other), "white")
    captions = grammar.captions(scene, held_out)
    assert len(set(captions)) == len(captions)
    for text in captions:
        mentions, of_first = _read_caption(text)
        assert sorted(mentions) == [("blue", "cross"), ("orange", "star")]
        expected = scene.relation if mentions[0] == ("orange", "star") else grammar.CONVERSE[scene.relation]
        assert of_first == expected, text
        assert re.search(r"(large|big) orange star|orange star, (large|big)", text), text
        assert re.search(r"(small|little) blue cross|blue cross, (small|little)", text), text


def test_sampled_captions_cover_exactly_all_captions():
    scene = Scene((STAR, CROSS), "black")
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        sampled = {grammar.caption(scene, rng, held_out) for _ in range(4000)}
        assert sampled == set(grammar.captions(scene, held_out))


def test_half_of_the_fixed_captions_name_the_background():
    source = ShapesSource("val", 8)
    named = [grammar.mentions_background(text) for text in source.captions(600)]
    assert 0.42 < np.mean(named) < 0.58
