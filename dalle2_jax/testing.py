"""Test doubles: a tiny stage of every kind, with batches and variables, and a tokenizer without training.

The stages fit together: the prior and the decoder require ``tiny_stage("clip_vit")``, and the upsampler enlarges the
decoder's images from 8x8 to 16x16.
"""

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.stages import (
    ClipStage,
    DecoderStage,
    DiffusionConfig,
    EmbeddingConfig,
    ImageSamplingConfig,
    PriorStage,
    SamplingConfig,
    Stage,
    UpsamplerStage,
    Variables,
    abstract_variables,
)
from dalle2_jax.text.tokenizer import pack
from dalle2_jax.types import Batch

VOCAB_SIZE, CONTEXT_LENGTH = 40, 8
EMBED_DIM, WIDTH = 16, 32
IMAGE_SIZE, LOW_SIZE = 16, 8
"""Side of the images of CLIP and the upsampler, and of those of the decoder."""

_TEXT = TextConfig(VOCAB_SIZE, CONTEXT_LENGTH, WIDTH, layers=1, heads=2)
_VIT = VisionConfig(IMAGE_SIZE, patch_size=8, width=WIDTH, layers=1, heads=2)
_RESNET = ResNetConfig(layers=(1,), width=8, heads=4, image_size=IMAGE_SIZE)
_UNET = UNetConfig(
    LOW_SIZE,
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=16,
    context_dim=WIDTH,
    norm_groups=8,
)
_ENLARGING_UNET = UNetConfig(
    IMAGE_SIZE,
    in_channels=6,
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    scale_shift=False,
    middle_attention=False,
    patch_size=2,
    norm_groups=8,
)


def _clip(tower: VisionConfig | ResNetConfig) -> ClipStage:
    return ClipStage(ClipConfig(EMBED_DIM, _TEXT, tower), EmbeddingConfig("unit", 0.54 * EMBED_DIM**0.5))


def _prior() -> PriorStage:
    return PriorStage(
        DiffusionConfig("x0", num_steps=100),
        SamplingConfig("ddpm", steps=3, guidance=2.0),
        "prior",
        PriorConfig(
            WIDTH, layers=2, heads=2, embed_dim=EMBED_DIM, context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE
        ),
        _clip(_VIT),
    )


def _decoder() -> DecoderStage:
    return DecoderStage(
        DiffusionConfig("eps", num_steps=100),
        ImageSamplingConfig("ddim", steps=3, guidance=2.0),
        "decoder",
        DecoderConfig(_UNET, EMBED_DIM, text_input="tokens", text=_TEXT),
        _clip(_VIT),
    )


def _upsampler() -> UpsamplerStage:
    return UpsamplerStage(
        DiffusionConfig("v", schedule="linear", num_steps=100),
        ImageSamplingConfig("ddim", steps=3),
        "upsampler_1",
        _ENLARGING_UNET,
        LOW_SIZE,
        crop_fraction=0.5,
    )


_STAGES = {
    "clip_vit": lambda: _clip(_VIT),
    "clip_resnet": lambda: _clip(_RESNET),
    "prior": _prior,
    "decoder": _decoder,
    "upsampler": _upsampler,
}
KINDS = tuple(_STAGES)
"""The arguments of ``tiny_stage``."""


def tiny_stage(kind: str) -> Stage:
    """Returns the stage of one of ``KINDS``; KeyError on another."""
    return _STAGES[kind]()


@functools.cache
def tiny_variables(stage: Stage, seed: int = 0) -> Variables:
    """Returns random variables of a stage, without compiling its ``init``; no kernel is zero, as some are initially."""
    noise = np.random.default_rng(seed)

    def random(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, normal = path[-1].key, noise.standard_normal(leaf.shape, np.float32)
        if name in ("mean", "var"):
            return jnp.full(leaf.shape, float(name == "var"))
        if name == "kernel":  # about the size of its input
            return jnp.asarray(normal * (leaf.size / leaf.shape[-1]) ** -0.5)
        start = {"scale": 1.0, "logit_scale": 2.0}.get(name, 0.0)
        return jnp.asarray(start + 0.1 * normal)

    return jax.tree_util.tree_map_with_path(random, abstract_variables(stage))


def tiny_frozen(stage: Stage) -> dict[str, Variables]:
    """Returns the variables of the stages that ``stage`` requires: of CLIP, and of its teacher."""
    return {name: tiny_variables(tiny_stage("clip_vit") if name == "clip" else stage) for name in stage.requires}


def tiny_batch(size: int, seed: int = 0) -> Batch:
    """Returns random images uint8[size, 16, 16, 3], and captions of random words and lengths."""
    noise = np.random.default_rng(seed)
    captions = [" ".join(map(str, noise.integers(100, size=noise.integers(1, 8)))) for _ in range(size)]
    tokens, mask = WordTokenizer().encode(captions, CONTEXT_LENGTH)
    image = noise.integers(256, size=(size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Batch(image=image, tokens=tokens, mask=mask)


class WordTokenizer:
    """A tokenizer with one token a word, from its checksum. It is not trained and cannot be saved."""

    vocab_size = VOCAB_SIZE

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] and mask bool[B, L]; see ``text.Tokenizer``."""
        return pack([self._ids(caption) for caption in captions], context_length, begin=1, end=2, pad=0)

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions that are truncated to ``context_length``."""
        return [index for index, caption in enumerate(captions) if len(self._ids(caption)) + 2 > context_length]

    def save(self, directory: str | Path) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("a WordTokenizer cannot be saved")

    def _ids(self, caption: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % (VOCAB_SIZE - 3) for word in caption.split()]
