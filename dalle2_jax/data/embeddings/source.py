"""Stored embeddings as a `Source`: `dalle2_jax.data.embeddings.layout` describes the files."""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from dalle2_jax.data.embeddings.layout import (
    CAPTION_DIGESTS,
    CAPTIONS,
    EMPTY,
    INDEX,
    NAMES,
    NULLS,
    STATES,
    THUMBNAILS,
    check_sizes,
    damaged,
    open_shard,
    read_contract,
    read_index,
    read_nulls,
    read_split,
    shard_folder,
    split_folder,
)
from dalle2_jax.data.sources import (
    DESCRIPTIVE,
    Generators,
    Indices,
    Source,
    StoredEmbeddings,
    checked_columns,
    checked_indices,
    objects,
)
from dalle2_jax.errors import DataError
from dalle2_jax.reading import parse_json, read_text
from dalle2_jax.types import complete_contract

_MAX_OPEN = 4096  # shards mapped at a time, well below the number of maps that a process may have


class EmbeddingSource(Source):
    """Random access to the embeddings of a split; picklable.

    Args:
        path: the folder that ``dalle2 data embed`` wrote.
        split: one that was embedded.

    Raises:
        DataError: the folder, the split or a shard is missing, unfinished or damaged.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        self._folder = split_folder(path, split)
        self.contract = read_contract(self.path)
        about, index = read_split(self._folder), read_index(self._folder)
        if about is None or index is None:
            complete = len([*self._folder.glob("[0-9]*")])
            raise DataError(
                f"{self._folder} is unfinished ({complete} shards are complete): run the command that wrote them again",
                self._folder,
            )
        if not isinstance(about["contract"], dict) or complete_contract(about["contract"]) != self.contract:
            raise DataError(
                f"{self._folder} was embedded by {about['contract']}, but {self.path}/clip is {self.contract}: "
                "restore that clip, or embed into a new folder",
                self._folder,
            )
        self.context_length: int = about["context_length"]
        stored = ("image_emb", "text_emb", "tokens", "mask", *((STATES,) if about[STATES] else ()))
        nulls = NULLS if (self.path / EMPTY).is_file() else ()
        self.columns = (*stored, *nulls, *DESCRIPTIVE)
        check_sizes(self._folder, index["shards"])
        self._starts = np.cumsum([0, *(shard["pictures"] for shard in index["shards"])])
        self.identity = _identity(self._folder)
        self._nulls: dict[str, np.ndarray] | None = None
        self._opened: dict[int, dict[str, np.ndarray]] = {}
        self._checksums: dict[int, dict[str, np.ndarray]] = {}
        self._lines: tuple[int, list[str]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"EmbeddingSource({str(self.path)!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        closed = {"_opened": {}, "_checksums": {}, "_lines": (-1, [])}  # maps are opened again after unpickling
        return {**self.__dict__, **closed}

    def select(self, inputs: Sequence[str]) -> "EmbeddingSource":
        """Returns a source of these columns, which maps no other arrays.

        Raises:
            MissingColumnsError: the folder does not have one of them.
            DataError: the embedding of the empty caption cannot be read.
        """
        hint = "run dalle2 data embed again, which writes empty.npz" if {*NULLS} & {*inputs} else ""
        if STATES in inputs and STATES not in self.columns:
            hint = f"embed into a new folder with --{STATES}"
        selected = copy.copy(self)
        selected.columns = checked_columns(self, inputs, hint)
        selected._nulls = selected._null_rows()
        return selected

    @property
    def stored_embeddings(self) -> StoredEmbeddings:
        """The folder of the embeddings."""
        return StoredEmbeddings(self.path, self.contract, self.context_length)

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch, with the caption that an `ImageSource` of the images would choose by the same generators.

        Raises:
            DataError: a shard is damaged.
        """
        rows = checked_indices(indices, len(self))
        if rngs is None:
            numbers = [self._line(row)["fixed"] for row in rows.tolist()]
        else:
            counts = self._caption_counts(rows).tolist()
            numbers = [int(rng.integers(count)) for rng, count in zip(rngs, counts, strict=True)]
        return self.gather(rows, numbers)

    def gather(self, rows: Indices, captions: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the columns of images and of one caption of each, by its number."""
        rows, numbers = np.asarray(rows, np.int64), np.asarray(captions, np.int64)
        shards = np.searchsorted(self._starts, rows, "right") - 1
        columns: dict[str, np.ndarray] = {}
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            shard, places = self._shard(number), rows[here] - self._starts[number]
            texts = shard["captions"][places] + numbers[here]
            for name in self._stored():
                found = shard[name][places if name == "image_emb" else texts]
                dtype = np.float32 if name == STATES else found.dtype
                columns.setdefault(name, np.empty((len(rows), *found.shape[1:]), dtype))[here] = found
        if self._nulls is None:
            self._nulls = self._null_rows()
        columns |= {name: np.broadcast_to(row, (len(rows), *row.shape)) for name, row in self._nulls.items()}
        if {*DESCRIPTIVE} & {*self.columns}:
            columns |= self._descriptions(rows.tolist(), numbers.tolist())
        return {name: columns[name] for name in self.columns}

    def _caption_counts(self, rows: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Returns how many captions each image has."""
        counts, shards = np.empty_like(rows), np.searchsorted(self._starts, rows, "right") - 1
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            starts, places = self._shard(number)["captions"], rows[here] - self._starts[number]
            counts[here] = starts[places + 1] - starts[places]
        return counts

    def _stored(self) -> list[str]:
        return [name for name in self.columns if name not in (*NULLS, *DESCRIPTIVE)]

    def _descriptions(self, rows: list[int], numbers: list[int]) -> dict[str, np.ndarray]:
        lines = [self._line(row) for row in rows]
        return {
            "caption": objects([line["captions"][number] for line, number in zip(lines, numbers, strict=True)]),
            "captions": objects([line["captions"] for line in lines]),
            "key": objects([line["key"] for line in lines]),
            "substitute": np.zeros(len(rows), bool),
        }

    def _line(self, row: int) -> dict[str, Any]:
        """Returns the key, the captions and the number of the fixed caption of an image."""
        number, row = self._place(row)
        folder = shard_folder(self._folder, number)
        if self._lines[0] != number:
            self._lines = number, read_text(folder / CAPTIONS).splitlines()
        try:
            line = parse_json(self._lines[1][row])
            captions, fixed = tuple(line["captions"]), line["fixed"]
            captions[fixed]
            return {"key": line["key"], "captions": captions, "fixed": fixed % len(captions)}
        except (ValueError, TypeError, LookupError) as error:
            raise damaged(folder, f"{CAPTIONS}, {type(error).__name__}") from None

    def _null_rows(self) -> dict[str, np.ndarray]:
        return read_nulls(self.path, [name for name in self.columns if name in NULLS])

    def digests(self) -> UInt64[np.ndarray, "images"]:
        """Returns the `name_digest` of each image's name, in their order. DataError if a shard has none."""
        shards = [shard_folder(self._folder, number) for number in range(len(self._starts) - 1)]
        return np.concatenate([open_shard(shard, ["captions", NAMES])[NAMES] for shard in shards])

    def checksum(self, index: int) -> tuple[int, UInt8[np.ndarray, "8 8 3"]]:
        """Returns the `caption_digest` and the `thumbnail` of an image. DataError if a shard has none."""
        number, row = self._place(index)
        shard = self._mapped(self._checksums, number, ("captions", CAPTION_DIGESTS, THUMBNAILS))
        return int(shard[CAPTION_DIGESTS][row]), shard[THUMBNAILS][row]

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of the first ``limit`` images."""
        for index in range(min(limit, len(self))):
            yield from self._line(index)["captions"]

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the shard of an image, and its row there."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        return self._mapped(self._opened, number, {"captions", *self._stored()})

    def _mapped(
        self, opened: dict[int, dict[str, np.ndarray]], number: int, names: Iterable[str]
    ) -> dict[str, np.ndarray]:
        shard = opened.get(number)
        if shard is None:
            shard = open_shard(shard_folder(self._folder, number), sorted(names))
            dim, length = self.contract["dim"], self.context_length
            widths = {"image_emb": dim, "text_emb": dim, "tokens": length, "mask": length}
            wrong = [name for name, width in widths.items() if name in shard and shard[name].shape[1] != width]
            if wrong:
                raise damaged(shard_folder(self._folder, number), f"{wrong[0]}.npy has rows of another width")
            if len(opened) >= _MAX_OPEN:
                opened.clear()
            opened[number] = shard
        return shard


def _identity(folder: Path) -> str:
    """Returns a name for the content of a split, which changes with its path and when it is written again."""
    identity = [os.fspath(folder.resolve()), (folder / INDEX).stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
