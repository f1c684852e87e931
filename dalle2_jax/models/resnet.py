"""CLIP's modified ResNet (Radford et al. 2021, section 2.4; the "-D" changes of He et al. 2019).

Three stem convolutions instead of one, average pooling before every strided step (Zhang 2019),
and attention pooling: one query, the mean of the image, attends to all positions. The running
statistics of the batch norms are the collection ``batch_stats``.
"""

from dataclasses import dataclass
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.attention import attend
from dalle2_jax.models.layers import NORM_EPSILON, average_pool
from dalle2_jax.ranges import Depth, Range, Side

_EXPANSION = 4  # of a bottleneck: output channels over inner channels
_MAX_STAGES = 8


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet image tower: RN50 is layers (3, 4, 6, 3), width 64, heads 32 at 224 pixels.

    Raises:
      UserError: there are no stages; the image is not a multiple of the network's stride 32, or the heads do not
        divide the final channels, 32 * width.
    """

    layers: tuple[Depth, ...] = (3, 4, 6, 3)
    width: Annotated[int, Range(2, 65_536)] = 64
    heads: Annotated[int, Range(1, 65_536)] = 32
    image_size: Side = 224

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= _MAX_STAGES:
            raise UserError(f"layers has {len(self.layers)} stages: give 1 to {_MAX_STAGES}, as (3, 4, 6, 3)")
        stride = 2 ** (len(self.layers) + 1)
        if self.image_size % stride:
            raise UserError(f"image_size {self.image_size} is not a multiple of the network's stride {stride}")
        if self.final_width % self.heads:
            raise UserError(f"{self.final_width} final channels are not divisible by {self.heads} heads")

    @property
    def final_width(self) -> int:
        """Channels of the last stage."""
        return self.width * _EXPANSION * 2 ** (len(self.layers) - 1)


class _ConvNorm(nn.Module):
    """Convolution without bias, then batch norm in float32. ``zero`` starts the norm's scale at zero."""

    features: int
    kernel: int
    train: bool
    dtype: str
    strides: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linear.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.strides,
            padding=self.kernel // 2,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=NORM_EPSILON,
            dtype=jnp.float32,
            use_fast_variance=False,
            scale_init=nn.initializers.zeros if self.zero else nn.initializers.ones,
            name="norm",
        )(x.astype(jnp.float32))
        return x.astype(self.dtype)


class _Bottleneck(nn.Module):
    """1x1, 3x3, average pool, 1x1, plus the (pooled, projected) input."""

    features: int
    stride: int
    train: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.features * _EXPANSION
        h = nn.relu(_ConvNorm(self.features, 1, self.train, self.dtype, name="conv_1")(x))
        h = nn.relu(_ConvNorm(self.features, 3, self.train, self.dtype, name="conv_2")(h))
        h = _ConvNorm(out, 1, self.train, self.dtype, zero=True, name="conv_3")(average_pool(h, self.stride))
        if self.stride > 1 or x.shape[-1] != out:
            x = _ConvNorm(out, 1, self.train, self.dtype, name="downsample")(average_pool(x, self.stride))
        return nn.relu(x + h)


class AttentionPool(nn.Module):
    """[B, H, W, C] -> [B, E]: the mean of all positions queries [mean, positions].

    Params: ``positional_embedding`` [1 + H*W, C], ``query``, ``key``, ``value`` [C, N, K],
    ``out`` [N, K, E].
    """

    heads: int
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        batch, height, width, channels = x.shape
        normal = linear.normal(channels**-0.5)
        x = x.reshape(batch, height * width, channels)
        mean = x.astype(jnp.float32).mean(axis=1, keepdims=True).astype(x.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        positions = self.param("positional_embedding", normal, (height * width + 1, channels))
        x = x + positions.astype(x.dtype)[None]

        def project(name: str, inputs: jax.Array) -> jax.Array:
            heads = (self.heads, channels // self.heads)
            return linear.DenseGeneral(heads, dtype=self.dtype, kernel_init=normal, name=name)(inputs)

        pooled = attend(project("query", x[:, :1]), project("key", x), project("value", x))
        out = linear.DenseGeneral(self.features, axis=(-2, -1), dtype=self.dtype, kernel_init=normal, name="out")
        return out(pooled)[:, 0]


class ModifiedResNet(nn.Module):
    """Normalised image [B, H, W, 3] -> embedding float32[B, embed_dim].

    Params: ``stem_1..3``, ``stage_{i}_block_{j}`` (both from 1), ``pool``.
    """

    config: ResNetConfig
    embed_dim: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B E"]:
        config, x = self.config, image.astype(self.dtype)
        stem = ((config.width // 2, 2), (config.width // 2, 1), (config.width, 1))
        for i, (features, strides) in enumerate(stem, start=1):
            x = nn.relu(_ConvNorm(features, 3, train, self.dtype, strides, name=f"stem_{i}")(x))
        x = average_pool(x, 2)
        for i, blocks in enumerate(config.layers):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage_{i + 1}_block_{j + 1}"
                x = _Bottleneck(config.width * 2**i, stride, train, self.dtype, name=name)(x)
        return AttentionPool(config.heads, self.embed_dim, self.dtype, name="pool")(x).astype(jnp.float32)
