"""Low-rank changes of a network's layers, computed from activations: y = x W + s (x A) B (Hu et al. 2021, eq. 3).

The factors A and B stand next to the kernel W in a layer's parameters, as "lora_a" and "lora_b". The changed kernel
W + s A B is never computed, and no gradient has its size.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv)
"""Layers that may have factors. Others would ignore them."""


@contextlib.contextmanager
def low_rank_changes(scale: float) -> Iterator[None]:
    """Adds ``scale`` (x A) B to the output of every layer that has factors, while a network is applied."""

    def intercept(call: Callable, args: tuple, kwargs: Mapping[str, Any], context: InterceptorContext) -> Any:
        layer, result = context.module, call(*args, **kwargs)
        changed = isinstance(layer, LAYERS) and context.method_name == "__call__"
        if not changed or not layer.has_variable("params", "lora_a"):
            return result
        a, b = (layer.get_variable("params", name).astype(result.dtype) for name in ("lora_a", "lora_b"))
        x = args[0].astype(result.dtype)
        if isinstance(layer, nn.Conv):
            inner = _convolved(layer, x, a)
        else:
            inner = jnp.tensordot(x, a, axes=a.ndim - 1)
        return result + scale * jnp.tensordot(inner, b, axes=1)

    with nn.intercept_methods(intercept):
        yield


def _convolved(layer: nn.Conv, x: jax.Array, a: jax.Array) -> jax.Array:
    """Returns the convolution of x [B, H, W, C] with A [h, w, C, rank], with the strides and padding of a layer."""
    strides, padding = _pair(layer.strides or 1), layer.padding
    pads = padding if isinstance(padding, str) else [(side, side) for side in _pair(padding)]
    return jax.lax.conv_general_dilated(x, a, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pair(value: Any) -> tuple[int, int]:
    """Returns a value for both sides of an image."""
    return (value, value) if isinstance(value, int) else tuple(value)


def with_factors(params: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters with the factors of some kernels next to them; both trees have the same paths."""
    nested = {
        name: with_factors(params[name], inner) if isinstance(inner, Mapping) else inner
        for name, inner in factors.items()
    }
    return {**params, **nested}
