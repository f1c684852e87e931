"""How a stage is sampled: its configuration, and the plan that a compiled program takes.

A configuration is a frozen value that may be stored. A `SamplingPlan` is the same as a pytree: numbers that may change
without compiling again are its leaves, and all that decides the program is static. Configurations whose plans have the
same structure may be sampled in one batch: each leaf is then an array with a number for each example.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
from jaxtyping import Array, Bool

from dalle2_jax import diffusion
from dalle2_jax.diffusion import GuidanceSchedule, SamplerConfig, SamplingOptions, Schedule, StudentSteps
from dalle2_jax.errors import ConfigError, UserError, choose
from dalle2_jax.ranges import Fraction, GuidanceScale, Range
from dalle2_jax.types import PerExample

Condition = Mapping[str, jax.Array]
"""The conditioning of a batch: arrays by name, each with the batch as its first axis."""

Drops = Mapping[str, Bool[Array, "B"]]
"""Examples for which a part of the condition ("image", "text") is dropped."""

GUIDANCE_ORDERS = {"image,text": ("image", "text"), "text,image": ("text", "image")}
"""Values of ``SamplingConfig.guidance_order`` -> the parts of a condition in this order."""

STATIC = {"static": True}
"""Metadata of a field that decides the compiled program (``jax.tree_util.register_dataclass``)."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How a diffusion stage is sampled: the sampler, and classifier-free guidance (``diffusion.guidance``).

    Attributes:
      guidance: the scale of the whole condition; 1 is no guidance.
      image_guidance: replaces ``guidance`` for the image embedding.
      text_guidance: replaces ``guidance`` for the caption.
      guidance_schedule: how scales change over the steps, see ``GuidanceSchedule.kind``.
      guidance_interval: the (lowest, highest) u at which guidance applies, see ``GuidanceSchedule.interval``.
      guidance_rescale: from 0 to 1, see ``GuidanceSchedule.rescale``.
      guidance_order: the parts c_1, c_2 of eq. (2) of ``diffusion.guidance``, "image,text" or "text,image". In the
        second order an ``image_guidance`` of 0 leaves guidance by the caption only.
    """

    guidance: GuidanceScale = 1.0
    image_guidance: GuidanceScale | None = None
    text_guidance: GuidanceScale | None = None
    guidance_schedule: str = "constant"
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    guidance_rescale: Fraction = 0.0
    guidance_order: str = "image,text"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("guidance_order", self.guidance_order, GUIDANCE_ORDERS)
        _ = self.scale_schedule  # raises UserError for wrong values

    @property
    def scale_schedule(self) -> GuidanceSchedule:
        """How the guidance scales change over the steps."""
        return GuidanceSchedule(self.guidance_schedule, self.guidance_interval, self.guidance_rescale)

    @property
    def deterministic_ddim(self) -> bool:
        """Whether the sampler is DDIM with eta = 0, or Euler's method, which is the same."""
        return self.name in ("ddim", "euler") and self.eta == 0

    @property
    def scales(self) -> dict[str, float]:
        """The guidance scale of each part of a condition."""
        parts = {"image": self.image_guidance, "text": self.text_guidance}
        return {name: self.guidance if scale is None else scale for name, scale in parts.items()}


@dataclasses.dataclass(frozen=True)
class ImageSamplingConfig(SamplingConfig):
    """`SamplingConfig` of stages that generate images: x_0 is clipped to [-1, 1]."""

    clip_sample: Annotated[float, Range(0, 1_000_000, exclusive_min=True)] | None = 1.0


@dataclasses.dataclass(frozen=True)
class ArSamplingConfig:
    """How the autoregressive prior is sampled.

    Attributes:
      guidance: the scale of classifier-free guidance on the logits; 1 is no guidance.
      dot_quantile: the dot product of image and text embedding that the samples are conditioned on is sampled from
        those of the training pairs above this quantile (the paper tried 0.5, 0.7, 0.85 and 0.95; 0.5 was best).
      temperature: divides the logits, after guidance; below 1 the likely codes are sampled more often.
      top_k: each code is sampled from this many most likely ones; None is all.
      top_p: each code is sampled from the most likely ones that together have this probability (Holtzman et al. 2020,
        nucleus sampling); 1 is all.
    """

    guidance: GuidanceScale = 1.0
    dot_quantile: Annotated[float, Range(0, 1, exclusive_max=True)] = 0.5
    temperature: Annotated[float, Range(0, 1_000, exclusive_min=True)] = 1.0
    top_k: Annotated[int, Range(1, 65_536)] | None = None
    top_p: Annotated[float, Range(0, 1, exclusive_min=True)] = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dot_quantile < 1.0:
            raise UserError(f"sampling.dot_quantile {self.dot_quantile} must be at least 0 and below 1")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"sampling.top_p {self.top_p} must be above 0 and at most 1")
        if self.temperature <= 0.0:
            raise UserError(f"sampling.temperature {self.temperature} must be above 0")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """How ``DiffusionStage.sample`` samples: a pytree made by ``DiffusionStage.plan``.

    Attributes:
      config: the sampler, its eta and scales replaced by the leaves below. Static.
      branches: the branches of the network that guidance evaluates (``diffusion.branches``). Static.
      parts: the parts of the condition that guidance drops, c_1 .. c_n of eq. (2) of ``diffusion.guidance``. Static.
      scales: the guidance scale of each part of the condition.
      absent: examples that lack a part of the condition; a missing part is present in all.
      options: optional inputs of the sampling loop; its ``eta`` is that of "ddim".
      negative: the condition with other captions, which replace the captions in branches without them; None drops the
        captions there.
    """

    config: SamplingConfig = dataclasses.field(metadata=STATIC)
    branches: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    parts: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    scales: Mapping[str, PerExample]
    absent: Drops
    options: SamplingOptions
    negative: Condition | None = None

    @property
    def guides_by_text(self) -> bool:
        """Whether guidance evaluates the network without the captions too."""
        return "text" in self.parts and any("text" not in self.parts[:branch] for branch in self.branches)


def make_plan(config: SamplingConfig, parts: tuple[str, ...], absent: Drops, options: SamplingOptions) -> SamplingPlan:
    """Returns the plan of a configuration for a stage whose condition has ``parts``."""
    parts = tuple(name for name in GUIDANCE_ORDERS[config.guidance_order] if name in parts)
    if config.name == "ddim" and options.eta is None:
        options = dataclasses.replace(options, eta=config.eta)
    scales = {name: config.scales[name] for name in parts}
    program = dataclasses.replace(config, eta=0.0, guidance=1.0, image_guidance=None, text_guidance=None)
    branches = diffusion.branches([*scales.values()], config.scale_schedule)
    return SamplingPlan(program, branches, parts, scales, dict(absent), options)


def student_steps(schedule: Schedule, teacher: SamplingConfig, student: SamplingConfig) -> StudentSteps:
    """Returns the steps of a teacher and of its student, which are those of their configurations.

    Args:
      schedule: of training.
      teacher: how the teacher is sampled.
      student: how the student is sampled.

    Raises:
      UserError: a teacher that is not sampled by DDIM, or steps that do not fit.
    """
    _check_deterministic("teacher", teacher)
    return StudentSteps(diffusion.steps_of(schedule, teacher), diffusion.steps_of(schedule, student))


def check_student(name: str, schedule: Schedule, own: SamplingConfig, config: SamplingConfig) -> None:
    """Checks that a distilled stage can be sampled with a configuration.

    Args:
      name: of the stage, or of the section of a config.
      schedule: of training.
      own: the configuration of the stage.
      config: the configuration to sample with.

    Raises:
      ConfigError: another sampler, other steps, or guidance in addition to the teacher's.
    """
    _check_deterministic(name, config)
    steps = [diffusion.steps_of(schedule, one).timesteps.tolist() for one in (own, config)]
    if steps[0] != steps[1]:
        raise _wrong(
            name,
            "steps",
            f"must be {own.steps!r}, which the stage is distilled to, not {config.steps!r}: leave steps out, or sample "
            "from the system that it was distilled from",
        )
    fields = {
        "guidance": config.guidance,
        "image_guidance": config.image_guidance,
        "text_guidance": config.text_guidance,
    }
    for field, scale in fields.items():
        if scale is not None and scale != 1:
            raise _wrong(
                name,
                field,
                f"must be 1, not {scale:g}: the teacher's guidance is part of the weights of a distilled stage; leave "
                f"{field} out, or distil again with another teacher.{field}",
            )


def _check_deterministic(name: str, config: SamplingConfig) -> None:
    if not config.deterministic_ddim:
        reason = "'ddim' with eta 0, as teachers and students of a distillation are sampled"
        raise _wrong(name, "name", f"must be {reason}, not {config.name!r} with eta {config.eta:g}")


def _wrong(name: str, field: str, reason: str) -> ConfigError:
    return ConfigError(f"config.{name}.{field} {reason}", f"{name}.{field}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArSamplingPlan:
    """How ``ArPriorStage.sample`` samples: a pytree made by ``ArPriorStage.plan``.

    Attributes:
      guided: whether the network is evaluated without the caption too. Static.
      guidance: the scale of classifier-free guidance.
      dot_quantile: see `ArSamplingConfig`.
      absent: {"text": the examples without a caption}; empty if all have one.
      negative: the condition with other captions, which guidance moves away from; None: without captions.
      temperature: see `ArSamplingConfig`.
      top_p: see `ArSamplingConfig`; None is all codes.
      top_k: see `ArSamplingConfig`. Static.
    """

    guided: bool = dataclasses.field(metadata=STATIC)
    guidance: PerExample
    dot_quantile: PerExample
    absent: Drops
    negative: Condition | None = None
    temperature: PerExample = 1.0
    top_p: PerExample | None = None
    top_k: int | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def guides_by_text(self) -> bool:
        """Whether guidance evaluates the network without the captions too."""
        return self.guided
