"""Embeddings computed before training, as ``dalle2 data embed`` writes them.

    FOLDER/
      clip/              the CLIP stage that made them, without weights: config.json, contract.json, tokenizer/
      empty.npz          text embedding and states of the empty caption
      train/             a folder for each split
        split.json       the data set and the size of the shards; written first
        00000/           a folder for each shard, which exists when it is complete
          image_emb.npy  float32[images, E]
          names.npy      uint64[images], `name_digest` of each image's name
          said.npy       uint64[images], `caption_digest` of its captions
          looks.npy      uint8[images, 8, 8, 3], its `thumbnail`; with the digest it detects embeddings of another image
          captions.npy   int64[images + 1], where the captions of each image begin in the arrays below
          text_emb.npy   float32[captions, E]
          tokens.npy     int32[captions, L]
          mask.npy       bool[captions, L]
          text_seq.npy   float16[captions, L, D], with --text_seq
          captions.jsonl {"key", "captions", "fixed"}, a line for each image
        index.json       rows and bytes of every shard; written last

Arrays are mapped into memory and read row by row, so a split may be larger than memory. A prior trains on them without
CLIP; the embedding contract in ``clip`` identifies the CLIP.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data.storage import arrays
from dalle2_jax.data.storage.arrays import Kind, unpack_arrays
from dalle2_jax.errors import DataError
from dalle2_jax.reading import parse_json, read_bytes, read_text
from dalle2_jax.types import complete_contract

SPLIT, INDEX, EMPTY, CAPTIONS = "split.json", "index.json", "empty.npz", "captions.jsonl"
NAMES, CAPTION_DIGESTS, THUMBNAILS, STATES = "names", "said", "looks", "text_seq"
_OF_IMAGES = ("image_emb", NAMES, CAPTION_DIGESTS, THUMBNAILS)
NULLS = ("null_text_emb", "null_text_seq", "null_mask")
_FORMS = {
    # array of a shard: dtype, number of axes
    "captions": ("int64", 1),
    "image_emb": ("float32", 2),
    "text_emb": ("float32", 2),
    "tokens": ("int32", 2),
    "mask": ("bool", 2),
    NAMES: ("uint64", 1),
    CAPTION_DIGESTS: ("uint64", 1),
    THUMBNAILS: ("uint8", 4),
    STATES: ("float16", 3),
}
_NULL_KINDS = {
    "null_text_emb": Kind(np.float32, (None,)),
    "null_text_seq": Kind(np.float32, (None, None)),
    "null_mask": Kind(np.bool_, (None,)),
}
_MAX_NULL_BYTES = 2**26  # of empty.npz


def shard_folder(split: Path, number: int) -> Path:
    """Returns the folder of a shard."""
    return split / f"{number:05d}"


def read_contract(path: Path) -> dict[str, Any]:
    """Returns the embedding contract of a folder of embeddings. DataError without one: it identifies the CLIP."""
    contract = _read_json(path / "clip" / "contract.json")
    if not isinstance(contract, dict) or not {"clip", "dim", "normalisation", "scale"} <= contract.keys():
        raise DataError(
            f"{path}/clip/contract.json does not identify the CLIP that made these embeddings: copy clip/contract.json "
            "there from the system of that CLIP",
            path,
        )
    return complete_contract(contract)


def read_split(folder: Path) -> dict[str, Any] | None:
    """Returns the content of split.json, None if there is none. DataError if it is damaged."""
    about = _read_json(folder / SPLIT)
    keys = {"source", "pictures", "shard_size", "context_length", STATES, "contract"}
    if about is not None and not (
        isinstance(about, dict) and keys <= about.keys() and isinstance(about["context_length"], int)
    ):
        raise DataError(f"{folder / SPLIT} is damaged: remove {folder} and embed again", folder / SPLIT)
    return about


def read_index(folder: Path) -> dict[str, Any] | None:
    """Returns the content of index.json, None if there is none. DataError if it is damaged."""
    index = _read_json(folder / INDEX)
    shards = index.get("shards") if isinstance(index, dict) else None
    if index is not None and not (isinstance(shards, list) and shards and all(map(_is_measured, shards))):
        raise DataError(f"{folder / INDEX} is damaged: remove it and embed again", folder / INDEX)
    return index


def _is_measured(shard: Any) -> bool:
    """Returns whether an entry of index.json has the fields that ``embed`` writes."""
    if not isinstance(shard, dict) or not isinstance(shard.get("bytes"), dict):
        return False
    sizes = shard["bytes"]
    named = all(type(size) is int and "/" not in name for name, size in sizes.items())
    counted = all(type(shard.get(name)) is int and shard[name] >= 0 for name in ("pictures", "captions"))
    return named and counted and 8 * (shard["pictures"] + 1) <= sizes.get("captions.npy", 0)


def split_folder(path: str | Path, split: str) -> Path:
    """Returns the folder of a split. DataError if there is none."""
    folder = Path(path) / split
    if folder.is_dir():
        return folder
    if not Path(path).is_dir():
        raise DataError(f"there is no folder {path}: write it with dalle2 data embed --out {path}", path)
    found = ", ".join(sorted(entry.parent.name for entry in Path(path).glob(f"*/{SPLIT}"))) or "none"
    raise DataError(
        f"{path} has no embeddings of split {split!r}, only {found}: "
        f"write them with dalle2 data embed --split {split} --out {path}",
        path,
    )


def check_sizes(folder: Path, shards: list[dict]) -> None:
    """Raises DataError for a shard whose files differ in size from the index."""
    for number, shard in enumerate(shards):
        for name, size in shard["bytes"].items():
            path = shard_folder(folder, number) / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise damaged(shard_folder(folder, number), f"{name} {state}")


def damaged(shard: Path, reason: object) -> DataError:
    """Returns the error of a shard that cannot be read."""
    return DataError(f"{shard} is damaged ({reason}): remove it and run the command that wrote it again", shard)


def open_shard(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Maps arrays of a shard; "captions" must be one of them. DataError if one is damaged."""
    try:
        found = {name: map_array(folder / f"{name}.npy") for name in names}
        images, captions = len(found["captions"]) - 1, int(found["captions"][-1])
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise damaged(folder, str(error).splitlines()[0]) from None
    for name in names:
        rows = {"captions": images + 1, **dict.fromkeys(_OF_IMAGES, images)}.get(name, captions)
        kind, axes = _FORMS[name]
        if found[name].dtype != kind or found[name].ndim != axes:
            raise damaged(folder, f"{name}.npy is {found[name].dtype}{list(found[name].shape)}")
        if len(found[name]) != rows:
            raise damaged(folder, f"{name}.npy has {len(found[name])} rows instead of {rows}")
    if found["captions"][0] != 0 or np.any(np.diff(found["captions"]) < 0):
        raise damaged(folder, "captions.npy does not increase from 0")
    return found


def map_array(path: Path) -> np.ndarray:
    """Maps a .npy file into memory. OSError or ValueError if it cannot be read."""
    return arrays.map_array(path).view(np.ndarray)


def read_nulls(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Reads rows of the empty caption. DataError if the file is missing or damaged."""
    if not names:
        return {}
    try:
        kinds = {name: _NULL_KINDS[name] for name in names}
        return unpack_arrays(read_bytes(path / EMPTY, _MAX_NULL_BYTES), kinds, _MAX_NULL_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path / EMPTY} cannot be read ({error}): remove it and embed again", path / EMPTY) from None


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): remove it and embed again", path) from None
