"""Guidance moves along the line through both branches, alike for every prediction type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, normals

from dalle2_jax.diffusion import classifier_free, make_schedule, to_x0_eps

SCHEDULE = make_schedule("cosine", 50)
T = jnp.array([3, 10, 25, 40], jnp.int32)


def doubled(prediction_type="eps"):
    """Conditional: N(1, 0.5^2). Unconditional: N(-0.5, 1)."""

    def denoiser(x_t, t):
        half = len(x_t) // 2
        conditional = gaussian(SCHEDULE, prediction_type, 1.0, 0.5)(x_t[:half], t[:half])
        return jnp.concatenate([conditional, gaussian(SCHEDULE, prediction_type, -0.5, 1.0)(x_t[half:], t[half:])])

    return denoiser


@pytest.mark.parametrize(("scale", "mean", "std"), [(1.0, 1.0, 0.5), (0.0, -0.5, 1.0)])
def test_scale_one_is_conditional_and_zero_unconditional(scale, mean, std):
    x_t = normals((4, 3))
    np.testing.assert_allclose(
        classifier_free(doubled(), scale)(x_t, T), gaussian(SCHEDULE, "eps", mean, std)(x_t, T), atol=1e-6
    )


def test_scale_moves_away_from_the_unconditional():
    x_t = normals((4, 3))
    conditional, unconditional = jnp.split(doubled()(jnp.concatenate([x_t, x_t]), jnp.concatenate([T, T])), 2)
    np.testing.assert_allclose(
        classifier_free(doubled(), 3.0)(x_t, T), 3 * conditional - 2 * unconditional, atol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_guiding_any_prediction_is_guiding_eps(prediction_type):
    x_t = normals((4, 3))
    _, eps = to_x0_eps(
        SCHEDULE, prediction_type, classifier_free(doubled(prediction_type), 3.0)(x_t, T), x_t, T
    )
    np.testing.assert_allclose(eps, classifier_free(doubled(), 3.0)(x_t, T), atol=1e-4)


def test_one_batched_call_and_one_compilation_for_all_scales():
    calls = []

    def denoiser(x_t, t):
        calls.append(x_t.shape)
        return doubled()(x_t, t)

    run = jax.jit(lambda x_t, scale: classifier_free(denoiser, scale)(x_t, T))
    low, high = (run(normals((4, 3)), jnp.float32(scale)) for scale in (1.0, 4.0))
    assert calls == [(8, 3)]
    assert not np.allclose(low, high)
