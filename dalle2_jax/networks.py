"""From the sections of a stage's config to the shape of its network.

Lengths and vocabularies are the tokenizer's, and widths of embeddings are CLIP's: a config does not repeat them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.ar_prior import ArPriorConfig
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.laion_prior import LaionPriorConfig
from dalle2_jax.models.prior import PriorConfig
from dalle2_jax.models.transformer import TextConfig as TransformerTextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.sections import expand
from dalle2_jax.types import UsageError, choose

READS_TEXT = ("clip", "prior", "ar_prior", "decoder")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The tokenizer of a run: ``path`` names a stored one; else it is of a ``kind``.

    "sentencepiece" is trained on the data's captions; "clip" and "glide" are the public models' own; for "labels"
    captions are the numbers of ``vocab_size`` classes.
    """

    kind: str = "sentencepiece"
    vocab_size: int = 400
    context_length: int = 77
    path: str = ""


def borrows_clip(config: Mapping[str, Any]) -> bool:
    """Whether a stage of this config needs the clip beside it. A decoder may do without: GLIDE and ADM."""
    model = config["model"]
    if config["stage"] == "decoder":
        return model.get("image_emb_dim", 0) is not None or model.get("text_input") == "clip"
    return config["stage"] in ("prior", "ar_prior")


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a stage of this config has a tokenizer: an upsampler does if its network is a decoder's."""
    return config["stage"] in READS_TEXT or "unet" in (config.get("model") or ())


def text_config(config: Mapping[str, Any]) -> TextConfig:
    """Returns what a config says of the tokenizer."""
    return expand(TextConfig, config["text"], "text")


def clip_model(config: Mapping[str, Any], vocab_size: int) -> ClipConfig:
    """Returns CLIP's shape."""
    text = _tower(config, vocab_size)
    return expand(ClipConfig, _without(config["model"], "text"), "model", text=text)


def _tower(config: Mapping[str, Any], vocab_size: int) -> TransformerTextConfig:
    """The text transformer of a stage: its vocabulary and length are the tokenizer's."""
    length = text_config(config).context_length
    tower = config["model"].get("text", {})
    return expand(TransformerTextConfig, tower, "model.text", vocab_size=vocab_size, context_length=length)


def _check_length(config: Mapping[str, Any], text_input: str | None, clip: ClipConfig | None) -> None:
    """A stage that reads CLIP's text states has as many of them as CLIP; one that reads a class has one token."""
    wanted = text_config(config).context_length
    if text_input == "clip" and wanted != (length := clip.text.context_length):
        raise UsageError(f"config.text.context_length must be clip's {length}, not {wanted}: it reads clip's states")
    if text_input == "label" and wanted != 1:
        raise UsageError(f"config.text.context_length must be 1, not {wanted}: a class is one token")


def prior_model(config: Mapping[str, Any], vocab_size: int, clip: ClipConfig) -> PriorConfig | LaionPriorConfig:
    """Returns the diffusion prior's shape, of the ``kind`` that its section names: the paper's where it names none."""
    kind = config["model"].get("kind", "unclip")
    return choose("config.model.kind", kind, PRIORS)(config, _without(config["model"], "kind"), vocab_size, clip)


def _unclip_prior(
    config: Mapping[str, Any], section: Mapping[str, Any], vocab_size: int, clip: ClipConfig
) -> PriorConfig:
    text_input = section.get("text_input", "tokens")
    tokens = text_input == "tokens"
    _check_length(config, text_input, clip)
    return expand(
        PriorConfig,
        section,
        "model",
        embed_dim=clip.embed_dim,
        context_length=text_config(config).context_length,
        vocab_size=vocab_size if tokens else None,
        text_width=None if tokens else clip.text.width,
    )


def _laion_prior(
    config: Mapping[str, Any], section: Mapping[str, Any], vocab_size: int, clip: ClipConfig
) -> LaionPriorConfig:
    """It reads no tokens; captions may be shorter than the network has places for."""
    _check_length(config, LaionPriorConfig.text_input, clip)
    if clip.text.width != clip.embed_dim:
        raise UsageError(
            f"config.model.kind 'laion' takes CLIP's text states as they are: they must be as wide as its embeddings, "
            f"{clip.embed_dim}, not {clip.text.width}"
        )
    length = clip.text.context_length
    model = expand(LaionPriorConfig, {"context_length": length, **section}, "model", width=clip.embed_dim)
    if model.context_length < length:
        raise UsageError(f"config.model.context_length must be clip's {length} or more, not {model.context_length}")
    return model


PRIORS = {"unclip": _unclip_prior, "laion": _laion_prior}
"""Kinds of the diffusion prior's network."""


def ar_prior_model(config: Mapping[str, Any], vocab_size: int, clip: ClipConfig) -> ArPriorConfig:
    """Returns the autoregressive prior's shape."""
    text, embed_dim = _tower(config, vocab_size), clip.embed_dim
    return expand(ArPriorConfig, _without(config["model"], "text"), "model", text=text, embed_dim=embed_dim)


def decoder_model(config: Mapping[str, Any], vocab_size: int, clip: ClipConfig | None) -> DecoderConfig:
    """Returns a decoder's shape."""
    text_input = config["model"].get("text_input")
    text = None if config["model"].get("text") is None else _tower(config, vocab_size)
    _check_length(config, text_input, clip)
    told_image = clip is not None and config["model"].get("image_emb_dim", 0) is not None
    return expand(
        DecoderConfig,
        _without(config["model"], "text", *(() if told_image else ("image_emb_dim",))),
        "model",
        text=text,
        image_emb_dim=clip.embed_dim if told_image else None,
        text_width=clip.text.width if text_input == "clip" else None,
        num_classes=vocab_size if text_input == "label" else None,
    )


def upsampler_model(config: Mapping[str, Any], vocab_size: int | None) -> UNetConfig | DecoderConfig:
    """Returns an upsampler's shape: a U-Net, or a decoder without CLIP where it is told a caption or a class."""
    if reads_text(config):
        return decoder_model(config, vocab_size, None)
    return expand(UNetConfig, config["model"], "model")


def _without(section: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in names}
