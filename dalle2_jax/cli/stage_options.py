"""Options --STAGE.OPTION of the command line: the sampling config of each stage."""

import argparse
from collections.abc import Sequence
from typing import Any

from dalle2_jax.cli import args
from dalle2_jax.errors import ConfigError, UsageError

STAGES = ("prior", "decoder", "upsampler_1", "upsampler_2")
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")

DIFFUSION_OPTIONS = {
    "sampler": ("name", str),
    "steps": ("steps", str),
    "eta": ("eta", float),
    "variance": ("variance", str),
    "clip_sample": ("clip_sample", float),
    "clip": ("clip_sample", float),  # its name in earlier versions
    "threshold": ("threshold", str),
    "quantile": ("quantile", float),
    "temperature": ("temperature", float),
    "guidance": ("guidance", float),
    "image_guidance": ("image_guidance", float),
    "text_guidance": ("text_guidance", float),
    "guidance_schedule": ("guidance_schedule", str),
    "guidance_interval": ("guidance_interval", args.interval),
    "guidance_rescale": ("guidance_rescale", float),
    "guidance_order": ("guidance_order", str),
}
"""Option of a diffusion stage -> the field of ``SamplingConfig``, and how its value is read."""

AR_OPTIONS = {
    "dot_quantile": ("dot_quantile", float),
    "guidance": ("guidance", float),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
}
"""Option of the autoregressive prior -> the field of ``ArSamplingConfig``, and how its value is read."""

OPTIONS = {**dict.fromkeys(STAGES, DIFFUSION_OPTIONS), "ar_prior": AR_OPTIONS}
"""Stage -> its options, given as --STAGE.OPTION."""


def add_stage_options(command: argparse.ArgumentParser) -> None:
    """Adds --STAGE.OPTION for every stage, which `stage_settings` reads."""
    for stage, stage_options in OPTIONS.items():
        for option, (_, read) in stage_options.items():
            command.add_argument(f"--{stage}.{option}", type=read, metavar=option.upper(), help=argparse.SUPPRESS)
    command.add_argument_group(
        "sampling of each stage",
        f"--STAGE.OPTION, with STAGE one of {', '.join(STAGES)} and OPTION one of sampler ({', '.join(SAMPLERS)}), "
        f"{', '.join(list(DIFFUSION_OPTIONS)[1:])} (explained in docs/diffusion.md); --ar_prior.guidance, "
        "--ar_prior.temperature, --ar_prior.top_k, --ar_prior.top_p and --ar_prior.dot_quantile (0.5 samples the dot "
        "product with the caption from the upper half of the training pairs'). The defaults are those of the config",
    )


def stage_settings(options: argparse.Namespace, loaded: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of each stage that the command line gives, by argument of `System`'s methods.

    Raises:
      UsageError: options of a stage that is not used.
    """
    settings: dict[str, dict[str, Any]] = {}
    for stage, stage_options in OPTIONS.items():
        values = [(field, getattr(options, f"{stage}.{name}")) for name, (field, _) in stage_options.items()]
        given = {field: value for field, value in values if value is not None}
        if given and stage not in loaded:
            raise UsageError(f"--{stage}.* is given but no stage {stage} is used here")
        if given:
            settings["prior" if stage == "ar_prior" else stage] = given
    return settings


def as_option(error: ConfigError) -> str:
    """Returns the message of an error about a stage's setting, with the option's name in place of the field's."""
    stage, _, field = error.field.partition(".")
    message = str(error)
    if stage not in OPTIONS:
        return message
    names = {field: option for option, (field, _) in reversed(OPTIONS[stage].items())}
    if field and message.startswith(error.field):
        return f"--{stage}.{names.get(field, field)}{message.removeprefix(error.field)}"
    return f"--{stage}.*: {message.removeprefix(f'{stage}: ')}"
