"""Flax's linear layers and initialisers, quick to trace, and with results that stay sharded over the batch.

When a network is applied, Flax evaluates the initialiser of each parameter again, only to compare shapes: a quarter of
the time of tracing a U-Net. Within `shapes_only` the initialisers here return zeros, which is one operation.

Where kernels are sharded over the same devices as the batch (``fsdp``), XLA may as well exchange activations of the
global batch between devices as gather a kernel. `shard_batch_axis` of every product leaves it only the kernel.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback, with_logical_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

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


def shard_batch_axis(x: Float[Array, "B *shape"]) -> Float[Array, "B *shape"]:
    """Constrains the first axis to the mesh axes of the logical axis "batch" (Flax's logical axis rules).

    Returns x itself where no rule for "batch" or no mesh is in force, and for one row, which all examples share.
    """
    if x.shape[0] == 1:
        return x
    axes = ("batch", *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
    return with_logical_constraint(x, axes, fallback=RulesFallback.NO_CONSTRAINT)


def _product(*args: Any, **kwargs: Any) -> jax.Array:
    """``jax.lax.dot_general`` of activations and a kernel."""
    return shard_batch_axis(jax.lax.dot_general(*args, **kwargs))


def _convolution(*args: Any, **kwargs: Any) -> jax.Array:
    """``jax.lax.conv_general_dilated`` of feature maps and a kernel."""
    return shard_batch_axis(jax.lax.conv_general_dilated(*args, **kwargs))


class Dense(nn.Dense):
    """``flax.linen.Dense``."""

    kernel_init: Initializer = _FAN_IN
    dot_general: Any = _product


class DenseGeneral(nn.DenseGeneral):
    """``flax.linen.DenseGeneral``."""

    kernel_init: Initializer = _FAN_IN
    dot_general: Any = _product


class Conv(nn.Conv):
    """``flax.linen.Conv``."""

    kernel_init: Initializer = _FAN_IN
    conv_general_dilated: Any = _convolution
