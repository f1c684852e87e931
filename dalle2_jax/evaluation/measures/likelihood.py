"""Measures of single stages over every step of their process: bits per dimension and noise statistics."""

from collections.abc import Sequence
from pathlib import Path

from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.evaluation import bound, examples
from dalle2_jax.evaluation.context import Context
from dalle2_jax.evaluation.figures import Figure, Figures
from dalle2_jax.evaluation.registry import MEASURES
from dalle2_jax.system import load
from dalle2_jax.workdir.folder import StageFolder

NOISE_STATISTICS = "noise_statistics.json"
"""File of a stage with the statistics of its predicted noise."""

STAGES = ("prior", "decoder", "upsampler_1", "upsampler_2")
"""The stages that are diffusions."""

BATCH_SIZE = 16
"""Examples at a time, unless the user gives another number."""


def bits_per_dim(context: Context, num: int) -> Figures:
    """Returns the bound on the negative log-likelihood of images and its parts, in bits per dimension.

    Uniform noise has 8. "total" is the sum of "prior", the divergence at the last step, and "vlb".
    """
    stage, options = stage_of(context), context.options
    source = context.open(stage, options.split or MEASURES["bits_per_dim"].split)
    examples.check_count(num, source)
    size = options.batch_size or BATCH_SIZE
    bits = bound.bits_per_dim(context.system.stages, stage, source, num, size, options.seed, options.progress)
    return {f"{stage}_{name}": Figure(bits[name], num, bits["interval"][name]) for name in ("total", "prior", "vlb")}


def noise_statistics(context: Context, num: int) -> Figures:
    """Measures the noise that a stage predicts at each step, which variance "analytic" needs, and stores it there.

    The figures are the mean over all steps of the power of the predicted noise, and the power of the data.
    """
    stage, options = stage_of(context), context.options
    source = context.open(stage, options.split or MEASURES["noise_statistics"].split)
    examples.check_count(num, source)
    size = options.batch_size or BATCH_SIZE
    statistics = bound.noise_statistics(context.system.stages, stage, source, num, options.seed, size, options.progress)
    StageFolder(context.system.path, stage).write_json(NOISE_STATISTICS, statistics)
    power = sum(statistics["eps"]) / len(statistics["eps"])
    return {f"{stage}_eps": Figure(power, num), f"{stage}_x_0": Figure(statistics["x_0"], num)}


def stage_of(context: Context) -> str:
    """Returns the stage that is measured. ConfigError if the user names none, UserError if there is none."""
    stage = context.options.stage
    if stage is None:
        raise ConfigError(f"stage is not set: name one of {', '.join(STAGES)} with --stage", "stage")
    context.stage(stage)
    return stage


def stages_needed(path: Path, stage: str | None) -> Sequence[str]:
    """Returns the stages to load for a measured stage.

    Args:
      path: the system's folder.
      stage: the stage.

    Raises:
      ConfigError: it is no diffusion.
      UserError: it is not there.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}", "stage")
    if not StageFolder(path, stage).exists():
        raise UserError(load.missing_stage(path, stage))
    return load.needed(path, stage)
