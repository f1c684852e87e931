"""What emoji show, and the captions made from it: names and tags of emojibase (CLDR's, in English)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dalle2_jax.data.emoji.packages import PACKAGES, PackageFiles, open_package

SKIN_TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
"""Names of emojibase's numbers of skin tones."""

GROUPS = (
    *("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places"),
    *("activities", "objects", "symbols", "flags"),
)
"""Unicode's groups of emoji."""

NATIONAL_FLAGS = ("country-flag", "subdivision-flag")
"""Subgroups of flags that only their details distinguish."""

_DATA, _GROUPS = "en/data.json", "meta/groups.json"
_COMPONENT = "component"
"""The group of hair styles and skin tones, which are parts of other emoji."""

_MAX_TAGS = 2
"""Tags in captions of each kind of split."""

_TRAIN = ("{article}{name}, {style}", "{name}, {style}", "{style} of {article}{name}")
_TRAIN_TAG = "{name}, {tag}, {style}"
_VAL = ("a {style} of {name}", "{style}, {article}{name}")
_VAL_TAG = "{style}, {name}, {tag}"


class Concept(NamedTuple):
    """What an emoji shows.

    Attributes:
        key: its code points, see `normalised`.
        name: such as "red apple" or "waving hand: light skin tone".
        tags: other words for it, without those of the name.
        group: such as "food-drink".
        subgroup: such as "food-fruit".
        skin_tone: such as "light" or "light and dark"; "" without one.
        base: key of the concept without its skin tone.
    """

    key: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    skin_tone: str
    base: str


def normalised(code_points: str) -> str:
    """Returns the key of an emoji: lower-case hexadecimal code points, without the variation selector fe0f."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def read_concepts(folder: Path | None) -> tuple[Concept, ...]:
    """Returns every concept of emojibase that is an emoji by itself, in Unicode's order.

    Args:
        folder: of the package's file; None fetches it.
    """
    return tuple(_concepts(open_package(PACKAGES["captions"], folder, lambda path: path in (_DATA, _GROUPS))))


def _concepts(files: PackageFiles) -> Iterator[Concept]:
    names = files.json(_GROUPS)
    for entry in files.json(_DATA):
        if "group" not in entry:  # a regional indicator, half of a flag
            continue
        group, subgroup = names["groups"][str(entry["group"])], names["subgroups"][str(entry["subgroup"])]
        if group == _COMPONENT:
            continue
        key = normalised(entry["hexcode"])
        name = _plain(entry["label"])
        known = set(name.lower().replace("-", " ").split())
        tags = tuple(tag for tag in map(_plain, entry.get("tags", ())) if tag.isalpha() and tag not in known)
        yield Concept(key, name, tags, group, subgroup, "", key)
        for skin in entry.get("skins", ()):
            skin_key, skin_name = normalised(skin["hexcode"]), _plain(skin["label"])
            yield Concept(skin_key, skin_name, tags, group, subgroup, _skin_tone(skin["tone"]), key)


def _plain(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')


def _skin_tone(tone: Any) -> str:
    return " and ".join(SKIN_TONES[number] for number in (tone if isinstance(tone, list) else [tone]))


def captions_of(concept: Concept, style: str, reworded: bool = False) -> tuple[str, ...]:
    """Returns the captions of an emoji.

    Args:
        concept: what it shows.
        style: how its style is called, such as "noto emoji".
        reworded: whether to return captions that are not in training: of other templates and with other tags.
    """
    templates, tagged, first = (_VAL, _VAL_TAG, 1) if reworded else (_TRAIN, _TRAIN_TAG, 0)
    words = {"name": concept.name, "article": _article(concept.name), "style": style}
    plain = [template.format(**words) for template in templates]
    tags = concept.tags[first : 2 * _MAX_TAGS : 2]
    return tuple(dict.fromkeys(plain + [tagged.format(**words, tag=tag) for tag in tags]))


def _article(name: str) -> str:
    """Returns the indefinite article of a name with a space; nothing for plurals, proper names and phrases."""
    word = name.split()[0]
    if ":" in name or not word.islower() or name.endswith("s"):
        return ""
    return "an " if word[0] in "aeiou" else "a "
