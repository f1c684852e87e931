"""Concepts, their captions, and the splits."""

import random

import pytest
from emoji_packages import write_packages

from dalle2_jax.data.emoji.concepts import Concept, captions_of, normalised, read_concepts
from dalle2_jax.data.emoji.selection import Selection, held_out_style, split_emoji
from dalle2_jax.data.emoji.styles import STYLES, Drawing
from dalle2_jax.errors import UsageError


@pytest.fixture
def concepts(tmp_path, monkeypatch):
    return {concept.key: concept for concept in read_concepts(write_packages(tmp_path, monkeypatch))}


def test_concepts_are_emoji_by_themselves(concepts):
    assert [*concepts] == ["1f34e", "2764", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1f1e6-1f1f9", "1f6ba", "1f68a"]
    apple, dark = concepts["1f34e"], concepts["1f44b-1f3ff"]
    assert apple.tags == ("fruit", "health", "snack", "diet", "pie")
    assert (apple.group, apple.subgroup, apple.skin_tone, apple.base) == ("food-drink", "food-fruit", "", "1f34e")
    assert (dark.skin_tone, dark.base) == ("dark", "1f44b")
    assert concepts["1f6ba"].name == "women's room"


def test_keys_have_no_variation_selector():
    assert normalised("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_captions_name_the_concept_and_the_style(concepts):
    for concept in concepts.values():
        for reworded in (False, True):
            captions = captions_of(concept, "noto emoji", reworded)
            assert len(captions) >= 2
            assert all(concept.name in caption and "noto emoji" in caption for caption in captions)
        assert not {*captions_of(concept, "noto emoji")} & {*captions}
    assert captions_of(concepts["1f34e"], "noto emoji") == (
        *("a red apple, noto emoji", "red apple, noto emoji", "noto emoji of a red apple"),
        *("red apple, fruit, noto emoji", "red apple, snack, noto emoji"),
    )
    assert "noto emoji, red apple, health" in captions_of(concepts["1f34e"], "noto emoji", reworded=True)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("octopus plush", "an octopus plush"),
        ("banana", "a banana"),
        ("sunglasses", "sunglasses"),
        ("OK hand", "OK hand"),
        ("man: red hair", "man: red hair"),
        ("5 o'clock", "5 o'clock"),
    ],
)
def test_articles(name, first):
    concept = Concept("0", name, (), "objects", "tool", "", "0")
    assert captions_of(concept, "twemoji")[0] == f"{first}, twemoji"


def test_selection_excludes_tones_and_national_flags_by_default(concepts):
    chosen = {key for key, concept in concepts.items() if Selection().includes(concept)}
    assert chosen == {"1f34e", "2764", "1f44b", "1f6ba", "1f68a"}
    assert all(Selection(skin_tones=True, flags=True).includes(concept) for concept in concepts.values())


def test_selection_by_groups(concepts):
    chosen = {key for key, concept in concepts.items() if Selection(groups=("food-drink", "flags")).includes(concept)}
    assert chosen == {"1f34e"}


@pytest.mark.parametrize("names", [(), ("noto", "noto"), ("notto",), ("food-drink", "food-drink")])
def test_invalid_styles_and_groups_are_rejected(names):
    with pytest.raises(UsageError):
        Selection(styles=names)
    with pytest.raises(UsageError):
        Selection(groups=names)


# --- splits -------------------------------------------------------------------------------------


def many_concepts(count=1000):
    """Returns concepts, every tenth with a skin tone of the one before it."""
    found = []
    for number in range(count):
        base = number - 1 if number % 10 == 9 else number
        tone = "dark" if base != number else ""
        found.append(Concept(f"{number:x}", f"thing {number}", (), "objects", "tool", tone, f"{base:x}"))
    return found


def drawings_of(concepts, styles=STYLES):
    return {style: {one.key: Drawing("", f"{style} {one.key}".encode(), None) for one in concepts} for style in styles}


def pairs(emoji):
    return [(one.concept.key, one.style) for one in emoji]


def test_held_out_pairs_have_both_halves_in_training():
    concepts = many_concepts()
    splits = split_emoji(concepts, drawings_of(concepts))
    train, held_out = {*pairs(splits["train"])}, {*pairs(splits["compositional"])}
    assert len(train) + len(held_out) == 4000 and not train & held_out
    assert 0.03 < len(held_out) / 4000 < 0.07
    keys, styles = {key for key, _ in train}, {style for _, style in held_out}
    assert {key for key, _ in held_out} <= keys and styles == {*STYLES}
    assert len({key for key, _ in held_out}) == len(held_out)


def test_skin_tones_are_held_out_together():
    concepts = many_concepts()
    held_out = {*pairs(split_emoji(concepts, drawings_of(concepts))["compositional"])}
    toned = [concept for concept in concepts if concept.skin_tone]
    assert any((concept.key, style) in held_out for concept in toned for style in STYLES)
    for concept in toned:
        for style in STYLES:
            assert ((concept.key, style) in held_out) == ((concept.base, style) in held_out)


def test_val_is_an_eighth_of_train():
    concepts = many_concepts()
    splits = split_emoji(concepts, drawings_of(concepts))
    train, val = {*pairs(splits["train"])}, {*pairs(splits["val"])}
    assert val <= train and 0.1 < len(val) / len(train) < 0.15


def test_splits_do_not_depend_on_the_order():
    concepts = many_concepts(100)
    drawings = drawings_of(concepts)
    expected = split_emoji(concepts, drawings)
    assert split_emoji(random.Random(0).sample(concepts, 100), drawings) == expected


def test_one_style_has_no_pairs_to_hold_out():
    concepts = many_concepts(200)
    splits = split_emoji(concepts, drawings_of(concepts, ["noto"]))
    assert len(splits["train"]) == 200 and not splits["compositional"]
    assert held_out_style("1f34e", ["noto"]) is None


def test_an_image_is_used_once_in_a_style():
    first, second = many_concepts(2)
    drawings = drawings_of([first, second], ["noto", "twemoji"])
    drawings["noto"]["1"] = drawings["noto"]["0"]
    longer = second._replace(name="thing 1 of another kind")
    splits = split_emoji([longer, first], drawings)
    assert {*pairs(splits["train"] + splits["compositional"])} == {("0", "noto"), ("0", "twemoji"), ("1", "twemoji")}
