"""The other side of `data.py`: a torch DataLoader over webdataset and Pillow, in an interpreter of its own.

It needs torch, webdataset, pillow, numpy and regex, and nothing of this project but the list of CLIP's merges. For
every number that it reads, seconds, it answers with a JSON line of what it prepared in that time.
"""

import functools
import gzip
import html
import io
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

MERGES = pathlib.Path(__file__).parents[1] / "dalle2_jax" / "text" / "clip_merges.txt.gz"
SIDE, CONTEXT_LENGTH, BATCH_SIZE = 64, 77, 32
SHUFFLED = 256
"""Examples in webdataset's buffer."""

DRAINED = 8
"""Batches that may lie ready and are not counted."""

PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def measure(batches: Iterator[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Takes batches for so many seconds; returns images, seconds and CPU seconds of this process and its children."""
    time.sleep(0.5)  # whatever ran before it fills its buffers
    for _ in range(DRAINED):
        next(batches)
    start, before, images = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)["image"])
    return {"images": images, "seconds": time.perf_counter() - start, "cpu": cpu_seconds() - before}


def cpu_seconds() -> float:
    """Returns the CPU time of this process and all below it, as /proc tells."""
    times, children = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        process = int(folder.name)
        children.setdefault(int(fields[1]), []).append(process)
        times[process] = int(fields[11]) + int(fields[12])
    found, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        found += times[process]
        waiting += children.get(process, ())
    return found / os.sysconf("SC_CLK_TCK")


def tokenizer() -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Returns a function from a caption to CLIP's tokens and mask: plain Python, with a cache of words."""
    import regex

    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:]]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokens = [letters[byte] for byte in printable + others]
    tokens += [letter + "</w>" for letter in tokens] + [left + right for left, right in merges]
    ids = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    find = regex.compile(PATTERN).findall

    @functools.cache
    def word_ids(word: str) -> list[int]:
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), n) for n, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [ids[part] for part in parts]

    def encode(caption: str) -> tuple[np.ndarray, np.ndarray]:
        text = " ".join(html.unescape(html.unescape(caption)).split()).lower()
        found = [number for word in find(text) for number in word_ids(word)][: CONTEXT_LENGTH - 2]
        row, mask = np.zeros(CONTEXT_LENGTH, np.int32), np.zeros(CONTEXT_LENGTH, bool)
        row[: len(found) + 2] = ids["<|startoftext|>"], *found, ids["<|endoftext|>"]
        mask[: len(found) + 2] = True
        return row, mask

    return encode


class Prepare:
    """An example of webdataset's, bytes by suffix, to arrays; ``draft``: by Pillow's scaled decoding."""

    def __init__(self, draft: bool) -> None:
        self.draft = draft
        self.encode = None

    def __call__(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        from PIL import Image

        self.encode = self.encode or tokenizer()  # in the worker: it cannot be sent there
        image = Image.open(io.BytesIO(example["jpg"]))
        if self.draft:
            image.draft("RGB", (SIDE, SIDE))
        image = image.convert("RGB")
        scale = SIDE / min(image.size)
        width, height = (max(SIDE, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        tokens, mask = self.encode(example["txt"].decode())
        image = np.array(image.crop((left, top, left + SIDE, top + SIDE)))
        return {"image": image, "tokens": tokens, "mask": mask}


def batches(folder: str, workers: int, draft: bool) -> Iterator[dict[str, Any]]:
    """Returns endless batches of the shards of a folder."""
    import torch
    import webdataset

    torch.set_num_threads(1)
    shards = sorted(map(str, pathlib.Path(folder).glob("*.tar")))
    split = webdataset.split_by_worker
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), workersplitter=split, seed=0).repeat()
    data = data.shuffle(SHUFFLED).map(Prepare(draft))
    return iter(torch.utils.data.DataLoader(data, BATCH_SIZE, num_workers=workers))


def main() -> None:
    """Answers requests until there are no more: ``data_peer.py FOLDER WORKERS DRAFT``."""
    folder, workers, draft = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
    stream = batches(folder, workers, draft)
    caption = sys.stdin.readline()
    print(json.dumps(tokenizer()(caption)[0].tolist()), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(stream, float(line))), flush=True)


if __name__ == "__main__":
    main()
