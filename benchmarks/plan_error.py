"""How far the memory that `dalle2 plan` predicts is from that of a real run, and the time on an accelerator.

    python benchmarks/plan_error.py --config configs/shapes.py:decoder --batch_size 256 --devices 2

On CPU devices the run is a process of its own with so many forced devices. What it holds is its resident memory at the
peak of its steps, less that before the state existed; all devices are in one process, so the prediction is that of one
device times their number. On GPUs it is what the allocator reports for one device.
"""

import json
import os
import pathlib
import resource
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
from common import PACKAGE, build_with_clip, emit, frozen_for, median_seconds, random_batch, result

from dalle2_jax import rng
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment, experiment
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.planning import planner
from dalle2_jax.planning.chips import chip_of_kind
from dalle2_jax.planning.program import batch_columns
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch, tree_shardings, with_shardings
from dalle2_jax.training.step import abstract_state, init_state, make_train_step, state_shardings


def run(spec: str, overrides: list[str], steps: int) -> dict:
    """Runs train steps on the devices of this process, and returns their memory and seconds."""
    config, stage = build_with_clip(spec, overrides)
    mesh, optim, key = make_mesh(MeshConfig(data=1, fsdp=-1)), OptimConfig(**config["optim"]), rng.root(0)
    optimizer = make_optimizer(optim, 1_000_000, stage.training_rules.decay)
    shardings = state_shardings(stage, optimizer, mesh)
    frozen = frozen_for(stage)
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    state = with_shardings(abstract_state(stage, optimizer), shardings)
    rows = random_batch(config, config["batch_size"])
    batch = shard_batch({name: rows[name] for name in batch_columns(Experiment.from_config(config), stage)}, mesh)
    # Compiled before the state exists, so that the memory of the compiler is not counted.
    step = make_train_step(stage, optimizer, optim.ema_decay, shardings, optim.accumulate)
    step = step.lower(state, frozen, key, batch).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    holder = [init_state(stage, optimizer, key, mesh)]

    def once():
        holder[0], metrics = step(holder[0], frozen, key, batch)
        return metrics

    _, seconds = median_seconds(once, steps)
    stats = jax.devices()[0].memory_stats()
    if stats:
        return {"bytes": stats["peak_bytes_in_use"], "seconds": seconds}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, "seconds": seconds}


def forced(spec: str, overrides: list[str], steps: int, devices: int) -> dict:
    """Runs train steps in a process with so many CPU devices."""
    environment = {**os.environ, **PACKAGE, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    words = [sys.executable, __file__, "--config", spec, "--steps", str(steps), "--run"]
    words += [part for change in overrides for part in ("--set", change)]
    return result(words, environment)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/plan_error.py --config configs/shapes.py:decoder --batch_size 256 --devices 2"
    parser = args.make_parser("python benchmarks/plan_error.py", "Compares plans with runs.", example)
    parser.add_argument("--config", required=True, help="FILE:STAGE")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field")
    parser.add_argument("--batch_size", type=args.positive_int, help="of all devices (default: the config's)")
    parser.add_argument("--devices", type=args.positive_int, default=1, help="CPU devices (default %(default)s)")
    parser.add_argument("--steps", type=args.positive_int, default=3, help="steps (default %(default)s)")
    parser.add_argument("--run", action="store_true", help="run on the devices of this process, and predict nothing")
    options = parser.parse_args()
    changes = [*options.set, *([f"batch_size={options.batch_size}"] if options.batch_size else [])]
    if options.run:
        print(json.dumps(run(options.config, changes, options.steps)))
        return
    chip = chip_of_kind(jax.devices()[0].device_kind)
    if chip is None and jax.default_backend() != "cpu":
        raise UsageError(f"there are no figures for {jax.devices()[0].device_kind}")
    count = jax.device_count() if chip else options.devices
    topology = f"{chip.name}:1x{count}" if chip else f"cpu:{count}"
    values = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
    planned = experiment(options.config, **values)
    clip = planner.page_clip(options.config) if "clip" in planned.requires else None
    plan = planner.plan(planned, topology, clip=clip, mesh={"fsdp": -1})
    found = (
        run(options.config, changes, options.steps) if chip else forced(options.config, changes, options.steps, count)
    )
    if found["bytes"] <= 0:
        raise UserError("the process did not need more memory for the steps than before: give a larger --batch_size")
    predicted = plan.memory.peak * (1 if chip else count)
    emit(
        benchmark="plan_error",
        config=options.config,
        overrides=changes,
        topology=topology,
        predicted_bytes=predicted,
        measured_bytes=found["bytes"],
        memory_error=predicted / found["bytes"] - 1,
        overlapped_seconds=plan.time and plan.time.overlapped,
        serial_seconds=plan.time and plan.time.serial,
        measured_seconds=found["seconds"],
    )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
