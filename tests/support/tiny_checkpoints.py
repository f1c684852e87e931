"""Checkpoints of a few numbers: what tests of saving and restoring share."""

import jax
import jax.numpy as jnp

from dalle2_jax.workdir.checkpoints import Checkpoints


def trees(step):
    """Returns what a run of ``step`` steps might save."""
    params = {"a": {"kernel": jnp.arange(16.0).reshape(8, 2) + step}, "b": jnp.full(3, step, jnp.int32)}
    return {"params": params, "ema": jax.tree.map(lambda leaf: leaf * 2, params), "stats": {}}


def shape_of(leaf, sharding=None):
    """Returns the abstract array of a leaf, on its own sharding or another."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding)


def abstract(*names):
    """Returns abstract `trees`: those of these names, or all."""
    return jax.tree.map(shape_of, {name: trees(0)[name] for name in names or ("params", "ema", "stats")})


def save(folder, *steps, keep=2):
    """Saves the `trees` of each step in a stage's folder, and waits until they are on disk."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, trees(step), {"position": 8 * step})
    checkpoints.wait()
