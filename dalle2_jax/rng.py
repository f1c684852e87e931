"""Random keys from names and steps.

A run has one root key; a stream is ``fold_in(root, crc32(name))`` and the key of a step is
``fold_in(stream, step)``. No key is carried from step to step, so a resumed run needs
only its step number, and adding a stream never changes another.
"""

import zlib

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
