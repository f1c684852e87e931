"""CLIP: an image tower and a causal text tower into one embedding space (Radford et al. 2021, section 2.4).

Embeddings are returned raw, not unit-norm: the loss normalises, the prior and the decoder want
them as they are (the embedding contract is a stage's matter).
"""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.layers import LayerNorm
from dalle2_jax.models.resnet import ModifiedResNet, ResNetConfig
from dalle2_jax.models.transformer import TextConfig, Transformer, causal_mask
from dalle2_jax.models.vit import VisionConfig, VisionTransformer
from dalle2_jax.ranges import AnyFloat, PositiveFloat, Width

CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Both towers. ``image_mean`` and ``image_std`` are per channel, of images in [0, 1].

    Without ``vision`` it encodes captions only: text-to-image systems are published without the image
    tower (Karlo).
    """

    embed_dim: Width = 512
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig | ResNetConfig | None = field(default_factory=VisionConfig)
    image_mean: tuple[AnyFloat, AnyFloat, AnyFloat] = CLIP_IMAGE_MEAN
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = CLIP_IMAGE_STD
    remat: str = "none"
    dtype: str = "float32"

    @property
    def tower(self) -> VisionConfig | ResNetConfig:
        """The image tower. UserError where there is none."""
        if self.vision is None:
            raise UserError("this CLIP has no image tower, so it embeds no images: import its image encoder too")
        return self.vision


class TextTransformer(nn.Module):
    """CLIP's text tower: causal, read at the end token.

    Params: ``token_embedding``, ``positional_embedding`` [L, D], ``transformer``, ``ln_final``,
    ``proj`` kernel [D, E] without bias.
    """

    config: TextConfig
    embed_dim: int
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
        config, normal = self.config, linear.normal
        length = tokens.shape[1]
        if length != config.context_length:
            raise UserError(f"{length} tokens a caption but CLIP's context_length is {config.context_length}")
        x = nn.Embed(
            config.vocab_size, config.width, dtype=self.dtype, embedding_init=normal(0.02), name="token_embedding"
        )(tokens)
        positions = self.param("positional_embedding", normal(0.01), (length, config.width))
        x = x + positions.astype(self.dtype)[None]
        # padding follows the end token, so the causal mask hides it from all that is read
        x = Transformer(config.transformer(self.remat, self.dtype), name="transformer")(x, causal_mask(length))
        x = LayerNorm(self.dtype, name="ln_final")(x)
        end = tokens.argmax(axis=-1) if mask is None else length - 1 - jnp.flip(mask, axis=-1).argmax(axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        proj = linear.Dense(
            self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=normal(config.width**-0.5), name="proj"
        )
        return proj(pooled).astype(jnp.float32), x.astype(jnp.float32)


class Clip(nn.Module):
    """Both towers and the temperature. Params: ``visual`` (where there is one), ``text``, ``logit_scale``.

    ``logit_scale`` is a scalar, a logarithm. Training starts it at ln(1 / 0.07); towers that are published apart
    come without theirs, and keep that. With ``sigmoid`` it starts at ln 10, and the scalar ``logit_bias`` at -10
    (Zhai et al. 2023, arXiv 2303.15343, section 3.2).

    A ResNet tower also keeps the collection ``batch_stats``; apply with ``train=True`` and
    ``mutable=["batch_stats"]`` updates it.
    """

    config: ClipConfig
    sigmoid: bool = False  # whether the logits are those of SigLIP's loss, with an offset

    def setup(self) -> None:
        config = self.config
        if isinstance(config.vision, ResNetConfig):
            self.visual = ModifiedResNet(config.vision, config.embed_dim, config.dtype)
        elif config.vision is not None:
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.remat, config.dtype)
        self.text = TextTransformer(config.text, config.embed_dim, config.remat, config.dtype)
        scale = 10.0 if self.sigmoid else 1 / 0.07
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(scale)), ())
        if self.sigmoid:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def encode_image(self, image: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B E"]:
        """Maps images in [-1, 1], of the tower's own size, to raw embeddings float32[B, E].

        Raises:
          UserError: the image has another size, or there is no image tower.
        """
        config = self.config
        side = config.tower.image_size
        if image.shape[1:3] != (side, side):
            got = f"{image.shape[1]}x{image.shape[2]}"
            raise UserError(f"CLIP's input is {side}x{side} pixels, got {got}: resize them first")
        mean, std = (
            jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (config.image_mean, config.image_std)
        )
        image = (image * 0.5 + 0.5 - mean) / std
        visual = cast(Any, self.visual)
        return visual(image, train) if isinstance(config.vision, ResNetConfig) else visual(image)

    def encode_text(
        self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "B L D"]]:
        """Captions to (raw embedding [B, E], final-norm states of every position [B, L, D]), float32.

        The embedding is read at the end token: the last true position of ``mask``, or without a
        mask the position of the largest id (OpenAI's rule; their end token is the largest id).
        """
        return self.text(tokens, mask)

    def __call__(
        self,
        image: Float[Array, "B H W 3"],
        tokens: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"], Float[Array, ""]]:
        """Returns (image_emb raw, text_emb raw, exp(logit_scale)); training keeps the scale at 100 or below."""
        return self.encode_image(image, train), self.encode_text(tokens, mask)[0], jnp.exp(self.logit_scale)
