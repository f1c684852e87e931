"""The specs of the stages that generate images: the decoder and the upsamplers."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from dalle2_jax import stages
from dalle2_jax.config.parse import Place, expand
from dalle2_jax.config.sections import (
    DecoderConditioning,
    TokenizerConfig,
    UpsamplerConditioning,
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
    with_sizes,
    without,
)
from dalle2_jax.errors import ConfigError
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.stages import ClipStage, DiffusionConfig, ImageSamplingConfig


@dataclasses.dataclass(frozen=True)
class DecoderSpec(DiffusedSpec[ImageSamplingConfig]):
    """The decoder: with an image embedding the paper's, without one GLIDE's or ADM's. See `Spec`."""

    model: DecoderConfig
    text: TokenizerConfig
    diffusion: DiffusionConfig
    sampling: ImageSamplingConfig
    conditioning: DecoderConditioning = DecoderConditioning()
    teacher: ImageSamplingConfig | None = None

    sections: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("model", "text", "diffusion", "sampling"), True),
        **dict.fromkeys(("conditioning", "teacher"), False),
    }

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> "DecoderSpec":
        """See `Spec.parse`."""
        text = expand(TokenizerConfig, config["text"], "text")
        return cls(
            _decoder_model(config["model"], text, "image_emb_dim" not in config["model"]),
            text,
            expand(DiffusionConfig, config["diffusion"], "diffusion"),
            expand(ImageSamplingConfig, config["sampling"], "sampling"),
            optional(DecoderConditioning, config, "conditioning") or DecoderConditioning(),
            optional(ImageSamplingConfig, config, "teacher"),
        )

    @property
    def derived(self) -> tuple[str, ...]:
        """``image_emb_dim`` is in a config where it is null: without an image embedding."""
        return _decoder_derived(self.model)

    @property
    def requires(self) -> tuple[str, ...]:
        """CLIP, unless the decoder reads nothing but its own encoding of a caption or class."""
        return ("clip",) if self.model.image_emb_dim is not None or self.model.text_input == "clip" else ()

    @property
    def reads_text(self) -> bool:
        """A decoder always has a tokenizer."""
        return True

    @property
    def image_size(self) -> int | None:
        """Side of the images that are generated."""
        return self.model.unet.image_size

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> stages.DecoderStage:
        """See `Spec.build`."""
        model = _decoder_sized(self.model, self.text, vocab_size, clip and clip.model)
        parts = self.parts("decoder")
        return make_stage(stages.DecoderStage, self.conditioning, model=model, clip=clip, **parts)


def _decoder_model(section: Config, text: TokenizerConfig, reads_image: bool) -> DecoderConfig:
    text_input = section.get("text_input")
    sizes = {
        "text": None if section.get("text") is None else parse_tower(section["text"], text),
        "image_emb_dim": ANY_WIDTH if reads_image else None,
        "text_width": ANY_WIDTH if text_input == "clip" else None,
        "num_classes": text.vocab_size if text_input == "label" else None,
    }
    given = section.get("image_emb_dim")
    if given is not None:
        raise Place("config", "model.image_emb_dim").error("follows from the rest of the system: leave it out")
    return expand(DecoderConfig, without(section, "text", "image_emb_dim"), "model", **sizes)


def _decoder_derived(model: DecoderConfig) -> tuple[str, ...]:
    image = () if model.image_emb_dim is None else ("model.image_emb_dim",)
    return (*TOWER_SIZES, *image, "model.text_width", "model.num_classes")


def _decoder_sized(
    model: DecoderConfig, text: TokenizerConfig, vocab_size: int | None, clip: ClipConfig | None
) -> DecoderConfig:
    check_caption_length(text, model.text_input, clip)
    return with_sizes(
        model,
        text=model.text and dataclasses.replace(model.text, vocab_size=vocab_size),
        image_emb_dim=None if clip is None or model.image_emb_dim is None else clip.embed_dim,
        text_width=clip.text.width if clip and model.text_input == "clip" else None,
        num_classes=vocab_size if model.text_input == "label" else None,
    )


@dataclasses.dataclass(frozen=True)
class UpsamplerSpec(DiffusedSpec[ImageSamplingConfig]):
    """An upsampler: a U-Net, or a decoder without CLIP if ``model`` has a U-Net as a part (GLIDE, ADM). See `Spec`."""

    name: str
    model: UNetConfig | DecoderConfig
    text: TokenizerConfig | None
    diffusion: DiffusionConfig
    sampling: ImageSamplingConfig
    conditioning: UpsamplerConditioning
    teacher: ImageSamplingConfig | None = None

    sections: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("model", "diffusion", "sampling"), True),
        **dict.fromkeys(("text", "conditioning", "teacher"), False),
    }

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> "UpsamplerSpec":
        """See `Spec.parse`."""
        text, section = optional(TokenizerConfig, config, "text"), config["model"]
        if "unet" in section and text is None:
            raise ConfigError(f"config of stage {config['stage']} needs a section text", "text")
        return cls(
            config["stage"],
            _decoder_model(section, text, False) if "unet" in section else expand(UNetConfig, section, "model"),
            text,
            expand(DiffusionConfig, config["diffusion"], "diffusion"),
            expand(ImageSamplingConfig, config["sampling"], "sampling"),
            expand(UpsamplerConditioning, config.get("conditioning", {}), "conditioning"),
            optional(ImageSamplingConfig, config, "teacher"),
        )

    @property
    def derived(self) -> tuple[str, ...]:
        """A U-Net has all its sizes in the config."""
        return ("name", *(_decoder_derived(self.model) if isinstance(self.model, DecoderConfig) else ()))

    @property
    def requires(self) -> tuple[str, ...]:
        """An upsampler requires no other stage."""
        return ()

    @property
    def reads_text(self) -> bool:
        """Whether it is conditioned on a caption or a class."""
        return isinstance(self.model, DecoderConfig)

    @property
    def image_size(self) -> int | None:
        """Side of the images that are generated."""
        return (self.model.unet if isinstance(self.model, DecoderConfig) else self.model).image_size

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> stages.UpsamplerStage:
        """See `Spec.build`."""
        model = self.model
        if isinstance(model, DecoderConfig) and self.text is not None:
            model = _decoder_sized(model, self.text, vocab_size, None)
        return make_stage(stages.UpsamplerStage, self.conditioning, model=model, **self.parts(self.name))
