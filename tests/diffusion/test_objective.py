"""The loss is zero for the truth, has the value that theory gives, and draws t uniformly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, normals

from dalle2_jax.diffusion import make_schedule, mse_loss, respace
from dalle2_jax.types import UsageError

SCHEDULE = make_schedule("cosine", 100)
KEY = jax.random.key(0)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
def test_the_truth_costs_nothing(prediction_type):
    x_0 = normals((16, 4, 2))
    loss, metrics = mse_loss(SCHEDULE, prediction_type, gaussian(SCHEDULE, prediction_type, x_0, 0.0), x_0, KEY)
    assert loss.shape == (16,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(metrics["mse"], loss.mean())


def test_the_best_network_for_gaussian_data_leaves_the_conditional_variance():
    """With x_0 ~ N(0, 1), Var(eps | x_t) = alpha_bar_t, whose mean over t is the loss."""
    loss, _ = mse_loss(SCHEDULE, "eps", gaussian(SCHEDULE, "eps", 0.0, 1.0), normals((4096, 64)), KEY)
    np.testing.assert_allclose(loss.mean(), SCHEDULE.alpha_bar.mean(), rtol=0.03)


@pytest.mark.parametrize(("prediction_type", "expected"), [("eps", 1.0), ("x0", 4.0)])
def test_a_network_that_says_nothing_leaves_the_target(prediction_type, expected):
    loss, _ = mse_loss(SCHEDULE, prediction_type, lambda x_t, t: jnp.zeros_like(x_t), 2 * normals((256, 256)), KEY)
    np.testing.assert_allclose(loss.mean(), expected, rtol=0.02)


def test_each_example_has_its_own_loss():
    x_0 = normals((8, 6))

    def wrong_for_one(x_t, t):
        return gaussian(SCHEDULE, "x0", x_0, 0.0)(x_t, t) + jnp.arange(8, dtype=jnp.float32)[:, None]

    loss, _ = mse_loss(SCHEDULE, "x0", wrong_for_one, x_0, KEY)
    np.testing.assert_allclose(loss, np.arange(8) ** 2, rtol=1e-5)


def test_network_is_told_timesteps_drawn_uniformly():
    schedule = respace(SCHEDULE, 5)
    seen = []

    def denoiser(x_t, t):
        seen.append(t)
        return x_t

    mse_loss(schedule, "eps", denoiser, jnp.zeros((5000, 1)), KEY)
    timesteps, counts = np.unique(seen[0], return_counts=True)
    assert seen[0].dtype == jnp.int32
    np.testing.assert_array_equal(timesteps, schedule.timesteps)
    np.testing.assert_allclose(counts, 1000, atol=150)


def test_the_key_decides_everything():
    def run(key):
        return mse_loss(SCHEDULE, "eps", lambda x_t, t: x_t, jnp.ones((4, 3)), key)[0]

    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))


def test_loss_is_float32_for_a_bfloat16_network():
    loss, _ = mse_loss(SCHEDULE, "eps", lambda x_t, t: x_t.astype(jnp.bfloat16), jnp.ones((4, 3)), KEY)
    assert loss.dtype == jnp.float32


def test_the_snr_weight_makes_the_loss_in_x_0_the_loss_in_v():
    """v = (a x_t - x_0) / s, so an error d in x_0 is an error d / s in v, and 1 / s^2 = SNR + 1."""
    x_0, wrong = normals((16, 8)), 0.3

    def denoiser(prediction_type):
        truth = gaussian(SCHEDULE, "x0", x_0, 0.0)
        if prediction_type == "x0":
            return lambda x_t, t: truth(x_t, t) + wrong
        rates = jnp.asarray(SCHEDULE.levels.signal_rate), jnp.asarray(SCHEDULE.levels.noise_rate)

        def v(x_t, t):
            signal, noise = (rate[t][:, None] for rate in rates)
            return (signal * x_t - truth(x_t, t) - wrong) / noise

        return v

    weighted, _ = mse_loss(SCHEDULE, "x0", denoiser("x0"), x_0, KEY, "snr", 1e9)
    in_v, _ = mse_loss(SCHEDULE, "v", denoiser("v"), x_0, KEY)
    np.testing.assert_allclose(weighted, in_v, rtol=1e-3)
    bounded, metrics = mse_loss(SCHEDULE, "x0", denoiser("x0"), x_0, KEY, "snr", 3.0)
    np.testing.assert_allclose(bounded, np.minimum(weighted, 3.0 * wrong**2), rtol=1e-3)
    np.testing.assert_allclose(metrics["mse"], wrong**2, rtol=1e-3)
    bounded_in_v, _ = mse_loss(SCHEDULE, "v", denoiser("v"), x_0, KEY, "snr", 3.0)
    np.testing.assert_allclose(bounded_in_v, bounded, rtol=1e-3)


def test_wrong_weightings():
    zero = normals((2, 2))
    with pytest.raises(UsageError, match="did you mean 'snr'"):
        mse_loss(SCHEDULE, "x0", lambda x_t, t: x_t, zero, KEY, "snrr")
    with pytest.raises(UsageError, match="x0 and v"):
        mse_loss(SCHEDULE, "eps", lambda x_t, t: x_t, zero, KEY, "snr")
