"""DINOv2's vision transformer (Oquab et al. 2023), without registers."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dalle2_jax.models.attention import attend
from dalle2_jax.models.features.layers import conv, dense
from dalle2_jax.models.features.outputs import FeatureOutputs
from dalle2_jax.ranges import Depth, Side, Width

_OFFSET = 0.1
"""Added to the number of patches when the position embeddings are scaled, as in the published code."""

_CUBIC = -0.75
"""Coefficient a of torch's bicubic interpolation."""


@dataclass(frozen=True)
class Dinov2Config:
    """Sizes of a DINOv2 transformer; the defaults are those of ViT-S/14.

    Attributes:
      width: channels of a token.
      layers: number of blocks.
      heads: attention heads.
      patch_size: side of a patch, in pixels.
      trained_size: side of the images that it has position embeddings for, in pixels.
    """

    width: Width = 384
    layers: Depth = 12
    heads: Depth = 6
    patch_size: Side = 14
    trained_size: Side = 518


class _Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        batch, length, width = x.shape
        qkv = dense(3 * width, "qkv")(x).reshape(batch, length, 3, self.heads, width // self.heads)
        return dense(width, "proj")(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape))


class _Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        width = x.shape[-1]
        return dense(width, "fc2")(nn.gelu(dense(4 * width, "fc1")(x), approximate=False))


class _Block(nn.Module):
    """One layer with layer scale; the signature is nn.scan's."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], _: None) -> tuple[Float[Array, "B S D"], None]:
        for norm, branch, scale in (
            ("norm1", _Attention(self.heads, name="attn"), "ls1.gamma"),
            ("norm2", _Mlp(name="mlp"), "ls2.gamma"),
        ):
            gamma = self.param(scale, nn.initializers.zeros, x.shape[-1:])
            x = x + branch(_layer_norm(norm)(x)) * gamma.reshape(1, 1, -1)
        return x, None


class Dinov2(nn.Module):
    """Normalised image [B, H, W, 3] -> the class token after the last normalisation [B, width]; no logits."""

    config: Dinov2Config = Dinov2Config()

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> FeatureOutputs:
        config, zeros = self.config, nn.initializers.zeros
        x = conv(config.width, config.patch_size, config.patch_size, name="patch_embed.proj")(image)
        batch, rows, columns, width = x.shape
        trained = config.trained_size // config.patch_size
        first = self.param("cls_token", zeros, (1, 1, width))
        self.param("mask_token", zeros, (1, width))  # of the pretraining; a tensor of the published file
        positions = self.param("pos_embed", zeros, (1, 1 + trained**2, width))
        grid = positions[0, 1:].reshape(trained, trained, width)
        if (rows, columns) != (trained, trained):
            grid = jnp.einsum("ra,cb,abd->rcd", _cubic(trained, rows), _cubic(trained, columns), grid)
        x = x.reshape(batch, rows * columns, width) + grid.reshape(1, rows * columns, width)
        x = jnp.concatenate([jnp.broadcast_to(first + positions[:, :1], (batch, 1, width)), x], axis=1)
        blocks = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.layers)(
            config.heads, name="blocks"
        )
        x, _ = blocks(x, None)
        features = _layer_norm("norm")(x[:, 0])
        return FeatureOutputs(features, jnp.zeros((batch, 0)))


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def _cubic(old: int, new: int) -> jax.Array:
    """Returns the matrix [new, old] of the published scaling of position embeddings: bicubic, without antialiasing.

    The scale is (new + 0.1) / old instead of new / old; at the border the edge is repeated.
    """
    source = (np.arange(new) + 0.5) * old / (new + _OFFSET) - 0.5
    start = np.floor(source).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        weight = _cubic_weight(np.abs(source - (start + tap)))
        np.add.at(matrix, (np.arange(new), np.clip(start + tap, 0, old - 1)), weight)
    return jnp.asarray(matrix, jnp.float32)


def _cubic_weight(distance: np.ndarray) -> np.ndarray:
    """Returns the weights of Keys' cubic convolution kernel at distances from 0 to 2."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
