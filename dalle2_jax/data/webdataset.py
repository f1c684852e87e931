"""Tar shards as img2dataset writes them: KEY.jpg (or .png, .webp), KEY.txt with a caption a line, KEY.json with fields.

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

from dalle2_jax.data.arrays import beside, kept
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.folder import division
from dalle2_jax.data.records import (
    MAX_BYTES,
    LeftOut,
    Record,
    Rejected,
    caption_lines,
    captions_in,
    clean,
    json_object,
    spread,
    text_of,
)
from dalle2_jax.data.shard_index import IMAGE, JSON, TEXT, map_index, open_index, packed, unpacked
from dalle2_jax.data.storage import ChangedError, Files, literal_part
from dalle2_jax.types import UserError

_AT_ONCE = 500
_BROKEN = "broken JSON"


class WebdatasetRecords:
    """The records of tar shards, in the order of the shards and in them; a `Records`.

    Args:
        path: ``data/{000000..000999}.tar``, a glob, a folder of shards, or such below a URL. ``{split}`` in it stands
            for the split; a folder may have sub-folders for splits. All else is ``train``. A file or folder that is
            named like a pattern is none.
        split: ``train``, ``val`` and so on.
        filters: records not wanted by their JSON are left out; it is read once and the choice kept.

    Raises:
        UserError: when there are no shards, not one record in them, or no such split.
    """

    def __init__(self, path: str, split: str = "train", filters: Filters = Filters()) -> None:
        self.path, self.split = os.path.expanduser(path), split
        self._files = Files(_place(self.path, split), ".tar")
        self._index, self._home = open_index(self._files)
        self.left_out = self._index.left_out
        self._lost: set[int] = set()
        if not len(self._index.rows):
            causes = str(self.left_out) or "they are empty"
            raise UserError(f"there is not one record in the shards {self.path} ({causes})")
        self._chosen = None
        if filters != Filters():
            self._chosen, unread = self._choice(filters)
            self.left_out.include(unread)
            if not len(self._chosen):
                raise UserError(f"the filters leave not one of the {len(self._index.rows)} records: {filters}")

    def __len__(self) -> int:
        return len(self._index.rows if self._chosen is None else self._chosen)

    def __repr__(self) -> str:
        return f"WebdatasetRecords({self.path!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self._home is not None:
            state["_index"] = None  # mapped again where it is needed
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index is None:
            self._index = map_index(self._home)

    def read(self, index: int) -> Record:
        """Returns a record. Raises Rejected, with a note that names the record, when it or its shard is broken."""
        row = self._row(index)
        try:
            image, text, fields = self._members(row, (IMAGE, TEXT, JSON))
            fields = _fields(fields)
            return Record(clean(self._index.key(row)), image, _captions(text, fields), fields)
        except Rejected as rejection:
            rejection.add_note(self._where(row))
            raise

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of ``limit`` records spread evenly over the shards; bad ones are passed over."""
        for index in spread(len(self), limit):
            try:
                text, fields = self._members(self._row(index), (TEXT, JSON))
                yield from _captions(text, _fields(fields))
            except Rejected:
                continue

    def _row(self, index: int) -> int:
        return int(index if self._chosen is None else self._chosen[index])

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._index.starts, row, "right")) - 1

    def _where(self, row: int) -> str:
        return f"{self._files.paths[self._shard(row)]}: {clean(self._index.key(row))}"

    def _members(self, row: int, columns: Sequence[int]) -> list[bytes | None]:
        """Returns members of a record, None for those that it lacks."""
        shard = self._shard(row)
        places = self._index.rows[row].tolist()
        spans = [(places[column], places[column + 1]) for column in columns if places[column] >= 0]
        if any(size > MAX_BYTES for _, size in spans):
            raise Rejected("far too large")
        contents = iter(self._read(shard, spans))
        return [next(contents) if places[column] >= 0 else None for column in columns]

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

    def _choice(self, filters: Filters) -> tuple[Int64[np.ndarray, "M"], LeftOut]:
        """Returns the wanted rows, and those whose JSON could not be read.

        They come from a file beside the index, if there is one.
        """

        def make() -> tuple[tuple[np.ndarray, np.ndarray], bool]:
            chosen, unread = self._choose(filters)
            return (chosen, packed(unread)), unread.counts.keys() <= {_BROKEN}  # all else may be there the next time

        homes = beside(self._home, filters, self._files.stamps)
        (chosen, unread), _ = kept(homes, 2, lambda _: True, make)
        return chosen, unpacked(unread)

    def _choose(self, filters: Filters) -> tuple[Int64[np.ndarray, "M"], LeftOut]:
        chosen, unread = [], LeftOut()
        starts = self._index.starts.tolist()
        for shard in tqdm(range(len(starts) - 1), "filtering by fields", leave=False, disable=len(starts) < 20):
            for first in range(starts[shard], starts[shard + 1], _AT_ONCE):
                places = self._index.rows[first : min(first + _AT_ONCE, starts[shard + 1]), JSON : JSON + 2]
                for row, told in enumerate(self._told(shard, places), first):
                    if isinstance(told, Rejected):
                        unread.add(told.cause, self._where(row))
                    elif filters.want_fields(told):
                        chosen.append(row)
        return np.array(chosen, np.int64), unread

    def _told(self, shard: int, places: Int64[np.ndarray, "n 2"]) -> list[dict[str, Any] | Rejected]:
        """Returns the fields of neighbouring records, or why they cannot be read."""
        spans = [(offset, size) for offset, size in places.tolist() if 0 <= offset and size <= MAX_BYTES]
        try:
            contents = iter(self._read(shard, spans))
        except Rejected as rejection:
            return [rejection] * len(places)
        told = []
        for offset, size in places.tolist():
            try:
                told.append(_fields(next(contents)) if 0 <= offset and size <= MAX_BYTES else {})
            except Rejected as rejection:
                told.append(rejection)
        return told


def _place(path: str, split: str) -> str:
    """The path of a split's shards."""
    if not path:
        raise UserError("a webdataset has no path: set config.data.path, such as 'data/{000000..000999}.tar'")
    base = literal_part(path)
    if "{split}" in path[len(base) :]:
        return base + path[len(base) :].replace("{split}", split)
    if "://" not in path and Path(path).is_dir():
        return str(division(Path(path), split))
    if split != "train":
        raise UserError(f"{path} has no split {split!r}: write {{split}} where the path says train or {split}")
    return path


def _fields(content: bytes | None) -> dict[str, Any]:
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
