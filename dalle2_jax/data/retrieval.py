"""Embeddings as public tools lay them out: img2dataset's keys and captions, clip-retrieval's arrays.

    FOLDER/
      clip/contract.json           whose they are, by hand: a copy of that of the system that is to use them
      img_emb/img_emb_0.npy        [rows, E], of any precision, before the contract's normalisation and scale
      text_emb/text_emb_0.npy      [rows, E]
      metadata/metadata_0.parquet  row i is of row i of both: ``key`` (or ``image_path``) and ``caption``
      ...                          1, 2 and so on

The texts may be embedded by another run, into a folder of their own with its own metadata; then its rows find theirs
here by key, whatever their order. What has no counterpart is left out and counted. Rows that are not finite are passed
over, and counted too.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from jaxtyping import Float32, Int64

from dalle2_jax.data.embeddings import read_contract
from dalle2_jax.data.refusals import Refusals
from dalle2_jax.types import UserError

_KEYS, _TEXTS = ("key", "image_path"), ("caption", "text", "TEXT")

_FRUITLESS = 100
"""Pairs in a row that are not finite: there will be no other."""

_BLOCK = 2**16
"""Keys that are compared at a time: a copy of all would take as much memory as they do."""

_LOG = logging.getLogger(__name__)


class RetrievalSource:
    """Random access to embeddings in clip-retrieval's layout; picklable. Tokens are made when a batch is.

    Args:
        path: the folder, or one of it for each split.
        split: ``train``, or the name of a sub-folder.
        text_path: the folder of the text embeddings; "" if they lie in ``path`` too.

    Raises:
        UserError: when a file is missing or damaged, or rows and metadata do not fit.
    """

    def __init__(self, path: str | Path, split: str = "train", text_path: str | Path = "") -> None:
        self.path, self.split, self.text_path = Path(path), split, Path(text_path or path)
        self.contract = read_contract(self.path)
        told = _Table(_division(self.path, split))
        spoken = told if self.text_path == self.path else _Table(_division(self.text_path, split))
        self._keys, self._captions = told.keys, spoken.captions
        self._images, self._texts = told.arrays("img_emb"), spoken.arrays("text_emb")
        for arrays in (self._images, self._texts):
            if arrays[0].shape[1] != self.contract["dim"]:
                width, dim = arrays[0].shape[1], self.contract["dim"]
                raise UserError(f"{self.path} has embeddings of {width} numbers, and its contract says {dim}")
        self._starts = [np.cumsum([0, *map(len, arrays)]) for arrays in (self._images, self._texts)]
        self._pairs, self._left_out = _joined(told, spoken)
        self._refused = Refusals()
        if not len(self._pairs):
            raise UserError(f"no picture of {self.path} has a text of the same key ({dict(self._left_out)})")

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"RetrievalSource({str(self.path)!r}, {self.split!r}, {str(self.text_path)!r})"

    @property
    def rejected(self) -> Counter[str]:
        """How many rows were left out, by cause: when the folder was opened, and since."""
        return self._left_out + Counter(self._refused.causes().values())

    def refusals(self) -> dict[str, str]:
        """Returns why each pair was passed over since the opening, here and by copies in other processes."""
        return {str(place): cause for place, cause in self._refused.causes().items()}

    def telling(self, names: tuple[str, ...], context_length: int) -> "RetrievalSource":
        """Returns the source itself. UserError if its batches lack one of ``names``."""
        lacking = sorted({*names} - {"image_emb", "text_emb"})
        if lacking:
            raise UserError(f"{self.path} has no {', '.join(lacking)}: use python -m dalle2_jax.data embed instead")
        return self

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image_emb", "text_emb", "key", "captions", "caption"}``."""
        rows, [found] = self._sound(np.array([index]))
        picture, text = self._pairs[found].tolist()
        key, caption = self._keys[picture].as_py(), self._captions[text].as_py()
        return {**{name: row[0] for name, row in rows.items()}, "key": key, "captions": (caption,), "caption": caption}

    def choose(self, index: int, rng: np.random.Generator) -> int:
        """Returns the number of a pair's caption, of which there is one."""
        return 0

    def gather(
        self, indices: Int64[np.ndarray, "B"], captions: Int64[np.ndarray, "B"]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the rows of a batch of pairs, and their captions. UserError if too many are not finite."""
        rows, found = self._sound(indices)
        return rows, self._captions.take(self._pairs[found, 1]).to_pylist()

    def _sound(self, indices: Int64[np.ndarray, "B"]) -> tuple[dict[str, np.ndarray], Int64[np.ndarray, "B"]]:
        """Returns the rows of pairs and which they are: the next stands in for one that is not finite."""
        for _ in range(_FRUITLESS):
            rows = self._rows(indices)
            sound = np.all([np.isfinite(one).all(1) for one in rows.values()], axis=0)
            if sound.all():
                return rows, indices
            for index in indices[~sound].tolist():
                if self._refused.add(index, "not finite"):
                    key = self._keys[int(self._pairs[index, 0])].as_py()
                    _LOG.warning("%s: %s is refused (not finite); others are only counted", self, key)
            indices = np.where(sound, indices, (indices + 1) % len(self))
        raise UserError(f"{_FRUITLESS} embeddings of {self.path} in a row are not finite: they are damaged")

    def _rows(self, indices: Int64[np.ndarray, "B"]) -> dict[str, Float32[np.ndarray, "B E"]]:
        rows = {}
        for name, arrays, starts, found in zip(
            ("image_emb", "text_emb"), (self._images, self._texts), self._starts, self._pairs[indices].T, strict=True
        ):
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

    def __getstate__(self) -> dict:
        paths = {name: [array.filename for array in self.__dict__[name]] for name in ("_images", "_texts")}
        return {**self.__dict__, **paths}  # maps are opened anew where it is sent

    def __setstate__(self, state: dict) -> None:
        maps = {name: [_mapped(Path(path)) for path in state[name]] for name in ("_images", "_texts")}
        self.__dict__.update({**state, **maps})

    def _scaled(self, rows: Float32[np.ndarray, "B E"]) -> Float32[np.ndarray, "B E"]:
        """Rows in the contract's space, of those that are raw or of unit length."""
        if self.contract["normalisation"] == "unit":
            with np.errstate(invalid="ignore"):  # of rows that are not finite, which `gather` sees to
                rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
        return rows * np.float32(self.contract["scale"])


class _Table:
    """The metadata of a folder: keys and captions of the rows of its arrays, as Arrow keeps them."""

    def __init__(self, folder: Path) -> None:
        files = {_number(path): path for path in (folder / "metadata").glob("metadata_*.parquet")}
        if not files:
            raise UserError(f"{folder} has no metadata/metadata_0.parquet with a key for each row")
        self._folder, self._rows, columns = folder, {}, []
        for number in sorted(files):
            columns.append(_columns(files[number]))
            self._rows[number] = len(columns[-1][0])
        keys, captions = zip(*columns, strict=True)
        self.keys = pyarrow.concat_arrays(keys)
        self.captions = pyarrow.chunked_array(captions)

    def arrays(self, kind: str) -> list[np.memmap]:
        """Maps the arrays of a kind, one for each file of metadata. UserError if one is missing or of other rows."""
        files = {_number(path): path for path in (self._folder / kind).glob(f"{kind}_*.npy")}
        mapped = []
        for number, rows in self._rows.items():
            if number not in files:
                raise UserError(f"{self._folder}/{kind} has no {kind}_{number}.npy beside metadata_{number}.parquet")
            mapped.append(_mapped(files[number]))
            if mapped[-1].ndim != 2 or len(mapped[-1]) != rows:
                found = len(mapped[-1])
                raise UserError(f"{files[number]} has {found} rows, and its metadata {rows}: they cannot be matched")
        return mapped


def _columns(path: Path) -> list[pyarrow.LargeStringArray]:
    """Reads keys and captions. UserError if one is not there."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [next((name for name in group if name in names), None) for group in (_KEYS, _TEXTS)]
            if None in wanted:
                columns = " or ".join(_KEYS), " or ".join(_TEXTS)
                raise UserError(f"{path} has no column {columns[0]}, or none {columns[1]}")
            table = file.read(columns=wanted, use_threads=False)  # threads keep more memory than the columns take
        return [table[name].cast(pyarrow.large_string()).combine_chunks() for name in wanted]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _joined(images: _Table, texts: _Table) -> tuple[Int64[np.ndarray, "pairs 2"], Counter[str]]:
    """Returns rows of pictures and of texts with the same key, in the pictures' order; and what is left."""
    told = np.flatnonzero(texts.captions.is_valid())
    spoken = texts.keys if len(told) == len(texts.keys) else texts.keys.take(told)
    if images is texts:
        first = _firsts(spoken)
        pairs = told[first]
        rejected = {"no caption": len(texts.keys) - len(told), "repeated key": len(told) - len(pairs)}
        return np.stack([pairs, pairs], axis=1), +Counter(rejected)
    first = _firsts(images.keys)
    met = pyarrow.compute.index_in(images.keys.take(first), value_set=spoken)
    found = np.asarray(met.is_valid())
    pairs = np.stack([first[found], told[np.asarray(met.drop_null())]], axis=1)
    different = len(_firsts(spoken))
    rejected = {
        "no caption": len(texts.keys) - len(told),
        "repeated key": len(images.keys) - len(first) + len(spoken) - different,
        "no text of its key": len(first) - len(pairs),
        "no picture of its key": different - len(pairs),
    }
    return pairs, +Counter(rejected)


def _firsts(keys: pyarrow.LargeStringArray) -> Int64[np.ndarray, "different"]:
    """Returns the places of the keys that did not come before."""
    order = pyarrow.compute.array_sort_indices(keys)  # stable; hashing them takes more memory
    new = np.ones(len(keys), bool)
    for start in range(0, len(keys) - 1, _BLOCK):
        ordered = keys.take(order[start : start + _BLOCK + 1])
        new[start + 1 : start + _BLOCK + 1] = pyarrow.compute.not_equal(ordered[1:], ordered[:-1])
    return np.sort(np.asarray(order)[new]).astype(np.int64)


def _number(path: Path) -> int:
    """The number in a file's name; files without one come last, and are found nowhere."""
    found = re.fullmatch(r".*_(\d+)", path.stem)
    return int(found[1]) if found else -1


def _mapped(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _division(path: Path, split: str) -> Path:
    if (path / split / "metadata").is_dir():
        return path / split
    if split == "train" and (path / "metadata").is_dir():
        return path
    raise UserError(f"{path} has no embeddings of split {split!r}: there is no {path / split / 'metadata'}")
