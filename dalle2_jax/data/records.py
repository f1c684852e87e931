"""What lies in a data set before a picture is decoded: the record, and the seam that every kind of storage has.

The text of a data set comes from the world: bytes that are not UTF-8, halves of surrogate pairs, JSON of any depth.
The functions here make strings of it that any tokenizer takes, and refuse what is no text at all.
"""

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dalle2_jax.data import images

MARK = "\ufffd"
"""Stands in a caption for what was not UTF-8."""

OTHER_NAMES = {"val": "validation", "validation": "val"}
"""What else a split may be called."""

MAX_BYTES = 2**28
"""No picture or text is read that takes more."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One captioned picture, not decoded.

    Attributes:
        key: its name in the data set, the same whenever it is read.
        image: a picture file's bytes, or ``uint8[H, W, 3]``, or None where there is none.
        captions: every caption; without any the record is of no use.
        fields: what else is known of it, by name: sizes, scores, a language.
    """

    key: str
    image: bytes | np.ndarray | None
    captions: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its key without a picture file's ending: the same in a folder, in a tar and in ArrayRecord."""
        return name_of(self.key)

    @property
    def fixed(self) -> int:
        """The number of the caption that evaluations use, always the same."""
        return zlib.crc32(self.name.encode()) % len(self.captions)


class Rejected(Exception):
    """A record that cannot be used; ``cause`` is a few words, the same for every record of that kind."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class LeftOut:
    """What was refused when a data set was opened: ``counts`` of records by cause, and the ``first`` of each."""

    def __init__(self, counts: Mapping[str, int] = {}, first: Mapping[str, str] = {}) -> None:
        self.counts, self.first = Counter(counts), dict(first)

    def add(self, cause: str, where: str, count: int = 1) -> None:
        """Counts records of a cause; ``where`` is a file, a line or a name by which a user finds the first."""
        if count:
            self.counts[cause] += count
            self.first.setdefault(cause, where)

    def include(self, other: "LeftOut") -> None:
        """Counts what another counted too."""
        for cause, count in other.counts.items():
            self.add(cause, other.first.get(cause, ""), count)

    def __str__(self) -> str:
        told = [(f"{count} {cause}", self.first.get(cause)) for cause, count in self.counts.most_common()]
        return ", ".join(f"{text} (first {where})" if where else text for text, where in told)


@runtime_checkable
class Records(Protocol):
    """Random access to records; picklable.

    It may have ``left_out``, a `LeftOut` of the records that were refused when it was opened.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Returns a record, 0 <= index < len. Raises `Rejected` for a bad one."""

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` records; reads no pictures."""


def name_of(key: str) -> str:
    """Returns a key without a picture file's ending."""
    stem, ending = os.path.splitext(key)
    return stem if ending.lower() in images.SUFFIXES else key


def spread(count: int, limit: int) -> list[int]:
    """Returns at most ``limit`` of so many indices, evenly from first to last."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(np.int64)).tolist()


def text_of(content: bytes) -> str:
    """Decodes UTF-8, with `MARK` for bytes that are not, and without a byte order mark."""
    return content.decode("utf-8-sig", "replace")


def clean(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON and tar can hold and no tokenizer takes, by `MARK`."""
    return _LONE_SURROGATE.sub(MARK, text)


def caption_lines(text: str) -> tuple[str, ...]:
    """Returns the captions of a text file, one a line; an empty file is the empty caption."""
    return tuple(clean(line.strip()) for line in text.splitlines() if line.strip()) or ("",)


def captions_in(value: object) -> tuple[str, ...]:
    """Returns the captions that a field holds: a string or a list of strings.

    Raises:
        TypeError: it is neither, or an empty list.
    """
    captions = tuple(value) if isinstance(value, list) else (value,)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("a caption is a string or a list of strings")
    return tuple(clean(caption) for caption in captions)


def json_object(content: bytes | str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python reads.
        TypeError: it is JSON, but no object.
    """
    try:
        value = json.loads(text_of(content) if isinstance(content, bytes) else content)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    return value
