"""Shared by the tests of networks: random arrays and parameters without compiling, and cached jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape):
    """float32 standard normals."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def random_variables(module, *args):
    """Variables of the shapes that ``init`` would give, none of them at its silent initial value.

    Kernels keep the size of their inputs; scales and running variances lie around one.
    """
    rng = np.random.default_rng(0)

    def generate(path, leaf):
        noise, name = rng.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if name == "kernel":
            # [.., in, out], or [.., in, (q k v) N K], or [N K, out]: within a factor of two will do
            return jnp.asarray(noise * (leaf.size / leaf.shape[-1]) ** -0.5 * (3.0 if leaf.ndim == 5 else 1.0))
        return jnp.asarray(1 + 0.1 * np.abs(noise) if name in ("scale", "var") else 0.3 * noise)

    return jax.tree_util.tree_map_with_path(generate, jax.eval_shape(module.init, jax.random.key(0), *args))


@functools.cache
def jitted(module, method="__call__", **static):
    """``module.apply`` of one method, compiled once a process for each module and shapes."""
    return jax.jit(functools.partial(module.apply, method=method, **static))


def same(a, b):
    """Bit for bit."""
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(a, b, tolerance=1e-5):
    """Within ``tolerance`` of the largest of b."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max()), 1e-6))


def differ(a, b):
    """By more than rounding."""
    assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(b).max())
