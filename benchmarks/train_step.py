"""Times the train step of any config: steps/s, examples/s, model FLOPs, utilisation, as JSON lines.

python benchmarks/train_step.py --config configs/shapes.py:decoder [--set model.unet.channels=64 ...]
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
from common import (
    build_with_clip,
    count_flops,
    emit,
    frozen_for,
    matmul_rate,
    median_seconds,
    peak_bytes,
    random_batch,
)

from dalle2_jax import rng
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.planning.chips import chip_of_kind
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch
from dalle2_jax.training.step import (
    init_state,
    make_train_step,
    parameter_count,
    state_shardings,
)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/train_step.py --config configs/shapes.py:clip --config configs/shapes.py:decoder"
    parser = args.make_parser("python benchmarks/train_step.py", "Times train steps.", example)
    parser.add_argument("--config", action="append", required=True, help="FILE:STAGE; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default %(default)s)")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which parameters are sharded")
    options = parser.parse_args()
    for spec in options.config:
        measure(spec, options)


def measure(spec: str, options) -> None:
    """Times one config and prints its line."""
    config, stage = build_with_clip(spec, options.set)
    mesh = make_mesh(MeshConfig(fsdp=options.fsdp))
    optimizer = make_optimizer(OptimConfig(), 1_000_000)
    shardings = state_shardings(stage, optimizer, mesh)
    step, key = make_train_step(stage, optimizer, 0.999, shardings), rng.root(0)
    batch = shard_batch(random_batch(config, config["batch_size"]), mesh)
    frozen = frozen_for(stage)
    holder = [init_state(stage, optimizer, key, mesh)]
    flops = count_flops(lambda *args: step(*args), holder[0], frozen, key, batch)

    def run():
        holder[0], metrics = step(holder[0], frozen, key, batch)
        return metrics

    first, seconds = median_seconds(run, options.steps)
    chip = chip_of_kind(jax.devices()[0].device_kind)
    dtype = str(next(iter(jax.tree.leaves(holder[0].params))).dtype)
    compute = config["model"].get("dtype") or config["model"].get("unet", {}).get("dtype") or dtype
    emit(
        benchmark="train_step",
        config=spec,
        overrides=options.set,
        parameters=parameter_count(stage),
        batch_size=config["batch_size"],
        steps_per_second=1 / seconds,
        examples_per_second=config["batch_size"] / seconds,
        first_step_seconds=first,
        model_flops_per_step=flops,
        utilisation=flops / seconds / (matmul_rate(compute) * jax.device_count()),
        datasheet_utilisation=chip and flops / seconds / (chip.flops * jax.device_count()),
        peak_bytes=peak_bytes(),
    )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
