"""Records: encoded images with captions, and the `Records` protocol that every storage format implements.

The text of a data set is untrusted: bytes that are not UTF-8, halves of surrogate pairs, JSON of any depth. The
functions here turn it into strings that every tokenizer accepts, and reject what is not text.
"""

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dalle2_jax.data.images import decoding
from dalle2_jax.errors import printable
from dalle2_jax.reading import parse_json

REPLACEMENT = "\ufffd"
"""Replaces bytes of a caption that are not UTF-8."""

OTHER_NAMES = {"val": "validation", "validation": "val"}
"""The other name that a split may have."""

MAX_BYTES, MAX_TEXT = 2**28, 2**24
"""Limits on the bytes of an image file, and of a text, a JSON file or a line of metadata."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One captioned image, not decoded.

    Attributes:
        key: its name in the data set, the same whenever it is read.
        image: the bytes of an image file, or uint8[H, W, 3], or None if it is missing.
        captions: every caption; a record without captions is rejected.
        fields: other values by name: sizes, scores, a language.
    """

    key: str
    image: bytes | np.ndarray | None
    captions: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its key without the suffix of an image file: the same in a folder, in a tar and in ArrayRecord."""
        return name_of(self.key)

    @property
    def fixed(self) -> int:
        """The number of the caption that evaluations use."""
        return zlib.crc32(self.name.encode()) % len(self.captions)


class Rejected(Exception):
    """A record cannot be used.

    Attributes:
        cause: a few words, the same for every record with the same fault.
        notes: where the record is stored, if it could not be read at all.
    """

    def __init__(self, cause: str, *notes: str) -> None:
        super().__init__(cause)
        self.cause, self.notes = cause, notes


class RejectionCounts:
    """Records that were rejected: their number by cause (``counts``), and the ``first`` of each cause."""

    def __init__(self, counts: Mapping[str, int] = {}, first: Mapping[str, str] = {}) -> None:
        self.counts, self.first = Counter(counts), dict(first)

    def add(self, cause: str, where: str, count: int = 1) -> None:
        """Adds records of one cause; ``where`` is a file, a line or a name by which a user finds the first."""
        if count:
            self.counts[cause] += count
            self.first.setdefault(cause, where)

    def include(self, other: "RejectionCounts") -> None:
        """Adds the records that ``other`` counted."""
        for cause, count in other.counts.items():
            self.add(cause, other.first.get(cause, ""), count)

    def __str__(self) -> str:
        causes = [(f"{count} {cause}", self.first.get(cause)) for cause, count in self.counts.most_common()]
        return ", ".join(f"{text} (first {printable(where)})" if where else text for text, where in causes)


@runtime_checkable
class Records(Protocol):
    """Random access to records; picklable.

    Attributes:
        rejections: the records that were rejected when the data set was opened.
    """

    rejections: RejectionCounts

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Returns a record, 0 <= index < len. Raises `Rejected` if it is bad."""
        ...

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` records; reads no images."""
        ...


def name_of(key: str) -> str:
    """Returns a key without the suffix of an image file."""
    stem, ending = os.path.splitext(key)
    return stem if ending.lower() in decoding.SUFFIXES else key


def spread(count: int, limit: int) -> list[int]:
    """Returns at most ``limit`` of ``count`` indices, evenly spaced from first to last."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(np.int64)).tolist()


def text_of(content: bytes) -> str:
    """Decodes UTF-8, with `REPLACEMENT` for invalid bytes, and without a byte order mark."""
    return content.decode("utf-8-sig", "replace")


def clean(text: str) -> str:
    """Replaces halves of surrogate pairs by `REPLACEMENT`: JSON and tar can hold them, no tokenizer accepts them."""
    return _LONE_SURROGATE.sub(REPLACEMENT, text)


def caption_lines(text: str) -> tuple[str, ...]:
    """Returns the captions of a text file, one a line; an empty file is the empty caption."""
    return tuple(clean(line.strip()) for line in text.splitlines() if line.strip()) or ("",)


def captions_in(value: object) -> tuple[str, ...]:
    """Returns the captions that a field holds: a string or a list of strings.

    Raises:
        TypeError: it is neither, or an empty list.
    """
    captions = value if isinstance(value, list) else [value]
    texts = [caption for caption in captions if isinstance(caption, str)]
    if not texts or len(texts) < len(captions):
        raise TypeError("a caption is a string or a list of strings")
    return tuple(map(clean, texts))


def json_object(content: bytes | str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python reads.
        TypeError: it is JSON, but no object.
    """
    try:
        value = parse_json(text_of(content) if isinstance(content, bytes) else content)
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    return value
