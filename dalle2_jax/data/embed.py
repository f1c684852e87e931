"""Writes the embeddings of a source, shard by shard: `dalle2_jax.data.embeddings` says what lies where.

A shard covers a fixed range of the source's pictures and appears when it is complete, so a run that was killed goes on
with the first that is missing, and what it writes does not depend on where it was killed, nor on how many hosts share
the shards.
"""

import io
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from tqdm import tqdm

from dalle2_jax.data.embeddings import (
    CAPTIONS,
    EMPTY,
    INDEX,
    LOOKS,
    NAMES,
    SAID,
    SPLIT,
    STATES,
    damaged,
    digest,
    digest_of,
    look,
    map_array,
    read_contract,
    shard_folder,
)
from dalle2_jax.data.records import name_of
from dalle2_jax.data.sources import Source
from dalle2_jax.files import write_array, write_atomically
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import UserError

SHARD_SIZE = 10_000
"""Pictures a shard."""

_BATCHES_AHEAD, _THREADS = 2, 4


class Embedder(Protocol):
    """What embeds: a CLIP on the devices, which the caller has loaded."""

    batch_size: int

    def images(self, pictures: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B E"]:
        """Embeds at most ``batch_size`` pictures, in the contract's space."""

    def captions(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns text_emb and text_seq of at most ``batch_size`` captions."""

    def empty(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns the empty caption's null_text_emb, null_text_seq and null_mask, one row each, given any captions."""


@dataclass(frozen=True)
class Task:
    """What is embedded, by whom, and where to.

    Attributes:
        source: of pictures.
        split: the name it gets.
        out: the folder; its ``clip`` must be there.
        states: whether text_seq is kept.
        shard_size: pictures a shard, at most.
        host: the number of this host, of ``hosts`` that share the work, each with its own devices.
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

    @property
    def folder(self) -> Path:
        return self.out / self.split

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.shard_size)

    @property
    def about(self) -> dict[str, Any]:
        """What split.json says, and must be the same of a run that goes on."""
        return {
            "source": repr(self.source),
            "pictures": len(self.source),
            "shard_size": self.shard_size,
            "context_length": self.context_length,
            STATES: self.states,
            "contract": read_contract(self.out),
        }


def claim(task: Task) -> None:
    """Writes what all hosts agree on, or checks it; clears what a killed run left.

    Where several hosts share the work, the first does it, before any calls `write_split`.

    Raises:
        UserError: the folder holds embeddings of something else.
    """
    path = task.folder / SPLIT
    about = json.loads(json.dumps(task.about))
    if path.is_file():
        stored = json.loads(path.read_text("utf-8"))
        differing = [f"{key} {stored.get(key)!r}, now {about[key]!r}" for key in about if stored.get(key) != about[key]]
        if differing:
            raise UserError(f"{task.folder} holds other embeddings ({'; '.join(differing)}): use another --out")
    else:
        write_atomically(path, json.dumps(about, indent=2) + "\n")
    for left in task.folder.glob(".[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)
    if not (task.out / EMPTY).is_file():
        empty = task.embedder.empty(*task.tokenizer.encode([""], task.context_length))
        _write_empty(task.out / EMPTY, empty)


def write_split(task: Task) -> int | None:
    """Embeds a split, or what is missing of this host's share of it.

    Pictures that the source refuses are left out. All captions of a picture are kept.

    Returns:
        How many pictures the split has, None while other hosts are still at work: the last to end completes it.

    Raises:
        UserError: the folder holds embeddings of something else, or the source cannot be read.
    """
    if task.hosts == 1:
        claim(task)
    numbers = range(task.host, task.shards, task.hosts)
    sizes = [min(task.shard_size, len(task.source) - number * task.shard_size) for number in numbers]
    with tqdm(total=sum(sizes), desc=f"embedding {task.split}", unit="picture") as bar:
        for number, size in zip(numbers, sizes, strict=True):
            if not shard_folder(task.folder, number).is_dir():
                (task.folder / INDEX).unlink(missing_ok=True)
                _write_shard(task, number)
            bar.update(size)
    if not (task.folder / INDEX).is_file():
        shards = [shard_folder(task.folder, number) for number in range(task.shards)]
        if not all(shard.is_dir() for shard in shards):
            return None
        write_atomically(task.folder / INDEX, json.dumps({"shards": [*map(_measured, shards)]}) + "\n")
    return sum(shard["pictures"] for shard in json.loads((task.folder / INDEX).read_text())["shards"])


def _write_shard(task: Task, number: int) -> None:
    first = number * task.shard_size
    examples, embeddings, looks = [], [], []
    for pictures in _good(task, first, min(first + task.shard_size, len(task.source))):
        images = np.stack([picture.pop("image") for picture in pictures])
        embeddings.append(task.embedder.images(images))
        looks += [look(image) for image in images]
        examples += pictures
    embeddings = embeddings or [np.zeros((0, task.about["contract"]["dim"]), np.float32)]  # not one can be used
    captions = [caption for example in examples for caption in example["captions"]]
    starts = np.cumsum([0, *(len(example["captions"]) for example in examples)], dtype=np.int64)
    names = np.array([digest(name_of(example["key"])) for example in examples], np.uint64)
    said = np.array([digest_of(example["captions"]) for example in examples], np.uint64)
    seen = np.array(looks, np.uint8).reshape(len(looks), 8, 8, 3)
    arrays = {NAMES: names, SAID: said, LOOKS: seen, "captions": starts, "image_emb": np.concatenate(embeddings)}
    arrays |= _read_captions(task, captions)
    for name in {"image_emb", "text_emb", STATES} & arrays.keys():
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} of {task.source} is not finite: is this CLIP trained?")
    lines = [
        {"key": example["key"], "captions": example["captions"], "fixed": example["captions"].index(example["caption"])}
        for example in examples
    ]
    temporary = Path(tempfile.mkdtemp(prefix=f".{number:05d}.", dir=task.folder))
    try:
        for name, array in arrays.items():
            write_array(temporary / f"{name}.npy", array)
        write_atomically(temporary / CAPTIONS, "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines))
        temporary.chmod(0o755)
        os.replace(temporary, shard_folder(task.folder, number))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _good(task: Task, first: int, last: int) -> Iterator[list[dict]]:
    """Yields batches of the examples of a range, with their keys.

    In place of a picture that cannot be used a source gives another, and says so: those are left out.
    """
    for batch in _read_ahead(task.source, range(first, last), task.embedder.batch_size):
        good = [
            {**example, "key": example.get("key", str(index))}
            for index, example in batch
            if not example.get("stands_in")
        ]
        if good:
            yield good


def _read_ahead(source: Source, indices: range, batch_size: int) -> Iterator[list[tuple[int, dict]]]:
    """Yields batches of (index, example), read by threads while those before are embedded."""
    ahead: deque = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(indices.start, indices.stop, batch_size):
            batch = range(start, min(start + batch_size, indices.stop))
            ahead.append((batch, [pool.submit(source.__getitem__, index) for index in batch]))
            if len(ahead) > _BATCHES_AHEAD:
                yield _results(*ahead.popleft())
        while ahead:
            yield _results(*ahead.popleft())


def _results(batch: range, futures: list) -> list[tuple[int, dict]]:
    return [(index, future.result()) for index, future in zip(batch, futures, strict=True)]


def _read_captions(task: Task, captions: list[str]) -> dict[str, np.ndarray]:
    """Returns tokens and mask of captions, and what CLIP says of them."""
    tokens, mask = task.tokenizer.encode(captions or [""], task.context_length)
    said: dict[str, list[np.ndarray]] = {"text_emb": [], STATES: []}
    size = task.embedder.batch_size
    for start in range(0, len(tokens), size):
        rows = task.embedder.captions(tokens[start : start + size], mask[start : start + size])
        said["text_emb"].append(rows["text_emb"])
        if task.states:
            with np.errstate(over="ignore"):  # what is not finite then is not written
                said[STATES].append(rows[STATES].astype(np.float16))
    arrays = {"tokens": tokens, "mask": mask, **{name: np.concatenate(rows) for name, rows in said.items() if rows}}
    return {name: array[: len(captions)] for name, array in arrays.items()}


def _write_empty(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **rows)
    write_atomically(path, content.getvalue())


def _measured(shard: Path) -> dict[str, Any]:
    """What the index says of a shard that is there."""
    try:
        starts = map_array(shard / "captions.npy")
        sizes = {path.name: path.stat().st_size for path in sorted(shard.iterdir())}
        return {"pictures": len(starts) - 1, "captions": int(starts[-1]), "bytes": sizes}
    except (OSError, ValueError, IndexError) as error:
        raise damaged(shard, error) from None
