"""Layers of published image networks, for inference: their weights are always loaded.

A module is named as its tensors in the published file, with dots, so that one rule converts all of them
(`weights.features.table`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sizes = int | tuple[int, int]
Padding = str | Sizes


def conv(features: int, kernel: Sizes, strides: int = 1, padding: Padding = 0, **options: Any) -> nn.Conv:
    """Returns a convolution of float32, initially 0.

    Args:
      features: output channels.
      kernel: height and width, or both.
      strides: of both axes.
      padding: "SAME" (TensorFlow's), or rows and columns on each side, or both.
      **options: of ``nn.Conv``.
    """
    pads = padding if isinstance(padding, str) else [(pad, pad) for pad in _pair(padding)]
    zeros = nn.initializers.zeros
    return nn.Conv(features, _pair(kernel), (strides, strides), pads, kernel_init=zeros, **options)


def dense(features: int, name: str) -> nn.Dense:
    """Returns a dense layer, initially 0."""
    return nn.Dense(features, kernel_init=nn.initializers.zeros, name=name)


def batch_norm(name: str) -> nn.BatchNorm:
    """Returns a batch normalisation by running statistics, with epsilon 0.001 as in TensorFlow's networks."""
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name)


def _pair(sizes: Sizes) -> tuple[int, int]:
    return (sizes, sizes) if isinstance(sizes, int) else sizes


def max_pool(x: Float[Array, "B H W C"], size: int, strides: int, padding: int = 0) -> Float[Array, "B h w C"]:
    """Returns the maxima of windows; without padding, rows and columns at the end that fill no window are dropped."""
    pads: Any = [(padding, padding)] * 2  # flax annotates str, documents pairs
    return nn.max_pool(x, (size, size), (strides, strides), pads)


def average_pool_same(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the means of 3x3 windows around each pixel, without counting pixels outside of the image."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def spatial_mean(x: Float[Array, "B H W C"]) -> Float[Array, "B C"]:
    """Returns the mean over height and width."""
    return jnp.mean(x, axis=(1, 2))


def relu6(x: jax.Array) -> jax.Array:
    """Clips to [0, 6]."""
    return jnp.clip(x, 0.0, 6.0)
