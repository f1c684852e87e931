"""Random keys from names and steps.

A run has one root key; a stream is ``fold_in(root, crc32(name))`` and the key of a step is
``fold_in(stream, step)``. No key is carried from step to step, so a resumed run needs
only its step number, and adding a stream never changes another.

What is random in the loss of a batch is sampled for all of it from one key (`per_row`). A batch that is computed in
micro-batches gets the same values: each micro-batch takes its own rows of them.
"""

import contextlib
import contextvars
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp


def root(seed: int) -> jax.Array:
    """Returns the typed root key of a run."""
    return jax.random.key(seed)


def stream(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of the stream called ``name``, independent of every other name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def at_step(key: jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns the key of one step of a stream."""
    return jax.random.fold_in(key, step)


def per_image(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns one key an image, [B], from global image indices int32[B].

    Image 17 has the same key in any batch, so an image does not depend on batch size or device count.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normals float32[B, *shape], row b from keys[b]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


class MicroBatch(NamedTuple):
    """Rows ``place``, ``place + number``, ``place + 2 number``, ... of a batch in ``number`` micro-batches."""

    place: int | jax.Array
    number: int


_micro_batch: contextvars.ContextVar[MicroBatch | None] = contextvars.ContextVar("micro_batch", default=None)


@contextlib.contextmanager
def micro_batch(index: int | jax.Array, count: int) -> Iterator[None]:
    """Makes `per_row` return the rows of one micro-batch of ``count`` while its loss is traced."""
    token = _micro_batch.set(MicroBatch(index, count))
    try:
        yield
    finally:
        _micro_batch.reset(token)


def per_row(
    sample: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Samples an array with one row an example of the batch.

    Args:
      sample: (key, shape) -> values.
      key: for the whole batch.
      shape: of the result; the first axis is the batch, or the micro-batch within `micro_batch`.
    """
    rows = _micro_batch.get()
    if rows is None:
        return sample(key, shape)
    whole = sample(key, (shape[0] * rows.number, *shape[1:])).reshape(shape[0], rows.number, *shape[1:])
    return jax.lax.dynamic_index_in_dim(whole, rows.place, axis=1, keepdims=False)


def bernoulli(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool[shape], true at the given rate, by `per_row`."""
    return per_row(lambda key, shape: jax.random.bernoulli(key, rate, shape), key, shape)


def randint(key: jax.Array, shape: tuple[int, ...], low: int, high: int) -> jax.Array:
    """Returns int32[shape], uniform from ``low`` to ``high - 1``, by `per_row`."""
    return per_row(lambda key, shape: jax.random.randint(key, shape, low, high), key, shape)
