"""Static and dynamic thresholds against numpy, and their place in the loop: before the caller's x0_transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import keys, normals
from raised import mentions

from dalle2_jax.diffusion import (
    SAMPLERS,
    SamplerConfig,
    SamplingOptions,
    make_schedule,
    sample,
    thresholding,
)
from dalle2_jax.errors import UserError

X_0 = normals((4, 5, 5, 3)) * jnp.array([0.2, 1.0, 2.0, 5.0])[:, None, None, None]
"""Images within [-1, 1], and ever further out of it."""


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_the_static_threshold_clips(bound):
    np.testing.assert_array_equal(thresholding("static", bound, 0.9)(X_0), np.clip(X_0, -bound, bound))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_the_dynamic_threshold_is_each_images_quantile(bound, quantile):
    expected = []
    for x_0 in np.asarray(X_0, np.float64):
        reach = max(bound, np.quantile(np.abs(x_0), quantile))
        expected.append(np.clip(x_0, -reach, reach) / reach * bound)
    clipped = thresholding("dynamic", bound, quantile)(X_0)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(clipped).max() <= bound * (1 + 1e-6)


def test_a_image_within_the_range_is_left_alone():
    for kind in ("static", "dynamic"):
        np.testing.assert_array_equal(thresholding(kind, 1.0, 0.995)(X_0)[0], X_0[0])


def test_without_a_bound_there_is_no_threshold():
    assert thresholding("static", None, 0.995) is None


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("statics", 1.0, 0.9), ["'statics'", "'static'"]),
        (("dynamic", None, 0.9), ["'dynamic'", "clip_sample"]),
        (("static", 0.0, 0.9), ["clip_sample", 0.0, None]),
        (("static", -1.0, 0.9), ["clip_sample", -1.0]),
        (("static", float("inf"), 0.9), ["clip_sample", "inf"]),
        (("dynamic", 1.0, 0.0), ["quantile", 0, 1, 0.0]),
        (("dynamic", 1.0, 1.5), ["quantile", 0, 1, 1.5]),
    ],
)
def test_impossible_thresholds_say_what_to_do(arguments, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        thresholding(*arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_hook_mends_what_the_threshold_has_left(name):
    """The network says 4 and -2: the dynamic threshold makes them 1 and -1/2, and the hook 0.75 more of each."""
    schedule = make_schedule("cosine", 1000)
    config = SamplerConfig(name, steps="logsnr10", clip_sample=1.0, threshold="dynamic", quantile=1.0)
    says = jnp.tile(jnp.array([4.0, -2.0]), (2, 3))
    call = jax.jit(
        lambda keys: sample(
            schedule,
            config,
            "x0",
            lambda x, t: says,
            keys,
            (6,),
            options=SamplingOptions(x0_transform=lambda x: x + 0.75),
        )
    )
    np.testing.assert_allclose(call(keys(2)), np.tile([1.75, 0.25], (2, 3)), rtol=1e-4)
