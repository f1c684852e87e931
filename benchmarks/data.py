"""Measures the input stream: tar shards of images with captions, against PyTorch, and stored embeddings, against CLIP.

    python benchmarks/data.py --peer path/to/python
    python benchmarks/data.py --embeddings --system runs/demo

JPEGs of 512 pixels, scikit-learn's photographs cut, enlarged and noised, become crops of 64 with CLIP's tokens. The
peer, an interpreter with torch, webdataset, pillow and regex, runs `data_peer.py`. The two take turns, each with one
worker process; a core's rate is images over the CPU time of all of a side's processes.
"""

import functools
import io
import json
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import cv2
import data_peer
import numpy as np
from common import emit
from data_peer import BATCH_SIZE, CONTEXT_LENGTH, SIDE, measure
from PIL import Image
from sklearn.datasets import load_sample_image

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.data import (
    EmbeddingSource,
    ImageSource,
    ShapesSource,
    WebdatasetRecords,
    make_stream,
    prepare,
)
from dalle2_jax.data.embeddings.write import Task, write_split
from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.source import decoded
from dalle2_jax.errors import UserError
from dalle2_jax.system import ClipEmbedder, load
from dalle2_jax.text import clip_tokenizer
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh

SHARDS, RECORDS, IMAGES, STORED = 4, 512, 256, 512
"""How many shards, records in each, different images among them, and their side."""

WORDS = (
    "a photograph of the red flower temple behind garden lake with many people under bright morning light near old "
    "wooden gate and tall green trees on warm summer day in china seen from far away through thin mist"
).split()
EMBEDDED, CLIP_BATCH = 50_000, 64
"""Images embedded, and the batch of either stream of the prior."""


def write_shards(folder: pathlib.Path) -> None:
    """Writes the shards: photographs of quality 90, with captions of 8 to 20 words."""
    rng, jpegs = np.random.default_rng(0), []
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    for number in range(IMAGES):
        cut = decoding.crop(photographs[number % 2], int(rng.integers(200, 427)), rng)
        large = cv2.resize(cut, (STORED, STORED), interpolation=cv2.INTER_CUBIC)
        noised = np.clip(large + rng.normal(0, 4, large.shape), 0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noised).save(content, "JPEG", quality=90)
        jpegs.append(content.getvalue())
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for number in range(RECORDS):
                caption = " ".join(rng.choice(WORDS, rng.integers(8, 21)))
                for suffix, member in (("jpg", jpegs[number % IMAGES]), ("txt", caption.encode())):
                    header = tarfile.TarInfo(f"{shard:06d}{number:03d}.{suffix}")
                    header.size = len(member)
                    tar.addfile(header, io.BytesIO(member))


class Peer:
    """`data_peer.py` in another interpreter."""

    def __init__(self, python: str, *words: object) -> None:
        command = [python, data_peer.__file__, *map(str, words)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"--peer {python} cannot be run ({error.strerror})") from None

    def ask(self, line: object) -> object:
        """Returns its answer to a line. UserError when it has ended."""
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError("the peer process failed: see its output above")
        return json.loads(answer)


def take_turns(sides: dict[str, Callable[[float], dict]], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Measures sides in turn; returns each one's median images per CPU second and per second."""
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side(seconds))
    return {
        name: {
            per: statistics.median(round_["images"] / round_[per] for round_ in rounds_) for per in ("cpu", "seconds")
        }
        for name, rounds_ in found.items()
    }


def compare_images(python: str, rounds: int, seconds: float) -> None:
    """Prints the rates of our stream and the peer's, without and with Pillow's scaled decoding, and our profile."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder))
        peers = {"pillow": Peer(python, folder, 1, False), "pillow_draft": Peer(python, folder, 1, True)}
        tokenizer = clip_tokenizer()
        source = ImageSource(WebdatasetRecords(folder), SIDE)
        caption = " ".join(WORDS)
        for peer in peers.values():
            if peer.ask(caption) != tokenizer.encode([caption], CONTEXT_LENGTH)[0][0].tolist():
                raise UserError("the peer's tokens are not ours")
        stream = make_stream(prepare(source, tokenizer, CONTEXT_LENGTH), BATCH_SIZE, 0, num_workers=1)
        sides = {"ours": functools.partial(measure, stream)} | {name: peer.ask for name, peer in peers.items()}
        rates = take_turns(sides, rounds, seconds)
        stream.close()
        for peer in peers.values():
            peer.process.stdin.close()
            peer.process.wait()
        for name, rate in rates.items():
            emit(
                benchmark="data",
                side=name,
                images_per_cpu_second=rate["cpu"],
                images_per_second=rate["seconds"],
                ours_over_it=rates["ours"]["cpu"] / rate["cpu"],
                ours_over_it_by_the_clock=rates["ours"]["seconds"] / rate["seconds"],
            )
        whole = 1 / rates["ours"]["cpu"]
        parts = profile(source)
        shares = {name: cost / whole for name, cost in parts.items()}
        emit(benchmark="data", profile={**shares, "rest": 1 - sum(shares.values())}, microseconds=1e6 * whole)


def profile(source: ImageSource) -> dict[str, float]:
    """Returns the CPU seconds an image of the parts of the work, each done alone over 256 records."""
    tokenizer, indices = clip_tokenizer(), np.random.default_rng(0).permutation(len(source))[:256]
    records, read = _timed(source.records.read, indices.tolist())
    images, decode = _timed(lambda record: decoded(record.image, SIDE)[0], records)
    fitted, resize = _timed(lambda image: decoding.crop(decoding.fit(image, SIDE), SIDE), images)
    _, tokenize = _timed(lambda record: tokenizer.encode(record.captions[:1], CONTEXT_LENGTH), records)
    _, stack = _timed(lambda start: np.stack(fitted[start : start + BATCH_SIZE]), range(0, 256, BATCH_SIZE))
    return {"read": read, "decode": decode, "resize": resize, "tokenize": tokenize, "stack": stack / BATCH_SIZE}


def _timed(action: Callable, things: list | range) -> tuple[list, float]:
    for thing in things[:BATCH_SIZE]:
        action(thing)
    start = time.process_time()
    results = [action(thing) for thing in things]
    return results, (time.process_time() - start) / len(things)


def compare_embeddings(system: pathlib.Path, rounds: int, seconds: float) -> None:
    """Prints examples/s of a prior's batches from embeddings, and from images and captions embedded as they come."""
    mesh = make_mesh(MeshConfig())
    clip = load.load_system(system, mesh, ("clip",))["clip"]
    if clip.tokenizer is None:
        raise UserError(f"the clip of {system} was imported without a tokenizer: it cannot read captions")
    embedder = ClipEmbedder(clip, batch_sharding(mesh), CLIP_BATCH)
    source = ShapesSource("train", clip.stage.model.tower.image_size, num_examples=EMBEDDED)
    text = clip.tokenizer, clip.context_length

    def embedding() -> Iterator[dict]:
        for batch in make_stream(prepare(source, *text), CLIP_BATCH, 0):
            embeddings = embedder.captions(batch["tokens"], batch["mask"])
            embedder.images(batch["image"])
            yield {"image": batch["image"], **embeddings}

    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "embeddings"
        load.write_description(system, out)
        write_split(Task(source, "train", embedder, *text, out))
        columns = ("image_emb", "text_emb", "tokens", "mask")
        stored = make_stream(prepare(EmbeddingSource(out), *text).select(columns), CLIP_BATCH, 0)
        streams = {
            "embeddings": ({"image": batch["image_emb"]} for batch in stored),
            "embedding": embedding(),
        }
        sides = {name: functools.partial(measure, stream) for name, stream in streams.items()}
        rates = take_turns(sides, rounds, seconds)
        stored.close()
    for name, rate in rates.items():
        emit(
            benchmark="data",
            side=name,
            examples_per_cpu_second=rate["cpu"],
            examples_per_second=rate["seconds"],
            embeddings_over_it=rates["embeddings"]["cpu"] / rate["cpu"],
            embeddings_over_it_by_the_clock=rates["embeddings"]["seconds"] / rate["seconds"],
        )


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/data.py --peer path/to/python"
    parser = args.make_parser("python benchmarks/data.py", "Measures the input stream.", example)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--peer", help="an interpreter with torch, webdataset, pillow and regex: compare with it")
    wanted.add_argument("--embeddings", action="store_true", help="compare embeddings with embedding")
    parser.add_argument("--system", type=pathlib.Path, default="runs/demo", help="whose clip embeds")
    parser.add_argument("--rounds", type=args.positive_int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--seconds", type=args.finite_float, default=3.0, help="of a turn (default %(default)s)")
    options = parser.parse_args()
    if options.embeddings:
        compare_embeddings(options.system, options.rounds, options.seconds)
    else:
        compare_images(options.peer, options.rounds, options.seconds)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
