"""Which emoji are in the data set, and in which split each is.

``compositional`` has pairs of a concept and a style that are not in training, although both are: about 5 % of all, in
each concept one style at most, with all its skin tones. The others are ``train``; an eighth of them is also ``val``,
with captions that are not in training.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dalle2_jax.data.emoji.concepts import GROUPS, NATIONAL_FLAGS, Concept
from dalle2_jax.data.emoji.styles import STYLES, Drawing
from dalle2_jax.errors import UsageError, choose

SPLITS = ("train", "val", "compositional")

COMPOSITIONAL_RATE, VAL_RATE = 0.05, 1 / 8
"""Fraction of pairs whose hash selects them for ``compositional``, and of the others for ``val``."""


@dataclass(frozen=True)
class Selection:
    """Which emoji to include.

    Attributes:
        styles: names of `STYLES`.
        skin_tones: whether to include the variants of people and hands in five skin tones, which would be half of all.
        flags: whether to include the flags of countries and regions, which only small details distinguish.
        groups: names of `GROUPS`.

    Raises:
        UsageError: there are no styles or no groups, an unknown one, or one twice.
    """

    styles: tuple[str, ...] = tuple(STYLES)
    skin_tones: bool = False
    flags: bool = False
    groups: tuple[str, ...] = GROUPS

    def __post_init__(self) -> None:
        _check_names("style", self.styles, STYLES)
        _check_names("group", self.groups, dict.fromkeys(GROUPS))

    def includes(self, concept: Concept) -> bool:
        """Returns whether a concept is in the data set."""
        toned, flag = bool(concept.skin_tone), concept.subgroup in NATIONAL_FLAGS
        return concept.group in self.groups and (self.skin_tones or not toned) and (self.flags or not flag)


def _check_names(kind: str, names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    """Raises UsageError unless these are different ones of the known names."""
    for name in names:
        choose(kind, name, known)
    if not names or len({*names}) < len(names):
        raise UsageError(f"{kind}s must name at least one {kind} and none twice: {', '.join(known)}")


class Emoji(NamedTuple):
    """One image of the data set: what it shows, its style, and its drawing."""

    concept: Concept
    style: str
    drawing: Drawing


def split_emoji(concepts: Collection[Concept], drawings: Mapping[str, Mapping[str, Drawing]]) -> dict[str, list[Emoji]]:
    """Returns the emoji of each split, in an order that mixes the groups and keeps the styles of a concept together.

    Of several concepts with the same image in a style, as families have, that style has the one of the shortest name.

    Args:
        concepts: those that are included.
        drawings: style to key to drawing.
    """
    drawings = {style: _distinct(concepts, each) for style, each in drawings.items()}
    splits: dict[str, list[Emoji]] = {split: [] for split in SPLITS}
    for concept in sorted(concepts, key=lambda concept: fraction(concept.key)):
        for split, emoji in _placed(concept, drawings):
            splits[split].append(emoji)
    return splits


def _distinct(concepts: Collection[Concept], drawings: Mapping[str, Drawing]) -> dict[str, Drawing]:
    """Returns the drawings of the concepts by key, each image once."""
    found: dict[bytes, str] = {}
    for concept in sorted(concepts, key=lambda concept: (len(concept.name), concept.name)):
        if concept.key in drawings:
            found.setdefault(drawings[concept.key].content, concept.key)
    return {key: drawings[key] for key in found.values()}


def _placed(concept: Concept, drawings: Mapping[str, Mapping[str, Drawing]]) -> Iterator[tuple[str, Emoji]]:
    """Yields the emoji of a concept with their splits."""
    held_out = held_out_style(concept.base, [style for style in drawings if concept.base in drawings[style]])
    styles = [style for style in drawings if concept.key in drawings[style]]
    for style in styles:
        emoji = Emoji(concept, style, drawings[style][concept.key])
        if style != held_out:
            yield "train", emoji
            if fraction(f"val {concept.key} {style}") < VAL_RATE:
                yield "val", emoji
        elif len(styles) > 1:
            yield "compositional", emoji


def held_out_style(base: str, styles: Collection[str]) -> str | None:
    """Returns the style in which a concept is not in training, or None.

    Args:
        base: key of the concept, without its skin tone.
        styles: in which it exists.
    """
    if len(styles) < 2:
        return None
    lowest = min(styles, key=lambda style: fraction(f"{base} {style}"))
    return lowest if fraction(f"{base} {lowest}") < COMPOSITIONAL_RATE else None


def fraction(text: str) -> float:
    """Returns a hash of a text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
