"""Embeddings in the layout of public tools: the keys and captions of img2dataset, the arrays of clip-retrieval.

    FOLDER/
      clip/contract.json           embedding contract, copied by hand from the system that will use them
      img_emb/img_emb_0.npy        [rows, E], any precision, before the contract's normalisation and scale
      text_emb/text_emb_0.npy      [rows, E]
      metadata/metadata_0.parquet  ``key`` (or ``image_path``) and ``caption`` of row i of both arrays
      ...                          1, 2 and so on

The texts may be embedded by another run, in a folder with its own metadata; its rows are then matched with the images
by key, in any order. Rows without a counterpart are rejected and counted, and so are rows that are not finite.
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from jaxtyping import Float32, Int64

from dalle2_jax.data.embeddings.layout import read_contract
from dalle2_jax.data.images.rejections import RejectionLog
from dalle2_jax.data.sources import (
    DESCRIPTIVE,
    Generators,
    Indices,
    Rejections,
    Source,
    StoredEmbeddings,
    checked_columns,
    checked_indices,
    objects,
)
from dalle2_jax.data.storage.arrays import map_array
from dalle2_jax.errors import DataError, printable
from dalle2_jax.reading import check_regular

_KEYS, _TEXTS = ("key", "image_path"), ("caption", "text", "TEXT")

_MAX_TRIES = 100
"""Pairs in a row that may be not finite."""

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 2**16, 2**28
"""Limits on the rows of a metadata file, and on the bytes of their texts, that are read at a time."""

_BASE_TEXT, _TEXT_PER_BYTE = 2**28, 64
"""Limit on the bytes of a column's texts: a base, and so many more for each byte of its file."""

_BLOCK = 2**16
"""Keys that are compared at a time: a copy of all would take as much memory as they do."""

_COMPUTE: Any = pyarrow.compute
"""Its functions are made at run time, so type checkers do not know them."""

_LOG = logging.getLogger(__name__)


class RetrievalSource(Source):
    """Random access to embeddings in the layout of clip-retrieval; picklable. It stores no tokens.

    Args:
        path: the folder, or its parent with a sub-folder for each split.
        split: "train", or the name of a sub-folder.
        text_path: the folder of the text embeddings; "" if they are in ``path`` too.

    Raises:
        UserError: a file is missing or damaged, or rows and metadata do not match.
    """

    def __init__(self, path: str | Path, split: str = "train", text_path: str | Path = "") -> None:
        self.path, self.split, self.text_path = Path(path), split, Path(text_path or path)
        self.columns = ("image_emb", "text_emb", *DESCRIPTIVE)
        self.contract = read_contract(self.path)
        images = _Table(_division(self.path, split))
        texts = images if self.text_path == self.path else _Table(_division(self.text_path, split))
        self._keys, self._captions = images.keys, texts.captions
        self._arrays = {"image_emb": images.arrays("img_emb"), "text_emb": texts.arrays("text_emb")}
        for arrays in self._arrays.values():
            if arrays[0].shape[1] != self.contract["dim"]:
                width, dim = arrays[0].shape[1], self.contract["dim"]
                raise DataError(f"{self.path} has embeddings of width {width}, but its contract says {dim}", self.path)
        self._starts = {name: np.cumsum([0, *map(len, arrays)]) for name, arrays in self._arrays.items()}
        self._pairs, self._at_opening = _joined(images, texts)
        self._rejected = RejectionLog()
        if not len(self._pairs):
            counts = dict(self._at_opening)
            raise DataError(f"no image of {self.path} has a text with the same key ({counts})", self.path)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"RetrievalSource({str(self.path)!r}, {self.split!r}, {str(self.text_path)!r})"

    @property
    def rejections(self) -> Rejections:
        """The rows rejected so far, by the number of their pair."""
        since = {str(place): cause for place, cause in self._rejected.causes().items()}
        return Rejections(self._at_opening, since)

    @property
    def stored_embeddings(self) -> StoredEmbeddings:
        """The folder of the embeddings."""
        return StoredEmbeddings(self.path, self.contract, None)

    def select(self, inputs: Sequence[str]) -> "RetrievalSource":
        """Returns a source of these columns. MissingColumnsError if there is no such column."""
        selected = copy.copy(self)
        selected.columns = checked_columns(self, inputs, "write it with dalle2 data embed")
        return selected

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch; the next pair is the substitute of one that is not finite. A pair has one caption.

        Raises:
            DataError: too many pairs are not finite.
        """
        requested = checked_indices(indices, len(self))
        columns, found = self._finite(requested)
        descriptive = [name for name in self.columns if name in DESCRIPTIVE]
        columns |= self._descriptions(found, requested) if descriptive else {}
        return {name: columns[name] for name in self.columns}

    def _descriptions(self, found: Int64[np.ndarray, "B"], requested: Int64[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        images, texts = self._pairs[found].T
        captions = self._captions.take(texts).to_pylist()
        return {
            "caption": objects(captions),
            "captions": objects([(caption,) for caption in captions]),
            "key": objects(self._keys.take(images).to_pylist()),
            "substitute": found != requested,
        }

    def _finite(self, indices: Int64[np.ndarray, "B"]) -> tuple[dict[str, np.ndarray], Int64[np.ndarray, "B"]]:
        """Returns the embeddings of pairs, and the indices of the pairs after substitution."""
        for _ in range(_MAX_TRIES):
            rows = self._rows(indices)
            finite = np.all([np.isfinite(one).all(1) for one in rows.values()], axis=0)
            if finite.all():
                return rows, indices
            for index in indices[~finite].tolist():
                if self._rejected.add(index, "not finite"):
                    key = self._keys[int(self._pairs[index, 0])].as_py()
                    _LOG.warning("%s: %s is rejected (not finite); others are only counted", self, printable(key))
            indices = np.where(finite, indices, (indices + 1) % len(self))
        raise DataError(
            f"{_MAX_TRIES} embeddings of {self.path} in a row are not finite: embed the data again", self.path
        )

    def _rows(self, indices: Int64[np.ndarray, "B"]) -> dict[str, Float32[np.ndarray, "B E"]]:
        rows = {}
        for name, found in zip(self._arrays, self._pairs[indices].T, strict=True):
            arrays, starts = self._arrays[name], self._starts[name]
            numbers = np.searchsorted(starts, found, "right") - 1
            out = np.empty((len(indices), self.contract["dim"]), np.float32)
            for number in np.unique(numbers).tolist():
                here = np.flatnonzero(numbers == number)
                out[here] = arrays[number][found[here] - starts[number]]
            rows[name] = self._scaled(out)
        return rows

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of the first ``limit`` pairs."""
        for _, text in self._pairs[:limit]:
            yield self._captions[int(text)].as_py()

    def __getstate__(self) -> dict[str, Any]:
        paths = {name: [array.filename for array in arrays] for name, arrays in self._arrays.items()}
        return {**self.__dict__, "_arrays": paths}  # mapped again after unpickling

    def __setstate__(self, state: dict[str, Any]) -> None:
        maps = {name: [_mapped(Path(path)) for path in paths] for name, paths in state["_arrays"].items()}
        self.__dict__.update({**state, "_arrays": maps})

    def _scaled(self, rows: Float32[np.ndarray, "B E"]) -> Float32[np.ndarray, "B E"]:
        """Returns stored rows, raw or of unit norm, in the space of the embedding contract."""
        if self.contract["normalisation"] == "unit":
            with np.errstate(invalid="ignore"):  # rows that are not finite are rejected by `fetch`
                rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
        return rows * np.float32(self.contract["scale"])


class _Table:
    """The metadata of a folder: keys and captions of the rows of its arrays, as Arrow arrays."""

    def __init__(self, folder: Path) -> None:
        files = {_number(path): path for path in (folder / "metadata").glob("metadata_*.parquet")}
        if not files:
            raise DataError(f"{folder} has no metadata/metadata_0.parquet with a key for each row", folder)
        self._folder, self._rows, columns = folder, {}, []
        for number in sorted(files):
            columns.append(_columns(files[number]))
            self._rows[number] = len(columns[-1][0])
        keys, captions = zip(*columns, strict=True)
        self.keys = pyarrow.concat_arrays(keys)
        self.captions = pyarrow.chunked_array(captions)

    def arrays(self, kind: str) -> list[np.memmap]:
        """Maps the arrays of one kind, one for each metadata file. DataError if one is missing or has other rows."""
        files = {_number(path): path for path in (self._folder / kind).glob(f"{kind}_*.npy")}
        mapped = []
        for number, rows in self._rows.items():
            if number not in files:
                raise DataError(
                    f"{self._folder}/{kind} has no {kind}_{number}.npy for metadata_{number}.parquet: restore it",
                    self._folder / kind,
                )
            mapped.append(_mapped(files[number]))
            if mapped[-1].ndim != 2 or len(mapped[-1]) != rows:
                found = len(mapped[-1])
                raise DataError(
                    f"{files[number]} has {found} rows, and its metadata {rows}: they must be equal", files[number]
                )
        return mapped


def _columns(path: Path) -> list[pyarrow.LargeStringArray]:
    """Reads keys and captions. DataError if one is missing, or they take far more memory than the file."""
    try:
        check_regular(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for group in (_KEYS, _TEXTS):
                if not {*group} & {*names}:
                    raise DataError(f"{path} has no column {' or '.join(group)}: add it", path)
            found = [next(name for name in group if name in names) for group in (_KEYS, _TEXTS)]
            return [_column(path, file, name) for name in found]
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read: {reason}", path) from None


def _column(path: Path, file: pyarrow.parquet.ParquetFile, name: str) -> pyarrow.LargeStringArray:
    """Reads a column in groups of rows, so that a small file that repeats one long text is noticed early."""
    left, read = _BASE_TEXT + _TEXT_PER_BYTE * path.stat().st_size, []
    for group in range(file.num_row_groups):
        rows = min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // _longest(path, group, name))
        # with threads, more memory would be held than the columns take
        for batch in file.iter_batches(max(1, rows), row_groups=[group], columns=[name], use_threads=False):
            texts = batch.column(0).cast(pyarrow.large_string())
            left -= texts.nbytes
            if left < 0:
                raise DataError(f"{path} is damaged: the texts of {name} take far more memory than the file", path)
            read.append(texts)
    return pyarrow.concat_arrays(read) if read else pyarrow.array([], pyarrow.large_string())


def _longest(path: Path, group: int, name: str) -> int:
    """Returns the bytes of the longest text in a row group's dictionary, which any number of rows may refer to."""
    with pyarrow.parquet.ParquetFile(path, read_dictionary=[name]) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=[name], use_threads=False), None)
    if first is None or not pyarrow.types.is_dictionary(first.column(0).type):
        return 1
    return _COMPUTE.max(_COMPUTE.binary_length(first.column(0).dictionary)).as_py() or 1


def _joined(images: _Table, texts: _Table) -> tuple[Int64[np.ndarray, "pairs 2"], Counter[str]]:
    """Returns the rows of images and texts with the same key, in the order of the images, and the rejected rows."""
    captioned = np.flatnonzero(texts.captions.is_valid())
    text_keys = texts.keys if len(captioned) == len(texts.keys) else texts.keys.take(captioned)
    if images is texts:
        first = _firsts(text_keys)
        pairs = captioned[first]
        rejected = {"no caption": len(texts.keys) - len(captioned), "repeated key": len(captioned) - len(pairs)}
        return np.stack([pairs, pairs], axis=1), +Counter(rejected)
    first = _firsts(images.keys)
    matches = _COMPUTE.index_in(images.keys.take(first), value_set=text_keys)
    found = np.asarray(matches.is_valid())
    pairs = np.stack([first[found], captioned[np.asarray(matches.drop_null())]], axis=1)
    different = len(_firsts(text_keys))
    rejected = {
        "no caption": len(texts.keys) - len(captioned),
        "repeated key": len(images.keys) - len(first) + len(text_keys) - different,
        "no text with its key": len(first) - len(pairs),
        "no image with its key": different - len(pairs),
    }
    return pairs, +Counter(rejected)


def _firsts(keys: pyarrow.LargeStringArray) -> Int64[np.ndarray, "different"]:
    """Returns the row of the first occurrence of each key."""
    order = _COMPUTE.array_sort_indices(keys)  # stable; hashing them takes more memory
    new = np.ones(len(keys), bool)
    for start in range(0, len(keys) - 1, _BLOCK):
        ordered = keys.take(order[start : start + _BLOCK + 1])
        new[start + 1 : start + _BLOCK + 1] = _COMPUTE.not_equal(ordered[1:], ordered[:-1])
    return np.sort(np.asarray(order)[new]).astype(np.int64)


def _number(path: Path) -> int:
    """Returns the number in the name of a file, -1 if there is none."""
    found = re.fullmatch(r".*_(\d+)", path.stem)
    return int(found[1]) if found else -1


def _mapped(path: Path) -> np.memmap:
    try:
        return map_array(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}", path) from None


def _division(path: Path, split: str) -> Path:
    if (path / split / "metadata").is_dir():
        return path / split
    if split == "train" and (path / "metadata").is_dir():
        return path
    raise DataError(f"{path} has no embeddings of split {split!r}: there is no {path / split / 'metadata'}", path)
