"""Layers that are quick to trace have the values of Flax's, and Flax's check of shapes."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import linear

LAYERS = {
    "dense": (nn.Dense(5), linear.Dense(5)),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), linear.DenseGeneral((2, 3), axis=(-2, -1))),
    "conv": (nn.Conv(5, (3, 3)), linear.Conv(5, (3, 3))),
    "normal": (nn.Dense(5, kernel_init=nn.initializers.normal(2.0)), linear.Dense(5, kernel_init=linear.normal(2.0))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_are_those_of_flax(kind):
    theirs, ours = LAYERS[kind]
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    variables = [layer.init(jax.random.key(0), x) for layer in (theirs, ours)]
    jax.tree.map(np.testing.assert_array_equal, *variables)
    with linear.shapes_only():
        result = ours.apply(variables[1], x)
    np.testing.assert_array_equal(result, theirs.apply(variables[0], x))


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_shapes_are_found(kind):
    ours = LAYERS[kind][1]
    x = jnp.ones((2, 4, 4, 3))
    variables = ours.init(jax.random.key(0), x)
    larger = jax.tree.map(lambda array: jnp.pad(array, [(0, 1)] * array.ndim), variables)
    with linear.shapes_only(), pytest.raises(flax.errors.ScopeParamShapeError):
        ours.apply(larger, x)


def test_initial_values_are_zero_only_within_shapes_only():
    with pytest.raises(ZeroDivisionError), linear.shapes_only():
        assert not linear.normal(1.0)(jax.random.key(0), (3,)).any()
        raise ZeroDivisionError
    assert linear.normal(1.0)(jax.random.key(1), (3,)).any()
