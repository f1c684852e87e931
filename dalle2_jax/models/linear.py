"""Flax's linear layers and initialisers, quick to trace.

When a network is applied, Flax evaluates the initialiser of each parameter again, only to compare shapes: a quarter of
the time of tracing a U-Net. Within `shapes_only` the initialisers here return zeros, which is one operation.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) -> initial values."""

_shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Makes initialisers return zeros of the right shape. Only for a network that has its parameters."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _quick(initializer: Initializer) -> Initializer:
    """Returns an initialiser that returns zeros within `shapes_only`."""

    def initial(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype) if _shapes_only.get() else initializer(key, shape, dtype)

    return initial


def normal(std: float) -> Initializer:
    """Returns the initialiser of normals with a standard deviation."""
    return _quick(nn.initializers.normal(std))


_FAN_IN = _quick(nn.initializers.lecun_normal())


class Dense(nn.Dense):
    """``flax.linen.Dense``."""

    kernel_init: Initializer = _FAN_IN


class DenseGeneral(nn.DenseGeneral):
    """``flax.linen.DenseGeneral``."""

    kernel_init: Initializer = _FAN_IN


class Conv(nn.Conv):
    """``flax.linen.Conv``."""

    kernel_init: Initializer = _FAN_IN
