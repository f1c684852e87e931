"""Times how long a run waits while a checkpoint is begun, with small arrays written whole and cut for every device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/checkpoint.py --config configs/shapes.py:prior

The arrays are copied before the run goes on; the writing that follows overlaps it, and is not counted.
"""

import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
from common import build_with_clip, emit

from dalle2_jax import entry, rng, workdir
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.training.step import init_state


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/checkpoint.py --config configs/shapes.py:prior"
    parser = entry.parser("python benchmarks/checkpoint.py", "Times the start of a checkpoint.", example)
    parser.add_argument("--config", required=True, help="FILE:STAGE")
    parser.add_argument("--num", type=entry.positive, default=5, help="timed checkpoints (default %(default)s)")
    options = parser.parse_args()
    _, stage = build_with_clip(options.config, [])
    state = init_state(stage, make_optimizer(OptimConfig(), 1_000_000), rng.root(0), make_mesh(MeshConfig()))
    waits = {"cut": [], "whole": []}
    slices = {"cut": 0, "whole": workdir.LEAST_SLICE}
    for number in range(options.num + 1):
        for how, least in slices.items():
            workdir.LEAST_SLICE = least
            waited = wait(state.trees())
            if number:  # the first compiles
                waits[how].append(waited)
    seconds = {how: statistics.median(waited) for how, waited in waits.items()}
    emit(
        benchmark="checkpoint",
        config=options.config,
        arrays=len(jax.tree.leaves(state.trees())),
        cut_seconds=seconds["cut"],
        whole_seconds=seconds["whole"],
        times=seconds["cut"] / seconds["whole"],
    )


def wait(trees: dict) -> float:
    """Returns the seconds that the start of one checkpoint takes."""
    with tempfile.TemporaryDirectory() as root:
        checkpoints = workdir.Checkpoints(workdir.StageFolder(pathlib.Path(root), "stage"), 1)
        start = time.perf_counter()
        checkpoints.save(1, trees, {})
        waited = time.perf_counter() - start
        checkpoints.wait()
    return waited


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
