"""Parts that all formats of CLIP share: the stage's config, the released tokenizer, and layouts."""

import dataclasses
import math
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.models.clip import TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.text import ClipTokenizer, clip_tokenizer
from dalle2_jax.weights.clip.processor import Processor
from dalle2_jax.weights.rules import Layout, single

EMBEDDING = {"normalisation": "raw", "scale": 1.0}
"""Embeddings that an imported CLIP produces, unless a stage imported with it was trained with others."""

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Initial log temperature of training (Radford et al. 2021, section 2.5), for towers published without one."""


def sections(
    embed_dim: int,
    text: TextConfig | None,
    vision: VisionConfig | ResNetConfig | None,
    processor: Processor | None = None,
) -> dict[str, Any]:
    """Returns the sections of the stage's config that a checkpoint determines.

    Args:
        embed_dim: width of the embeddings.
        text: the text tower, or None if it is in another checkpoint.
        vision: the image tower, or None.
        processor: preprocessing of images; required with an image tower.
    """
    model: dict[str, Any] = {"embed_dim": embed_dim, "vision": None}
    config: dict[str, Any] = {"model": model, "embedding": dict(EMBEDDING)}
    if text is not None:
        tower = dataclasses.asdict(text)
        config["text"] = {name: tower.pop(name) for name in ("context_length", "vocab_size")}
        model["text"] = tower
    if vision is not None:
        assert processor is not None
        kind = "resnet" if isinstance(vision, ResNetConfig) else "vit"
        model["vision"] = {"kind": kind, **dataclasses.asdict(vision)}
        model |= {"image_mean": list(processor.mean), "image_std": list(processor.std)}
        config["preprocessing"] = dataclasses.asdict(processor.preprocessing)
    return config


def released_tokenizer(vocab_size: int) -> ClipTokenizer | None:
    """Returns OpenAI's tokenizer, cut to its first merges for a smaller vocabulary; None if no cut has this size."""
    try:
        return clip_tokenizer(vocab_size)
    except UserError:
        return None


def mlp_ratio(hidden: int, width: int) -> float:
    """Returns the ratio r of a transformer's MLP for which int(width * r) == hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def patch_layout(size: int) -> Layout:
    """Returns the layout of a patch convolution [D, 3, p, p] <-> a dense kernel over flattened patches [p*p*3, D]."""
    return single(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(size, size, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )
