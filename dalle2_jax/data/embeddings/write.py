"""Writes the embeddings of a source in shards; `dalle2_jax.data.embeddings.layout` describes the files.

A shard covers a fixed range of the source's images and appears when it is complete. A run that was killed continues
with the first missing shard, and its result does not depend on when it was killed or on the number of hosts.
"""

import io
import json
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from tqdm import tqdm

from dalle2_jax import lock
from dalle2_jax.data.embeddings.digests import caption_digest, name_digest, thumbnail
from dalle2_jax.data.embeddings.layout import (
    CAPTION_DIGESTS,
    CAPTIONS,
    EMPTY,
    INDEX,
    NAMES,
    SPLIT,
    STATES,
    THUMBNAILS,
    check_sizes,
    damaged,
    open_shard,
    read_contract,
    read_index,
    read_split,
    shard_folder,
)
from dalle2_jax.data.images.records import name_of
from dalle2_jax.data.sources import DESCRIPTIVE, Source, example
from dalle2_jax.errors import UserError
from dalle2_jax.files import write_array, write_atomically
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import complete_contract

SHARD_SIZE = 10_000
"""Images per shard."""

_BATCHES_AHEAD, _THREADS = 2, 4

_RENAMED = ("PictureSource(", "ImageSource(")
"""The name of a class in split.json of version 0.1, and its name now."""


class Embedder(Protocol):
    """A CLIP on the devices, loaded by the caller."""

    batch_size: int

    def images(self, images: UInt8[np.ndarray, "B H W 3"], /) -> Float32[np.ndarray, "B E"]:
        """Returns the embeddings of at most ``batch_size`` images, in the space of the embedding contract."""
        ...

    def captions(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns text_emb and text_seq of at most ``batch_size`` captions."""
        ...

    def empty(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns null_text_emb, null_text_seq and null_mask of the empty caption, one row each, given any captions."""
        ...


@dataclass(frozen=True)
class Task:
    """A split to embed.

    Attributes:
        source: the images.
        split: name of the split that is written.
        embedder: the CLIP.
        tokenizer: of the CLIP.
        context_length: length of the tokens, L.
        out: folder of the embeddings, where ``clip`` exists already.
        states: whether text_seq is written.
        shard_size: images per shard, at most.
        host: number of this host.
        hosts: number of hosts that share the work, each with its own devices.
    """

    source: Source
    split: str
    embedder: Embedder
    tokenizer: Tokenizer
    context_length: int
    out: Path
    states: bool = False
    shard_size: int = SHARD_SIZE
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))  # a string works too

    @property
    def folder(self) -> Path:
        return self.out / self.split

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.shard_size)

    @property
    def about(self) -> dict[str, Any]:
        """The content of split.json, which must be equal when a run continues."""
        return {
            "source": repr(self.source),
            "pictures": len(self.source),
            "shard_size": self.shard_size,
            "context_length": self.context_length,
            STATES: self.states,
            "contract": read_contract(self.out),
        }


def claim(task: Task) -> None:
    """Writes or checks split.json, and removes unfinished shards of a killed run. The caller has locked ``task.out``.

    The first of several hosts calls it before any calls `write_split`.

    Raises:
        UserError: the folder holds other embeddings.
    """
    path = task.folder / SPLIT
    about = json.loads(json.dumps(task.about))
    stored = read_split(task.folder)
    if stored is not None:
        stored["source"] = str(stored["source"]).replace(*_RENAMED)
        stored["contract"] = complete_contract(stored["contract"])
        differing = [f"{key} {stored.get(key)!r}, now {about[key]!r}" for key in about if stored.get(key) != about[key]]
        if differing:
            raise UserError(f"{task.folder} holds other embeddings ({'; '.join(differing)}): use another --out")
    else:
        write_atomically(path, json.dumps(about, indent=2) + "\n")
    for left in task.folder.glob(".[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)
    for folder in (task.folder, *(path for path in (task.out / "clip").rglob("*") if path.is_dir())):
        lock.sweep(folder)
    if not _has_empty(task.out / EMPTY):
        empty = task.embedder.empty(*task.tokenizer.encode([""], task.context_length))
        _write_empty(task.out / EMPTY, empty)


def write_split(task: Task) -> int | None:
    """Embeds a split, or the missing shards of this host's part of it.

    Records that the source rejects are omitted. All captions of an image are embedded.

    Returns:
        The number of images in the split; None while other hosts are still running: the last one completes the split.

    Raises:
        UserError: the folder holds other embeddings, or the source cannot be read.
    """
    if task.hosts == 1:
        claim(task)
    numbers = range(task.host, task.shards, task.hosts)
    sizes = [min(task.shard_size, len(task.source) - number * task.shard_size) for number in numbers]
    with tqdm(total=sum(sizes), desc=f"embedding {task.split}", unit="image") as bar:
        for number, size in zip(numbers, sizes, strict=True):
            if not shard_folder(task.folder, number).is_dir():
                (task.folder / INDEX).unlink(missing_ok=True)
                _write_shard(task, number)
            bar.update(size)
    index = _index(task)
    if index is None:
        shards = [shard_folder(task.folder, number) for number in range(task.shards)]
        if not all(shard.is_dir() for shard in shards):
            return None
        index = {"shards": [*map(_measured, shards)]}
        write_atomically(task.folder / INDEX, json.dumps(index) + "\n")
    check_sizes(task.folder, index["shards"])
    return sum(shard["pictures"] for shard in index["shards"])


def _index(task: Task) -> dict[str, Any] | None:
    """Returns the index of a finished split, None if it is missing or damaged, and so must be written."""
    try:
        index = read_index(task.folder)
    except UserError:
        return None
    return index if index and len(index["shards"]) == task.shards else None


def _has_empty(path: Path) -> bool:
    """Returns whether the rows of the empty caption exist and can be read."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as empty:
            return all(empty[name] is not None for name in empty)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False


def _write_shard(task: Task, number: int) -> None:
    first = number * task.shard_size
    examples: list[dict[str, Any]] = []
    embeddings, thumbnails = [], []
    for batch in _usable(task, first, min(first + task.shard_size, len(task.source))):
        images = np.stack([one.pop("image") for one in batch])
        embeddings.append(task.embedder.images(images))
        thumbnails += [thumbnail(image) for image in images]
        examples += batch
    embeddings = embeddings or [np.zeros((0, task.about["contract"]["dim"]), np.float32)]  # no usable image
    captions = [caption for example in examples for caption in example["captions"]]
    starts = np.cumsum([0, *(len(example["captions"]) for example in examples)], dtype=np.int64)
    arrays = {
        NAMES: np.array([name_digest(name_of(example["key"])) for example in examples], np.uint64),
        CAPTION_DIGESTS: np.array([caption_digest(example["captions"]) for example in examples], np.uint64),
        THUMBNAILS: np.array(thumbnails, np.uint8).reshape(len(thumbnails), 8, 8, 3),
        "captions": starts,
        "image_emb": np.concatenate(embeddings),
        **_embed_captions(task, captions),
    }
    for name in {"image_emb", "text_emb", STATES} & arrays.keys():
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} of {task.source} is not finite: train the CLIP first, or use another one")
    lines = [
        {"key": example["key"], "captions": example["captions"], "fixed": example["captions"].index(example["caption"])}
        for example in examples
    ]
    with lock.unfinished(task.folder, f".{number:05d}.") as folder:
        for name, array in arrays.items():
            write_array(folder / f"{name}.npy", array)
        write_atomically(folder / CAPTIONS, "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines))
        os.replace(folder, shard_folder(task.folder, number))


def _usable(task: Task, first: int, last: int) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of the examples of a range, without the substitutes of records that cannot be used."""
    source = task.source.select(["image", *DESCRIPTIVE])
    for batch in _read_ahead(source, range(first, last), task.embedder.batch_size):
        usable = [one for one in batch if not one["substitute"]]
        if usable:
            yield usable


def _read_ahead(source: Source, indices: range, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of examples, read by threads while the previous batches are embedded."""
    ahead: deque = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(indices.start, indices.stop, batch_size):
            batch = range(start, min(start + batch_size, indices.stop))
            ahead.append([pool.submit(example, source, index) for index in batch])
            if len(ahead) > _BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]


def _embed_captions(task: Task, captions: list[str]) -> dict[str, np.ndarray]:
    """Returns tokens, mask, text embeddings and, if requested, text states of captions."""
    tokens, mask = task.tokenizer.encode(captions or [""], task.context_length)
    columns: dict[str, list[np.ndarray]] = {"text_emb": [], STATES: []}
    size = task.embedder.batch_size
    for start in range(0, len(tokens), size):
        rows = task.embedder.captions(tokens[start : start + size], mask[start : start + size])
        columns["text_emb"].append(rows["text_emb"])
        if task.states:
            with np.errstate(over="ignore"):  # _write_shard checks that all are finite
                columns[STATES].append(rows[STATES].astype(np.float16))
    arrays = {"tokens": tokens, "mask": mask, **{name: np.concatenate(rows) for name, rows in columns.items() if rows}}
    return {name: array[: len(captions)] for name, array in arrays.items()}


def _write_empty(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **rows)
    write_atomically(path, content.getvalue())


def _measured(shard: Path) -> dict[str, Any]:
    """Returns the entry of a shard in the index. DataError if one of its files is damaged."""
    starts = open_shard(shard, sorted({"captions"} | {path.stem for path in shard.glob("*.npy")}))["captions"]
    sizes = {path.name: path.stat().st_size for path in sorted(shard.iterdir())}
    lines = 0
    if CAPTIONS in sizes:
        with open(shard / CAPTIONS, "rb") as file:
            lines = sum(1 for _ in file)
    if lines != len(starts) - 1:
        raise damaged(shard, f"{CAPTIONS} has {lines} lines instead of {len(starts) - 1}")
    return {"pictures": len(starts) - 1, "captions": int(starts[-1]), "bytes": sizes}
