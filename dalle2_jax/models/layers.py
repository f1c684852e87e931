"""The small parts every network shares: float32 norms, activations, time embedding, patch folding.

Parameters are always float32. A layer computes in its ``dtype``, but means, variances and
sinusoids are computed in float32 for every ``dtype``.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dalle2_jax import rng
from dalle2_jax.errors import UserError
from dalle2_jax.models import linear

NORM_EPSILON = 1e-5
"""Epsilon of every norm: CLIP, GLIDE, ADM and Karlo agree on it."""


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(x * jnp.asarray(1.702, x.dtype))


_ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=False), "quick_gelu": _quick_gelu}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns "gelu" (exact) or "quick_gelu" (x * sigmoid(1.702 x), OpenAI's CLIP).

    Raises:
      UserError: the name is neither.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}: choose one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in float32, returned in ``dtype``. Params: scale, bias [D]."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        features = x.shape[-1]
        per_channel = (1,) * (x.ndim - 1) + (features,)
        scale = self.param("scale", nn.initializers.ones, (features,)).reshape(per_channel)
        bias = self.param("bias", nn.initializers.zeros, (features,)).reshape(per_channel)
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + NORM_EPSILON) * scale + bias).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm (Wu & He 2018) over H, W and the channels of a group, in float32.

    The sums run over H and W channel by channel first and then over a group's channels, which
    keeps the channel axis innermost: XLA vectorises it, and the image is never transposed.
    Params: scale, bias [C].
    """

    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,)).reshape(1, 1, 1, channels)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).reshape(1, 1, 1, channels)
        x = x.astype(jnp.float32)
        centred = x - self._group_mean(x)
        variance = self._group_mean(jnp.square(centred))
        return (centred * (jax.lax.rsqrt(variance + NORM_EPSILON) * scale) + bias).astype(self.dtype)

    def _group_mean(self, x: jax.Array) -> jax.Array:
        batch, _, _, channels = x.shape
        by_group = x.mean(axis=(1, 2)).reshape(batch, self.groups, channels // self.groups)
        means = jnp.broadcast_to(by_group.mean(axis=-1, keepdims=True), by_group.shape)
        return means.reshape(batch, 1, 1, channels)


class Dropout(nn.Module):
    """Sets a share ``rate`` of the values to zero when ``train``, and scales the others by 1 / (1 - rate).

    The mask comes from the rng collection "dropout", by `rng.bernoulli`.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B *shape"]) -> Float[Array, "B *shape"]:
        if not self.train or self.rate == 0.0:
            return x
        kept = rng.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


def timestep_embedding(t: Int[Array, "B"], dim: int) -> Float[Array, "B {dim}"]:
    """Sinusoids of the original timestep (Vaswani et al. 2017, section 3.5): cosines first, then sines.

    Frequency i of ``half = dim // 2`` is 10000^(-i / half), as in ADM, GLIDE and Karlo. An odd
    ``dim`` ends in a zero.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


class TimeMLP(nn.Module):
    """Timestep to embedding: sinusoid of width ``frequencies``, then dense, SiLU, dense (Ho et al. 2020)."""

    frequencies: int
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t: Int[Array, "B"]) -> Float[Array, "B D"]:
        h = timestep_embedding(t, self.frequencies).astype(self.dtype)
        h = linear.Dense(self.features, dtype=self.dtype, name="fc_1")(h)
        return linear.Dense(self.features, dtype=self.dtype, name="fc_2")(nn.silu(h))


def fold_patches(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w c"]:
    """Space to depth: [B, H, W, C] -> [B, H/size, W/size, size*size*C]. Channel order: row, column, C."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, size * size * channels)


def unfold_patches(x: Float[Array, "B h w c"], size: int) -> Float[Array, "B H W C"]:
    """Depth to space, the inverse of ``fold_patches``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // (size * size))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, channels // (size * size))


def average_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Means of size x size cells, summed in x's dtype; the identity for size 1."""
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // size, size, width // size, size, channels).mean(axis=(2, 4))


def upsample_nearest(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Repeats each pixel 2 x 2.

    The batch axis stays sharded: when the next kernel is sharded too (fsdp), XLA otherwise gathers the global batch of
    the four times larger map on every device instead of the kernel.
    """
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return linear.shard_batch_axis(x.reshape(batch, 2 * height, 2 * width, channels))
