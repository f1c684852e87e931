"""What every naming of CLIP shares: the stage's config, and what a state dict leaves unsaid."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.text import Tokenizer, clip_tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.rules import Layout, one

EMBEDDING = {"normalisation": "raw", "scale": 1.0}
"""How an imported CLIP hands its embeddings on, unless what comes with it was trained otherwise: as Karlo's are."""

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""The temperature that training starts from (Radford et al. 2021, section 2.5), for towers published without theirs."""


def sections(
    embed_dim: int,
    text: TextConfig | None,
    vision: VisionConfig | ResNetConfig | None,
    mean: Sequence[float] = CLIP_IMAGE_MEAN,
    std: Sequence[float] = CLIP_IMAGE_STD,
) -> dict[str, Any]:
    """Returns what a checkpoint of these towers decides of the stage's config; one tower may be None."""
    model: dict[str, Any] = {"embed_dim": embed_dim, "vision": None}
    config: dict[str, Any] = {"model": model, "embedding": dict(EMBEDDING)}
    if text is not None:
        tower = dataclasses.asdict(text)
        config["text"] = {name: tower.pop(name) for name in ("context_length", "vocab_size")}
        model["text"] = tower
    if vision is not None:
        kind = "resnet" if isinstance(vision, ResNetConfig) else "vit"
        model["vision"] = {"kind": kind, **dataclasses.asdict(vision)}
        model |= {"image_mean": list(mean), "image_std": list(std)}
    return config


def normalisation(
    content: Mapping[str, Any], names: tuple[str, str], where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns how a checkpoint normalises pictures in [0, 1]: mean and deviation by channel, OpenAI's by default.

    Args:
        content: of a config file.
        names: what the file calls the two.
        where: the file, for errors.

    Raises:
        UserError: one of them is not three numbers, or a deviation is 0.
    """
    usual = zip(names, (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD), strict=True)
    found = [content.get(name, values) for name, values in usual]
    for name, values in zip(names, found, strict=True):
        numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or (name == names[1] and min(values) <= 0):
            raise UserError(f"{where}: {name} must be three numbers, deviations above 0, not {values!r}")
    mean, std = (tuple(map(float, values)) for values in found)
    return mean, std


def released_tokenizer(vocab_size: int) -> Tokenizer | None:
    """Returns OpenAI's tokenizer, of its first merges where a toy has fewer tokens; None for another vocabulary."""
    try:
        return clip_tokenizer(vocab_size)
    except UserError:
        return None


def mlp_ratio(hidden: int, width: int) -> float:
    """Returns the ratio r of a transformer's layer for which int(width * r) is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def patch_layout(size: int) -> Layout:
    """A convolution of patches at their own stride [D, 3, p, p] <-> a dense kernel over folded patches [p*p*3, D]."""
    return one(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(size, size, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )
