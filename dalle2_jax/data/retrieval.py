"""Embeddings as public tools lay them out: img2dataset's keys and captions, clip-retrieval's arrays.

    FOLDER/
      clip/contract.json           whose they are, by hand: a copy of that of the system that is to use them
      img_emb/img_emb_0.npy        [rows, E], of any precision, before the contract's normalisation and scale
      text_emb/text_emb_0.npy      [rows, E]
      metadata/metadata_0.parquet  row i is of row i of both: ``key`` (or ``image_path``) and ``caption``
      ...                          1, 2 and so on

The texts may be embedded by another run, into a folder of their own with its own metadata; then its rows find theirs
here by key, whatever their order. What has no counterpart is left out and counted.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dalle2_jax.data.embeddings import read_contract
from dalle2_jax.types import UserError

_KEYS, _TEXTS = ("key", "image_path"), ("caption", "text", "TEXT")


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
        self._pairs, self.rejected = _joined(told, spoken)
        if not len(self._pairs):
            raise UserError(f"no picture of {self.path} has a text of the same key ({dict(self.rejected)})")

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"RetrievalSource({str(self.path)!r}, {self.split!r}, {str(self.text_path)!r})"

    def telling(self, names: tuple[str, ...], context_length: int) -> "RetrievalSource":
        """Returns the source itself. UserError if its batches lack one of ``names``."""
        lacking = sorted({*names} - {"image_emb", "text_emb"})
        if lacking:
            raise UserError(f"{self.path} has no {', '.join(lacking)}: use python -m dalle2_jax.data embed instead")
        return self

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image_emb", "text_emb", "key", "captions", "caption"}``."""
        rows, caption = self._example(index)
        return {**rows, "key": str(self._keys[self._pairs[index][0]]), "captions": (caption,), "caption": caption}

    def draw(self, index: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], str]:
        """Returns the rows of a pair, and its caption."""
        return self._example(index)

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

    def _example(self, index: int) -> tuple[dict[str, np.ndarray], str]:
        image, text = self._pairs[index]
        places = (("image_emb", self._images, image), ("text_emb", self._texts, text))
        rows = {}
        for (name, arrays, row), starts in zip(places, self._starts, strict=True):
            number = int(np.searchsorted(starts, row, "right")) - 1
            rows[name] = self._scaled(arrays[number][row - starts[number]])
        return rows, self._captions[int(text)].as_py()

    def _scaled(self, row: np.ndarray) -> Float32[np.ndarray, "E"]:
        """A row in the contract's space, of one that is raw or of unit length."""
        row = np.array(row, np.float32)
        if self.contract["normalisation"] == "unit":
            row /= max(float(np.linalg.norm(row)), 1e-6)
        return row * np.float32(self.contract["scale"])


class _Table:
    """The metadata of a folder: keys and captions of the rows of its arrays."""

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("metadata in parquet needs pyarrow: pip install pyarrow") from None
        files = {_number(path): path for path in (folder / "metadata").glob("metadata_*.parquet")}
        if not files:
            raise UserError(f"{folder} has no metadata/metadata_0.parquet with a key for each row")
        self._folder, self._rows, keys, captions = folder, {}, [], []
        for number in sorted(files):
            try:
                names = pyarrow.parquet.read_schema(files[number]).names
                wanted = [next((name for name in group if name in names), None) for group in (_KEYS, _TEXTS)]
                if None in wanted:
                    columns = " or ".join(_KEYS), " or ".join(_TEXTS)
                    raise UserError(f"{files[number]} has no column {columns[0]}, or none {columns[1]}")
                table = pyarrow.parquet.read_table(files[number], columns=wanted)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{files[number]} cannot be read: {str(error).splitlines()[0]}") from None
            self._rows[number] = len(table)
            keys += map(str, table[wanted[0]].to_pylist())
            captions += table[wanted[1]].cast(pyarrow.large_string()).chunks
        self.keys, self.captions = np.array(keys), pyarrow.chunked_array(captions, pyarrow.large_string())

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


def _joined(images: _Table, texts: _Table) -> tuple[np.ndarray, Counter[str]]:
    """Rows of pictures and texts with the same key, int64[pairs, 2], in the order of the pictures; and what is left."""
    told = np.flatnonzero(texts.captions.is_valid().to_numpy())
    shown = told if images is texts else np.arange(len(images.keys))
    keys, spoken = images.keys[shown], texts.keys[told]
    common, image, text = np.intersect1d(keys, spoken, return_indices=True)
    order = np.argsort(image)
    different = len(np.unique(keys)), len(np.unique(spoken))
    rejected = {
        "no caption": len(texts.keys) - len(told),
        "repeated key": len(keys) - different[0] + (0 if images is texts else len(spoken) - different[1]),
        "no text of its key": different[0] - len(common),
        "no picture of its key": different[1] - len(common),
    }
    return np.stack([shown[image], told[text]], axis=1)[order], +Counter(rejected)


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
