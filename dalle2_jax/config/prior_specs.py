"""The specs of the two priors, and how their networks get their sizes from CLIP."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from dalle2_jax import stages
from dalle2_jax.config.parse import Place, expand
from dalle2_jax.config.sections import (
    ArPriorConditioning,
    PriorConditioning,
    TokenizerConfig,
)
from dalle2_jax.config.spec import (
    ANY_WIDTH,
    TOWER_SIZES,
    Config,
    DiffusedSpec,
    check_caption_length,
    make_stage,
    optional,
    parse_tower,
    require_clip,
    with_sizes,
    without,
)
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.priors.ar_prior import ArPriorConfig
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.stages import ArSamplingConfig, ClipStage, DiffusionConfig, SamplingConfig


class PriorProperties:
    """What the specs of both priors share: each maps captions to embeddings of CLIP."""

    @property
    def requires(self) -> tuple[str, ...]:
        """CLIP, whose embeddings it generates."""
        return ("clip",)

    @property
    def reads_text(self) -> bool:
        """A prior always has a tokenizer."""
        return True

    @property
    def image_size(self) -> int | None:
        """A prior has no images."""
        return None


@dataclasses.dataclass(frozen=True)
class PriorSpec(PriorProperties, DiffusedSpec[SamplingConfig]):
    """The diffusion prior, of the paper ("unclip") or of LAION ("laion") by ``model.kind``. See `Spec`."""

    model: PriorConfig | LaionPriorConfig
    text: TokenizerConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    conditioning: PriorConditioning = PriorConditioning()
    teacher: SamplingConfig | None = None

    sections: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("model", "text", "diffusion", "sampling"), True),
        **dict.fromkeys(("conditioning", "teacher"), False),
    }
    KINDS: ClassVar[Mapping[str, type]] = {"unclip": PriorConfig, "laion": LaionPriorConfig}

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> "PriorSpec":
        """See `Spec.parse`."""
        text = expand(TokenizerConfig, config["text"], "text")
        place, section = Place("config", "model.kind"), config["model"]
        kind = place.choose(str(place), section.get("kind", "unclip"), cls.KINDS)
        return cls(
            (_laion_model if kind is LaionPriorConfig else _unclip_model)(without(section, "kind"), text),
            text,
            expand(DiffusionConfig, config["diffusion"], "diffusion"),
            expand(SamplingConfig, config["sampling"], "sampling"),
            optional(PriorConditioning, config, "conditioning") or PriorConditioning(),
            optional(SamplingConfig, config, "teacher"),
        )

    @property
    def derived(self) -> tuple[str, ...]:
        """LAION's network has one width, CLIP's, and may have more positions than there are tokens."""
        if isinstance(self.model, LaionPriorConfig):
            return ("model.width",)
        return ("model.embed_dim", "model.context_length", "model.vocab_size", "model.text_width")

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> stages.PriorStage:
        """See `Spec.build`."""
        clip = require_clip(clip)
        check_caption_length(self.text, self.model.text_input, clip.model)
        model = _laion_sized(self.model, clip.model) if isinstance(self.model, LaionPriorConfig) else self.model
        if isinstance(self.model, PriorConfig):
            tokens = self.model.text_input == "tokens"
            text = {
                "vocab_size": vocab_size if tokens else None,
                "text_width": None if tokens else clip.model.text.width,
            }
            model = with_sizes(model, embed_dim=clip.model.embed_dim, **text)
        return make_stage(stages.PriorStage, self.conditioning, model=model, clip=clip, **self.parts("prior"))


def _unclip_model(section: Config, text: TokenizerConfig) -> PriorConfig:
    tokens = section.get("text_input", PriorConfig.text_input) == "tokens"
    sizes = {"vocab_size": text.vocab_size if tokens else None, "text_width": None if tokens else ANY_WIDTH}
    sizes |= {"embed_dim": ANY_WIDTH, "context_length": text.context_length}
    return expand(PriorConfig, section, "model", **sizes)


def _laion_model(section: Config, text: TokenizerConfig) -> LaionPriorConfig:
    """It reads CLIP's text states, so captions have CLIP's length; the network may have more positions."""
    positions = {"context_length": text.context_length, **section}
    return expand(LaionPriorConfig, positions, "model", width=ANY_WIDTH)


def _laion_sized(model: LaionPriorConfig, clip: ClipConfig) -> LaionPriorConfig:
    if clip.text.width != clip.embed_dim:
        raise Place("config", "model.kind").error(
            f"'laion' takes CLIP's text states as they are: they must be as wide as its embeddings, {clip.embed_dim}, "
            f"not {clip.text.width}"
        )
    if model.context_length < clip.text.context_length:
        place = Place("config", "model.context_length")
        raise place.error(f"must be clip's {clip.text.context_length} or more, not {model.context_length}")
    return with_sizes(model, width=clip.embed_dim)


@dataclasses.dataclass(frozen=True)
class ArPriorSpec(PriorProperties):
    """The autoregressive prior. See `Spec`."""

    model: ArPriorConfig
    text: TokenizerConfig
    sampling: ArSamplingConfig = ArSamplingConfig()
    conditioning: ArPriorConditioning = ArPriorConditioning()

    sections: ClassVar[Mapping[str, bool]] = {"model": True, "text": True, "sampling": False, "conditioning": False}
    derived: ClassVar[tuple[str, ...]] = ("model.embed_dim", *TOWER_SIZES)
    distilled: ClassVar[bool] = False

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> "ArPriorSpec":
        """See `Spec.parse`."""
        text = expand(TokenizerConfig, config["text"], "text")
        sizes = {"text": parse_tower(config["model"].get("text", {}), text), "embed_dim": ANY_WIDTH}
        return cls(
            expand(ArPriorConfig, without(config["model"], "text"), "model", **sizes),
            text,
            optional(ArSamplingConfig, config, "sampling") or ArSamplingConfig(),
            optional(ArPriorConditioning, config, "conditioning") or ArPriorConditioning(),
        )

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> stages.ArPriorStage:
        """See `Spec.build`."""
        clip = require_clip(clip)
        text = dataclasses.replace(self.model.text, vocab_size=vocab_size)
        model = with_sizes(self.model, text=text, embed_dim=clip.model.embed_dim)
        parts = {"name": "ar_prior", "model": model, "clip": clip, "sampling": self.sampling}
        return make_stage(stages.ArPriorStage, self.conditioning, **parts)

    def check_steps(self) -> None:
        """It has no diffusion steps."""
