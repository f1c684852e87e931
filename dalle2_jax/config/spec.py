"""What a spec is: the typed sections of one kind of stage's config, and how they become a ``Stage``.

The kinds are in `specs`, `prior_specs` and `image_specs`.

Sizes that follow from other parts of a system (the vocabulary of the tokenizer, the widths of CLIP's embeddings) are
not in a config. Until ``build`` is called with these parts, a spec's ``model`` has stand-ins in their place:
``derived`` lists the fields. They are not written to experiment.json.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from dalle2_jax.config.parse import Place, expand
from dalle2_jax.config.sections import (
    TokenizerConfig,
)
from dalle2_jax.diffusion import respace
from dalle2_jax.errors import ConfigError
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import ClipStage, DiffusionConfig, SamplingConfig, Stage
from dalle2_jax.stages.sampling import check_student, student_steps

Config = Mapping[str, Any]
"""A config as a mapping: sections by name. It goes no further than the parse."""

Sampling = TypeVar("Sampling", bound=SamplingConfig)

ANY_WIDTH = 65_536
"""Stand-in for a width of CLIP's: the largest that there may be, so that no check against it fails before ``build``."""

TOWER_SIZES = ("model.text.vocab_size", "model.text.context_length")


class Spec(Protocol):
    """The typed config of one kind of stage. A frozen, hashable value.

    Attributes:
      sections: name of each section that the stage has -> whether its config must have it.
      text: the tokenizer; None without a section ``text``.
    """

    sections: ClassVar[Mapping[str, bool]]
    text: TokenizerConfig | None

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> Self:
        """Returns the spec of a config whose sections are mappings.

        Args:
          config: the mapping.
          resolution: of the images in its section ``data``; None without one.

        Raises:
          ConfigError: as `expand`.
        """
        ...

    @property
    def derived(self) -> tuple[str, ...]:
        """Dotted paths of the fields that follow from other parts of the system."""
        ...

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the stages that this one cannot be built without."""
        ...

    @property
    def reads_text(self) -> bool:
        """Whether the stage has a tokenizer."""
        ...

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images that the stage reads or generates; None for a stage without images."""
        ...

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> Stage:
        """Returns the stage.

        Args:
          vocab_size: of the tokenizer; None for a stage that reads no text.
          clip: the system's CLIP, for a stage that requires one.

        Raises:
          ConfigError: parts that do not fit each other.
        """
        ...

    @property
    def distilled(self) -> bool:
        """Whether the stage is distilled from a teacher."""
        ...

    def check_steps(self) -> None:
        """Raises ConfigError if ``sampling.steps`` does not fit the stage's noise schedule, or its teacher's steps."""
        ...


def optional(cls: type, config: Config, name: str) -> Any:
    """Returns a section of a config as a dataclass; None if the config does not have it."""
    return expand(cls, config[name], name) if name in config else None


def without(section: Config, *names: str) -> dict[str, Any]:
    """Returns a section without some of its fields."""
    return {key: value for key, value in section.items() if key not in names}


def parse_tower(section: Config, text: TokenizerConfig) -> TextConfig:
    """Returns a stage's text transformer; its vocabulary and length are the tokenizer's."""
    sizes = {"vocab_size": text.vocab_size, "context_length": text.context_length}
    return expand(TextConfig, section, "model.text", **sizes)


def with_sizes(model: Any, **sizes: Any) -> Any:
    """Returns a network's config with its real sizes."""
    with Place("config", "model").errors():
        return dataclasses.replace(model, **sizes)


def make_stage(cls: type, conditioning: Any, **parts: Any) -> Any:
    """Returns a stage of its parts and the fields of its section ``conditioning``."""
    fields = {field.name: getattr(conditioning, field.name) for field in dataclasses.fields(conditioning)}
    with Place("config", "conditioning").errors():
        return cls(**fields, **parts)


def require_clip(clip: ClipStage | None) -> ClipStage:
    """Returns the CLIP that a stage requires. ConfigError without one."""
    if clip is None:
        raise ConfigError("the stage requires a clip", "stage")
    return clip


def check_caption_length(text: TokenizerConfig, text_input: str | None, clip: ClipConfig | None) -> None:
    """Raises ConfigError unless captions are as long as what reads them: CLIP's text states, or a class."""
    lengths = {"clip": clip and clip.text.context_length, "label": 1}
    length = None if text_input is None else lengths.get(text_input)
    if length is not None and text.context_length != length:
        reason = "the stage reads clip's text states" if text_input == "clip" else "a class is one token"
        owner = "clip's " if text_input == "clip" else ""
        place = Place("config", "text.context_length")
        raise place.error(f"must be {owner}{length}, not {text.context_length}: {reason}")


class DiffusedSpec(Generic[Sampling]):
    """What the specs of diffusion stages share.

    Attributes:
      diffusion: the section of this name.
      sampling: the section of this name.
      teacher: the section of this name, how the teacher of a distilled stage is sampled; None for other stages.
    """

    diffusion: DiffusionConfig
    sampling: Sampling
    teacher: Sampling | None

    @property
    def distilled(self) -> bool:
        """See `Spec.distilled`."""
        return self.teacher is not None

    def check_steps(self) -> None:
        """See `Spec.check_steps`."""
        schedule = self.diffusion.make_schedule()
        for name, section in (("sampling", self.sampling), ("teacher", self.teacher)):
            if section is not None:
                with Place("config", f"{name}.steps").errors():
                    respace(schedule, section.steps)
        if self.teacher is not None:
            check_student("sampling", schedule, self.sampling, self.sampling)
            with Place("config", "sampling.steps").errors():
                student_steps(schedule, self.teacher, self.sampling)

    def parts(self, name: str) -> dict[str, Any]:
        """Returns the fields that every diffusion stage is made of, except its network and conditioning.

        Args:
          name: of the stage.
        """
        sections = {"diffusion": self.diffusion, "sampling": self.sampling, "teacher": self.teacher}
        return {"name": name, **sections, "noise_statistics": None}
