"""Times sampling of any diffusion stage: samples/s, FLOPs and their share of the machine's, as JSON lines.

python benchmarks/sample.py --config configs/shapes.py:decoder --batch_size 16
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import jax.numpy as jnp
from common import (
    build_with_clip,
    count_flops,
    emit,
    frozen_for,
    matmul_rate,
    median_seconds,
    random_batch,
)

from dalle2_jax import rng
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.errors import UsageError
from dalle2_jax.stages import DiffusionStage, UpsamplerStage


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/sample.py --config configs/shapes.py:prior --config configs/shapes.py:decoder"
    parser = args.make_parser("python benchmarks/sample.py", "Times sampling.", example)
    parser.add_argument("--config", action="append", required=True, help="FILE:STAGE; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value for a field")
    parser.add_argument("--batch_size", type=int, default=16, help="samples at a time (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default %(default)s)")
    options = parser.parse_args()
    for spec in options.config:
        measure(spec, options)


def measure(spec: str, options) -> None:
    """Times one config and prints its line."""
    config, stage = build_with_clip(spec, options.set)
    if not isinstance(stage, DiffusionStage):
        raise UsageError(f"{stage.name} is no diffusion: name a prior, a decoder or an upsampler")
    # The network has random weights, so any moments will do where the sampler asks for them.
    stage = dataclasses.replace(stage, noise_statistics=NoiseStatistics((1.0,) * stage.diffusion.num_steps, 1.0))
    params = jax.jit(stage.init)(rng.root(0)).params
    batch = random_batch(config, options.batch_size)
    if isinstance(stage, UpsamplerStage):
        condition = stage.low_res_condition(jnp.zeros((options.batch_size, stage.low_size, stage.low_size, 3)))
    else:
        condition = stage.condition(stage.prepare(frozen_for(stage), batch))
    keys = rng.per_image(rng.root(0), jnp.arange(options.batch_size))
    sample = jax.jit(lambda params, keys, condition: stage.sample_x_0(params, keys, condition, stage.plan()))
    flops = count_flops(sample, params, keys, condition)
    first, seconds = median_seconds(lambda: sample(params, keys, condition), options.repeats, warm_up=1)
    compute = config["model"].get("dtype") or config["model"].get("unet", {}).get("dtype") or "float32"
    emit(
        benchmark="sample",
        config=spec,
        overrides=options.set,
        batch_size=options.batch_size,
        sampler=stage.sampling.name,
        steps=stage.sampling.steps,
        guidance={name: stage.sampling.scales[name] for name in stage.drop_rates},
        samples_per_second=options.batch_size / seconds,
        first_call_seconds=first,
        model_flops_per_sample=flops / options.batch_size,
        utilisation=flops / seconds / matmul_rate(compute),
    )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
