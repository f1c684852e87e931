"""Embeddings computed before training, as ``python -m dalle2_jax.data embed`` writes them:

    FOLDER/
      clip/              whose they are: config.json, contract.json and tokenizer/ of the CLIP stage, without weights
      empty.npz          what it says of the empty caption
      train/             a folder for each split
        split.json       what is embedded there, and how it is divided; written first
        00000/           a folder for each shard, which is there when it is complete
          image_emb.npy  float32[pictures, E]
          names.npy      uint64[pictures], `digest` of each picture's name
          said.npy       uint64[pictures], `digest_of` its captions
          looks.npy      uint8[pictures, 8, 8, 3], its `look`: whoever pairs them with pictures sees that they fit
          captions.npy   int64[pictures + 1], the rows below where each picture's captions begin
          text_emb.npy   float32[captions, E]
          tokens.npy     int32[captions, L]
          mask.npy       bool[captions, L]
          text_seq.npy   float16[captions, L, D], where it was asked for
          captions.jsonl {"key", "captions", "fixed"}, a line for each picture
        index.json       rows and bytes of every shard; written last

Everything is mapped into memory and read row by row, so a split may be larger than memory. A prior trains on it without
CLIP; the contract in ``clip`` says on whose side it is.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from dalle2_jax.types import UserError

SPLIT, INDEX, EMPTY, CAPTIONS = "split.json", "index.json", "empty.npz", "captions.jsonl"
NAMES, SAID, LOOKS, STATES = "names", "said", "looks", "text_seq"
_OF_PICTURES = ("image_emb", NAMES, SAID, LOOKS)
_NULLS = ("null_text_emb", "null_text_seq", "null_mask")
_OPEN = 4096  # shards mapped at a time, well below the maps that a process may have
_SIDE = 8


@runtime_checkable
class Embedded(Protocol):
    """A source of embeddings, beside pictures or in their place.

    In their place, it has ``choose`` and ``gather``, as `EmbeddingSource` has them; beside them, ``draw`` gives rows of
    a batch by name.
    """

    path: Path

    @property
    def contract(self) -> Mapping[str, Any]:
        """The embedding contract of its folder."""

    def telling(self, names: tuple[str, ...], context_length: int) -> "Embedded":
        """Returns the source with these rows, of CLIP's, in its batches. UserError if it lacks one."""


def digest(name: str) -> int:
    """Returns 64 bits of a name, by which it is found among others."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def digest_of(captions: Iterable[str]) -> int:
    """Returns 64 bits of captions and their order; white space, which not every format keeps, is all one."""
    return digest("\n".join(" ".join(caption.split()) for caption in captions))


def look(picture: UInt8[np.ndarray, "S S 3"]) -> UInt8[np.ndarray, "8 8 3"]:
    """Returns what is left of a picture in 8 by 8 pixels, about the same at any resolution."""
    return cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def look_alike(one: UInt8[np.ndarray, "8 8 3"], other: UInt8[np.ndarray, "8 8 3"]) -> bool:
    """Whether two `look`s may be of one picture, scaled, cut and coded in different ways.

    They differ by no more than a tenth of what two pictures without relation do, or by no more than 8 levels.
    """
    one, other = one.astype(np.float32), other.astype(np.float32)
    return bool(np.mean((one - other) ** 2) <= max(0.1 * (np.var(one) + np.var(other)), 8**2))


def shard_folder(split: Path, number: int) -> Path:
    """Returns where a shard lies."""
    return split / f"{number:05d}"


def read_contract(path: Path) -> dict[str, Any]:
    """Returns the contract of a folder of embeddings. UserError without one, for nobody could say whose they are."""
    contract = _read_json(path / "clip" / "contract.json")
    if not isinstance(contract, dict) or not {"clip", "dim", "normalisation", "scale"} <= contract.keys():
        raise UserError(
            f"{path}/clip/contract.json does not say whose embeddings these are: copy clip/contract.json there from "
            "the system whose CLIP made them"
        )
    return contract


def split_folder(path: str | Path, split: str) -> Path:
    """Returns where a split lies. UserError if it does not."""
    folder = Path(path) / split
    if folder.is_dir():
        return folder
    if not Path(path).is_dir():
        raise UserError(f"there is no folder {path}: write it with python -m dalle2_jax.data embed --out {path}")
    found = ", ".join(sorted(entry.parent.name for entry in Path(path).glob(f"*/{SPLIT}"))) or "none"
    raise UserError(
        f"{path} has no embeddings of split {split!r}, only {found}: "
        f"write them with python -m dalle2_jax.data embed --split {split} --out {path}"
    )


class EmbeddingSource:
    """Random access to a split's embeddings; picklable.

    Args:
        path: the folder that ``embed`` wrote.
        split: one that was embedded.
        fields: what a batch has of CLIP's: "image_emb", "text_emb", "text_seq" and the empty caption's
            "null_text_emb", "null_text_seq" and "null_mask". Tokens and mask it always has.

    Raises:
        UserError: when the folder, the split, a field or a shard is missing, unfinished or damaged.
    """

    def __init__(
        self, path: str | Path, split: str = "train", fields: tuple[str, ...] = ("image_emb", "text_emb")
    ) -> None:
        self.path, self.split, self.fields = Path(path), split, fields
        self._folder = split_folder(path, split)
        self.contract = read_contract(self.path)
        about, index = _read_json(self._folder / SPLIT), _read_json(self._folder / INDEX)
        if about is None or index is None:
            done = len([*self._folder.glob("[0-9]*")])
            raise UserError(
                f"{self._folder} is unfinished ({done} shards are complete): the command that wrote them goes on"
            )
        if about["contract"] != self.contract:
            raise UserError(f"{self._folder} was embedded by {about['contract']}, {self.path}/clip is {self.contract}")
        self.context_length: int = about["context_length"]
        wanted = {*fields} - {"image_emb", "text_emb", *_NULLS, *((STATES,) if about[STATES] else ())}
        if wanted:
            lacking = ", ".join(sorted(wanted))
            raise UserError(f"{self._folder} has no {lacking}: embed into a new folder with --{STATES}")
        _check_sizes(self._folder, index["shards"])
        self._starts = np.cumsum([0, *(shard["pictures"] for shard in index["shards"])])
        self._bounds: list[int] = self._starts.tolist()  # which Python searches sooner
        self.identity = _identity(self._folder)
        self._empty = _read_empty(self.path, [name for name in fields if name in _NULLS])
        self._opened: dict[int, dict[str, np.ndarray]] = {}
        self._witnesses: dict[int, dict[str, np.ndarray]] = {}
        self._lines: tuple[int, list[dict]] = (-1, [])

    def __len__(self) -> int:
        return self._bounds[-1]

    def __repr__(self) -> str:
        return f"EmbeddingSource({str(self.path)!r}, {self.split!r}, {self.fields!r})"

    def __getstate__(self) -> dict:
        anew = {"_opened": {}, "_witnesses": {}, "_lines": (-1, [])}  # maps are opened where it is sent
        return {**self.__dict__, **anew}

    def telling(self, names: tuple[str, ...], context_length: int) -> "EmbeddingSource":
        """Returns the source with these rows, of CLIP's, in its batches. UserError if it lacks one."""
        if context_length != self.context_length:
            raise UserError(
                f"config.text.context_length must be {self.context_length}, not {context_length}: "
                f"{self.path} holds tokens of that length"
            )
        return EmbeddingSource(self.path, self.split, names)

    def __getitem__(self, index: int) -> dict:
        """Returns the rows of a picture and its fixed caption, and ``{"key", "captions", "caption"}``."""
        number, row = self._place(index)
        if self._lines[0] != number:
            path = shard_folder(self._folder, number) / CAPTIONS
            self._lines = number, [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        line = self._lines[1][row]
        texts = {"captions": tuple(line["captions"]), "caption": line["captions"][line["fixed"]]}
        return {**self._rows(number, row, line["fixed"]), "key": line["key"], **texts}

    def choose(self, index: int, rng: np.random.Generator) -> int:
        """Draws the number of a picture's caption, as a `PictureSource` of those pictures would."""
        return int(rng.integers(self.caption_count(index)))

    def gather(
        self, indices: Int64[np.ndarray, "B"], captions: Int64[np.ndarray, "B"]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the rows of a batch of pictures and a caption of each, by its number; and no texts, but tokens."""
        numbers = np.searchsorted(self._starts, indices, "right") - 1
        rows: dict[str, np.ndarray] = {}
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            shard, places = self._shard(number), indices[here] - self._starts[number]
            texts = shard["captions"][places] + captions[here]
            for name, array in shard.items():
                if name != "captions":
                    found = array[places if name == "image_emb" else texts]
                    kind = np.float32 if name == STATES else array.dtype
                    rows.setdefault(name, np.empty((len(indices), *array.shape[1:]), kind))[here] = found
        empty = {name: np.broadcast_to(row, (len(indices), *row.shape)) for name, row in self._empty.items()}
        return {**rows, **empty}, []

    def digests(self) -> UInt64[np.ndarray, "pictures"]:
        """Returns the `digest` of each picture's name, in their order. UserError when a shard has none."""
        shards = [shard_folder(self._folder, number) for number in range(len(self._starts) - 1)]
        return np.concatenate([_open_shard(shard, ["captions", NAMES])[NAMES] for shard in shards])

    def witness(self, index: int) -> tuple[int, UInt8[np.ndarray, "8 8 3"]]:
        """Returns `digest_of` the captions of a picture, and its `look`. UserError when a shard has none."""
        number, row = self._place(index)
        shard = self._mapped(self._witnesses, number, ("captions", SAID, LOOKS))
        return int(shard[SAID][row]), shard[LOOKS][row]

    def caption_count(self, index: int) -> int:
        """Returns how many captions a picture has."""
        number, row = self._place(index)
        starts = self._shard(number)["captions"]
        return int(starts[row + 1] - starts[row])

    def rows(self, index: int, caption: int) -> dict[str, np.ndarray]:
        """Returns the rows of a picture and of one of its captions, by its number."""
        return self._rows(*self._place(index), caption)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of the first ``limit`` pictures."""
        for index in range(min(limit, len(self))):
            yield from self[index]["captions"]

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a picture, and its row there."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self._bounds, index) - 1
        return number, index - self._bounds[number]

    def _rows(self, number: int, row: int, caption: int) -> dict[str, np.ndarray]:
        shard = self._shard(number)
        text = int(shard["captions"][row]) + caption
        rows = {name: shard[name][row if name == "image_emb" else text] for name in shard if name != "captions"}
        rows = {name: np.array(value, np.float32 if name == STATES else value.dtype) for name, value in rows.items()}
        return rows | self._empty

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        return self._mapped(self._opened, number, {"captions", "tokens", "mask", *self.fields} - {*_NULLS})

    def _mapped(self, opened: dict[int, dict[str, np.ndarray]], number: int, names: Iterable[str]) -> dict:
        shard = opened.get(number)
        if shard is None:
            shard = _open_shard(shard_folder(self._folder, number), sorted(names))
            if len(opened) >= _OPEN:
                opened.clear()
            opened[number] = shard
        return shard


def _identity(folder: Path) -> str:
    """Names a split as it now is: another where it lies elsewhere, or was written again."""
    told = [os.fspath(folder.resolve()), (folder / INDEX).stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _check_sizes(folder: Path, shards: list[dict]) -> None:
    for number, shard in enumerate(shards):
        for name, size in shard["bytes"].items():
            path = shard_folder(folder, number) / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes and not {size}"
                raise damaged(shard_folder(folder, number), f"{name} {state}")


def damaged(shard: Path, reason: object) -> UserError:
    """Returns the error of a shard that cannot be read."""
    return UserError(f"{shard} is damaged ({reason}): remove it, and the command that wrote it makes it again")


def _open_shard(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        arrays = {name: map_array(folder / f"{name}.npy") for name in names}
        pictures, captions = len(arrays["captions"]) - 1, int(arrays["captions"][-1])
    except (OSError, ValueError, IndexError) as error:
        raise damaged(folder, str(error).splitlines()[0]) from None
    for name in names:
        rows = {"captions": pictures + 1, **dict.fromkeys(_OF_PICTURES, pictures)}.get(name, captions)
        if len(arrays[name]) != rows:
            raise damaged(folder, f"{name}.npy has {len(arrays[name])} rows and not {rows}")
    return arrays


def map_array(path: Path) -> np.ndarray:
    """Maps a .npy file into memory. OSError or ValueError if it cannot be read."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _read_empty(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    try:
        with np.load(path / EMPTY, allow_pickle=False) as empty:
            return {name: empty[name] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path / EMPTY} cannot be read ({error}): remove it, and embed again to have it") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): remove it, and embed again to have it anew") from None
