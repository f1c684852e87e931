"""Tar shards as img2dataset writes them: KEY.jpg (or .png, .webp), KEY.txt with captions (lines), KEY.json with fields.

Records are read at random, so that a stream shuffles all of them and resumes at any: see `shard_index`. Nothing is
ever unpacked. A caption is taken from ``caption`` of the JSON where there is no text.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from dalle2_jax.data.formats.folder import division
from dalle2_jax.data.formats.shard_index import (
    IMAGE,
    JSON,
    TEXT,
    is_rejection_counts,
    map_index,
    open_index,
    packed,
    unpacked,
)
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.data.images.records import (
    MAX_BYTES,
    MAX_TEXT,
    Record,
    Rejected,
    RejectionCounts,
    caption_lines,
    captions_in,
    clean,
    json_object,
    spread,
    text_of,
)
from dalle2_jax.data.storage.arrays import BYTES, NUMBERS, cache_path, load_or_build
from dalle2_jax.data.storage.files import ChangedError, Files, literal_part
from dalle2_jax.errors import DataError

_AT_ONCE = 500
_BROKEN = "broken JSON"


class WebdatasetRecords:
    """The records of tar shards, in the order of the shards and in them; a `Records`.

    Args:
        path: ``data/{000000..000999}.tar``, a glob, a folder of shards, or such below a URL. ``{split}`` in it stands
            for the split; a folder may have sub-folders for splits. All else is ``train``. A file or folder that is
            named like a pattern is none.
        split: ``train``, ``val`` and so on.
        filters: records that they exclude by their JSON are skipped; the selection is cached.

    Raises:
        UserError: there are no shards, no records in them, or no such split.
    """

    def __init__(self, path: str | Path, split: str = "train", filters: Filters = Filters()) -> None:
        self.path, self.split = os.path.expanduser(os.fspath(path)), split
        self._files = Files(_pattern(self.path, split), ".tar")
        self._index, self._cached = open_index(self._files)
        self.rejections = self._index.rejections
        self._lost: set[int] = set()
        if not len(self._index.rows):
            causes = str(self.rejections) or "they are empty"
            raise DataError(f"there are no records in the shards {self.path} ({causes})", self.path)
        self._chosen = None
        if filters != Filters():
            self._chosen, unread = self._choice(filters)
            self.rejections.include(unread)
            if not len(self._chosen):
                raise DataError(f"the filters exclude all {len(self._index.rows)} records: {filters}", self.path)

    def __len__(self) -> int:
        return len(self._index.rows if self._chosen is None else self._chosen)

    def __repr__(self) -> str:
        return f"WebdatasetRecords({self.path!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self._cached is not None:
            state["_index"] = None  # mapped again where it is needed
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index is None and self._cached is not None:
            self._index = map_index(self._cached)

    def read(self, index: int) -> Record:
        """Returns a record. Raises Rejected, with a note that names the record, if it or its shard is damaged."""
        row = self._row(index)
        try:
            image, text, fields = self._members(row, (IMAGE, TEXT, JSON))
            fields = _parsed_fields(fields)
            return Record(clean(self._index.key(row)), image, _captions(text, fields), fields)
        except Rejected as rejection:
            raise Rejected(rejection.cause, self._where(row)) from None

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` records, evenly spread over the shards; skips bad ones."""
        for index in spread(len(self), limit):
            try:
                text, fields = self._members(self._row(index), (TEXT, JSON))
                yield from _captions(text, _parsed_fields(fields))
            except Rejected:
                continue

    def _row(self, index: int) -> int:
        row = int(index if self._chosen is None else self._chosen[index])
        if not 0 <= row < len(self._index.rows):  # the selection is stored next to the shards, so it is untrusted
            raise Rejected("cut short")
        return row

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._index.starts, row, "right")) - 1

    def _where(self, row: int) -> str:
        return f"{self._files.paths[self._shard(row)]}: {clean(self._index.key(row))}"

    def _members(self, row: int, columns: Sequence[int]) -> list[bytes | None]:
        """Returns the members of a record, None for missing ones."""
        shard = self._shard(row)
        places = self._index.rows[row].tolist()
        there = [column for column in columns if places[column] >= 0]
        spans = [(places[column], places[column + 1]) for column in there]
        limits = [MAX_BYTES if column == IMAGE else MAX_TEXT for column in there]
        if any(size > limit for (_, size), limit in zip(spans, limits, strict=True)):
            raise Rejected("far too large")
        if not all(self._holds(shard, *span) for span in spans):
            raise Rejected("cut short")
        contents = iter(self._read(shard, spans))
        return [next(contents) if places[column] >= 0 else None for column in columns]

    def _holds(self, shard: int, offset: int, size: int) -> bool:
        """Returns whether a span is within a shard: the index is stored next to the shards, so it is untrusted."""
        return 0 <= offset <= offset + size <= int(self._files.stamps[shard, 0])

    def _read(self, shard: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        if shard in self._lost:
            raise Rejected("shard lost")
        try:
            contents = self._files.read(shard, spans)
        except (OSError, ChangedError):
            self._lost.add(shard)
            raise Rejected("shard lost") from None
        if any(len(content) < size for content, (_, size) in zip(contents, spans, strict=True)):
            raise Rejected("cut short")
        return contents

    def _choice(self, filters: Filters) -> tuple[Int64[np.ndarray, "M"], RejectionCounts]:
        """Returns the rows that the filters accept, and those whose JSON could not be read; cached like the index."""

        def make() -> tuple[tuple[np.ndarray, np.ndarray], bool]:
            chosen, unread = self._choose(filters)
            return (chosen, packed(unread)), unread.counts.keys() <= {_BROKEN}  # all else may be there the next time

        paths = cache_path(self._cached, filters, self._files.stamps)
        (chosen, unread), _ = load_or_build(paths, (NUMBERS, BYTES), lambda found: is_rejection_counts(found[1]), make)
        return chosen, unpacked(unread)

    def _choose(self, filters: Filters) -> tuple[Int64[np.ndarray, "M"], RejectionCounts]:
        chosen, unread = [], RejectionCounts()
        starts = self._index.starts.tolist()
        for shard in tqdm(range(len(starts) - 1), "filtering by fields", leave=False, disable=len(starts) < 20):
            for first in range(starts[shard], starts[shard + 1], _AT_ONCE):
                places = self._index.rows[first : min(first + _AT_ONCE, starts[shard + 1]), JSON : JSON + 2]
                for row, fields in enumerate(self._fields(shard, places), first):
                    if isinstance(fields, Rejected):
                        unread.add(fields.cause, self._where(row))
                    elif filters.accept_fields(fields):
                        chosen.append(row)
        return np.array(chosen, np.int64), unread

    def _fields(self, shard: int, places: Int64[np.ndarray, "n 2"]) -> list[dict[str, Any] | Rejected]:
        """Returns the fields of consecutive records, or the reason why they cannot be read."""
        spans = [(offset, size) for offset, size in places.tolist() if self._is_read(shard, offset, size)]
        try:
            contents = iter(self._read(shard, spans))
        except Rejected as rejection:
            return [rejection] * len(places)
        fields = []
        for offset, size in places.tolist():
            try:
                fields.append(_parsed_fields(next(contents)) if self._is_read(shard, offset, size) else {})
            except Rejected as rejection:
                fields.append(rejection)
        return fields

    def _is_read(self, shard: int, offset: int, size: int) -> bool:
        return offset >= 0 and size <= MAX_TEXT and self._holds(shard, offset, size)


def _pattern(path: str, split: str) -> str:
    """Returns the path of the shards of a split."""
    if not path:
        raise DataError("a webdataset has no path: set config.data.path, such as 'data/{000000..000999}.tar'")
    base = literal_part(path)
    if "{split}" in path[len(base) :]:
        return base + path[len(base) :].replace("{split}", split)
    if "://" not in path and Path(path).is_dir():
        return str(division(Path(path), split))
    if split != "train":
        raise DataError(f"{path} has no split {split!r}: replace the name of the split in the path by {{split}}")
    return path


def _parsed_fields(content: bytes | None) -> dict[str, Any]:
    try:
        return {} if content is None else json_object(content)
    except (ValueError, TypeError):
        raise Rejected(_BROKEN) from None


def _captions(text: bytes | None, fields: dict[str, Any]) -> tuple[str, ...]:
    if text is not None:
        return caption_lines(text_of(text))
    try:
        return captions_in(fields.get("caption"))
    except TypeError:
        raise Rejected("no caption") from None
