"""Times checkpoints.

How long a run waits while a checkpoint is started, with small arrays written whole and cut for every device. The arrays
are copied before the run goes on; the writing that follows overlaps it, and is not counted:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/checkpoint.py --config configs/shapes.py:prior

What digests cost: saving a checkpoint until it is on disk and restoring it, with and without them, by turns. Of a
stage's whole training state, or of arrays of that many gigabytes as an import writes them, not compressed:

    python benchmarks/checkpoint.py --config configs/shapes.py:decoder --digests
    python benchmarks/checkpoint.py --gigabytes 4 --digests
"""

import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import numpy as np
from common import build_with_clip, emit

from dalle2_jax import rng
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.training.step import init_state
from dalle2_jax.workdir import digests, orbax_io
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/checkpoint.py --config configs/shapes.py:prior"
    parser = args.make_parser("python benchmarks/checkpoint.py", "Times the start of a checkpoint.", example)
    parser.add_argument("--config", help="FILE:STAGE")
    parser.add_argument("--gigabytes", type=float, help="size of arrays in place of a stage's, for --digests")
    parser.add_argument("--digests", action="store_true", help="measure what digests cost")
    parser.add_argument("--num", type=args.positive_int, default=5, help="timed checkpoints (default %(default)s)")
    options = parser.parse_args()
    if (options.config is None) == (options.gigabytes is None) or (options.gigabytes and not options.digests):
        raise UsageError("give either --config, or --gigabytes with --digests")
    if options.gigabytes:
        time_digests(options, arrays(options.gigabytes), lean=True)
        return
    _, stage = build_with_clip(options.config, [])
    state = init_state(stage, make_optimizer(OptimConfig(), 1_000_000), rng.root(0), make_mesh(MeshConfig()))
    if options.digests:
        time_digests(options, state.trees(), lean=False)
    else:
        time_starts(options, state.trees())


def time_starts(options, trees: dict) -> None:
    """Prints how long a run waits for the start of a checkpoint."""
    waits = {"cut": [], "whole": []}
    slices = {"cut": 0, "whole": orbax_io.LEAST_SLICE}
    for number in range(options.num + 1):
        for how, least in slices.items():
            orbax_io.LEAST_SLICE = least
            waited = wait(trees)
            if number:  # the first compiles
                waits[how].append(waited)
    seconds = {how: statistics.median(waited) for how, waited in waits.items()}
    emit(
        benchmark="checkpoint",
        config=options.config,
        arrays=len(jax.tree.leaves(trees)),
        cut_seconds=seconds["cut"],
        whole_seconds=seconds["whole"],
        times=seconds["cut"] / seconds["whole"],
    )


def arrays(gigabytes: float) -> dict:
    """Returns random float32 arrays of 64 MiB, together of that size."""
    noise = np.random.default_rng(0)
    count = max(1, round(gigabytes * 1e9 / 2**26))
    return {"ema": {f"w{number}": noise.standard_normal((4096, 4096), np.float32) for number in range(count)}}


def time_digests(options, trees: dict, lean: bool) -> None:
    """Prints the time and the CPU time of saving and of restoring, with and without digests."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shape(leaf: np.ndarray | jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", sharding))

    abstract = jax.tree.map(shape, {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)})
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.num + 1):
            for how in ("with", "without")[:: 1 if number % 2 else -1]:
                folder = StageFolder(pathlib.Path(root), how)
                times = timed_digests(folder, trees, abstract, lean, how == "with")
                for what, seconds in times.items() if number else ():  # the first round warms up
                    figures.setdefault(f"{what}_{how}", []).append(seconds)
    result: dict[str, object] = {"gigabytes": round(size / 1e9, 3), "arrays": len(jax.tree.leaves(trees))}
    for kind, place in (("seconds", 0), ("cpu_seconds", 1)):
        medians = {name: statistics.median(times[place] for times in all_) for name, all_ in figures.items()}
        for what in ("save", "restore"):
            paired = zip(figures[f"{what}_with"], figures[f"{what}_without"], strict=True)
            result |= {f"{name}_{kind}": round(medians[name], 3) for name in (f"{what}_with", f"{what}_without")}
            result[f"{what}_{kind}_ratio"] = round(statistics.median(a[place] / b[place] for a, b in paired), 3)
    emit(benchmark="checkpoint digests", config=options.config, **result)


def timed_digests(
    folder: StageFolder, trees: dict, abstract: dict, lean: bool, verify: bool
) -> dict[str, tuple[float, float]]:
    """Saves and restores once; returns the seconds and the CPU seconds of either."""
    writer = Checkpoints(folder, 1)
    written = contextlib.nullcontext() if verify else mock.patch.object(digests, "write")
    figures = {}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        start, start_cpu = time.perf_counter(), time.process_time()
        yield
        figures[what] = (time.perf_counter() - start, time.process_time() - start_cpu)

    with written, timed("save"):
        if lean:
            writer.save_lean(1, trees)
        else:
            writer.save(1, trees, {})
            writer.wait()
    with digests.unverified(not verify), timed("restore"):
        jax.block_until_ready(Checkpoints(folder).restore(abstract).trees)
    return figures


def wait(trees: dict) -> float:
    """Returns the seconds that the start of one checkpoint takes."""
    with tempfile.TemporaryDirectory() as root:
        checkpoints = Checkpoints(StageFolder(pathlib.Path(root), "stage"), 1)
        start = time.perf_counter()
        checkpoints.save(1, trees, {})
        waited = time.perf_counter() - start
        orbax_io.wait()
    return waited


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
