"""Options of sampling: how many images, the seed, and the settings of each stage."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import numpy as np

from dalle2_jax.config.parse import expand
from dalle2_jax.errors import ConfigError, UsageError, UserError, choose, shown
from dalle2_jax.ranges import BatchSize, Range, Seed, alternatives
from dalle2_jax.stages import ArPriorStage, ArSamplingConfig, DiffusionStage, SamplingConfig
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.inputs import check_caption
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.programs import StepCallback

MAX_IMAGES = 100_000
"""Images of one call."""

MAX_CANDIDATES = 1_000
"""Image embeddings that the prior samples for each image."""

StageSettings = Mapping[str, Any]
"""Fields of a stage's section ``sampling`` -> values, such as ``{"steps": 20, "guidance": 3.0}``."""


class SampleOptions(TypedDict, total=False):
    """Keyword arguments of every method of `System` that generates images.

    Attributes:
      num: images per caption or image.
      seed: the random seed. An image depends on the seed, its number and its inputs, not on the batch size.
      batch_size: images that are generated at a time.
      candidates: image embeddings that the prior samples for each image, of which the one closest to the caption is
        used; None is the prior's own number, 2.
      negative: a caption that guidance moves away from. It takes the place of "no caption" in every stage that is
        guided by its caption.
      prior: settings of the prior.
      decoder: settings of the decoder.
      upsampler_1: settings of the first upsampler.
      upsampler_2: settings of the second upsampler.
      out: a folder in which each image is saved as soon as it is generated, and then the grid and ``samples.json``.
      progress: whether a progress bar is shown.
      callback: called as ``callback(step, x_0)`` after each step of the decoder and of each upsampler, with the
        predicted images uint8[B, H, W, 3] of the batch; ``step`` counts from 1 in each stage. An exception that it
        raises ends the call.
    """

    num: int
    seed: int
    batch_size: int
    candidates: int | None
    negative: str
    prior: StageSettings
    decoder: StageSettings
    upsampler_1: StageSettings
    upsampler_2: StageSettings
    out: str | os.PathLike[str] | None
    progress: bool
    callback: StepCallback | None


@dataclasses.dataclass(frozen=True)
class Options:
    """`SampleOptions` with their defaults.

    Raises:
      ConfigError: a value of the wrong type or out of range.
    """

    num: int = 4
    seed: int = 0
    batch_size: int = 16
    candidates: int | None = None
    negative: str = ""
    prior: StageSettings = dataclasses.field(default_factory=dict)
    decoder: StageSettings = dataclasses.field(default_factory=dict)
    upsampler_1: StageSettings = dataclasses.field(default_factory=dict)
    upsampler_2: StageSettings = dataclasses.field(default_factory=dict)
    out: str | os.PathLike[str] | None = None
    progress: bool = False
    callback: StepCallback | None = None

    def __post_init__(self) -> None:
        check_number("num", self.num, Range(1, MAX_IMAGES))
        check_number("seed", self.seed, _range(Seed))
        check_number("batch_size", self.batch_size, _range(BatchSize))
        if self.candidates is not None:
            check_number("candidates", self.candidates, Range(1, MAX_CANDIDATES))
        check_caption(self.negative, "negative")
        for stage, settings in self.settings.items():
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{stage} must be a dict of settings, not {shown(settings)}", stage)
        if self.callback is not None and not callable(self.callback):
            raise ConfigError(f"callback must be a function of (step, x_0), not {shown(self.callback)}", "callback")

    @property
    def settings(self) -> dict[str, StageSettings]:
        """The settings by argument: "prior" stands for whichever prior the system uses."""
        return {name: getattr(self, name) for name in ("prior", "decoder", "upsampler_1", "upsampler_2")}

    def check_count(self, inputs: int) -> None:
        """Raises UsageError if ``num`` images for each of so many captions or images are more than `MAX_IMAGES`."""
        if inputs * self.num > MAX_IMAGES:
            raise UsageError(f"{inputs} inputs with num {self.num} are more than {MAX_IMAGES} images: reduce num")


def make_options(given: Mapping[str, Any], **defaults: Any) -> Options:
    """Returns the options of a call.

    Args:
      given: the keyword arguments.
      **defaults: the method's own defaults.

    Raises:
      ConfigError: an unknown name (the message offers the nearest), or a value that is not accepted.
    """
    known = {field.name: None for field in dataclasses.fields(Options)}
    for name in given:
        choose_field("option", name, known, name)
    plain: dict[str, Any] = {
        name: int(value) if isinstance(value, np.integer) else value for name, value in given.items()
    }
    return Options(**{**defaults, **plain})


def sampling_configs(
    used: Mapping[str, LoadedStage], settings: Mapping[str, StageSettings]
) -> dict[str, SamplingConfig | ArSamplingConfig]:
    """Returns the sampling config of each stage: its own, with the settings of the call.

    Args:
      used: the stages that the call uses.
      settings: argument -> settings.

    Raises:
      ConfigError: settings of a stage that is not used, an unknown setting, or a value that the stage does not accept.
    """
    by_stage = {}
    for argument, fields in settings.items():
        names = tuple(PRIORS.values()) if argument == "prior" else (argument,)
        stage = next((name for name in names if name in used), None)
        if stage is not None:
            by_stage[stage] = fields
        elif fields:
            raise ConfigError(f"{argument} has settings, but no stage {argument} is used here", argument)
    return {name: _with_settings(used[name], argument) for name, argument in by_stage.items()}


def check_negative(
    used: Mapping[str, LoadedStage], negative: str, configs: Mapping[str, SamplingConfig | ArSamplingConfig]
) -> None:
    """Raises ConfigError for a negative caption that changes nothing: no stage is guided by its caption."""
    if not negative:
        return
    stages = {name: cast(DiffusionStage, used[name].stage) for name in configs}
    if not any(stages[name].plan(cast(SamplingConfig, config)).guides_by_text for name, config in configs.items()):
        raise ConfigError(
            "negative needs guidance by the caption: set guidance or text_guidance of the decoder to another number "
            "than 1",
            "negative",
        )


def _with_settings(member: LoadedStage, settings: StageSettings) -> SamplingConfig | ArSamplingConfig:
    """Returns a stage's sampling config with other values for some fields."""
    stage = cast(DiffusionStage | ArPriorStage, member.stage)
    own = stage.sampling
    known = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    for name in settings:
        choose_field(f"setting of {stage.name}", name, known, f"{stage.name}.{name}")
    if "name" in settings:  # the config's eta and variance belong to the sampler that the config names
        settings = {"eta": 0.0, "variance": "auto", **settings}
    try:
        config: Any = expand(type(own), {**known, **settings}, stage.name) if settings else own
        stage.check_sampling(config)
    except UserError as error:
        message = str(error).removeprefix("config.")
        field = next((name for name in settings if message.startswith(f"{stage.name}.{name} ")), None)
        if not message.startswith((f"{stage.name}.", f"{stage.name}:")):
            message = f"{stage.name}: {message}"
        raise ConfigError(message, f"{stage.name}.{field}" if field else stage.name) from error
    return config


def choose_field(what: str, name: str, known: Mapping[str, Any], field: str) -> None:
    """Raises ConfigError unless ``name`` is known; the message offers the nearest name."""
    try:
        choose(what, name, known)
    except UsageError as error:
        raise ConfigError(str(error), field) from None


def check_number(name: str, value: Any, within: Range) -> None:
    """Raises ConfigError unless ``value`` is an integer of a range."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in within:
        raise ConfigError(f"{name} must be an integer {within}, got {shown(value)}", name)


def check_interval(name: str, value: Any) -> None:
    """Raises ConfigError unless ``value`` is two ascending numbers from 0 to 1."""
    numbers = value if isinstance(value, tuple | list) else ()
    for number in numbers:
        check_fraction(name, number)
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise ConfigError(f"{name} must be two ascending numbers from 0 to 1, got {shown(value)}", name)


def check_fraction(name: str, value: Any) -> None:
    """Raises ConfigError unless ``value`` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in Range(0, 1):
        raise ConfigError(f"{name} must be a number from 0 to 1, got {shown(value)}", name)


def _range(hint: Any) -> Range:
    """Returns the range of an annotated integer type."""
    [within] = [within for _, within in alternatives(hint) if within is not None]
    return within
