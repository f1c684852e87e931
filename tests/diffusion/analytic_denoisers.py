"""Networks that need no training: the exact E[x_0 | x_t] of data whose law is known."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import from_x0_eps
from dalle2_jax.diffusion.process import at


def gaussian(schedule, prediction_type, mean, std):
    """The perfect Denoiser of x_0 ~ N(mean, std^2 I); std 0 is a point mass.

    ``mean`` is a scalar or of the batch's rank. Told timesteps, it looks them up in the unrespaced
    schedule, so a sampler that hands it indices is found out.
    """

    def denoiser(x_t, t):
        signal_rate, noise_rate = at(schedule.signal_rate, t, x_t.ndim), at(schedule.noise_rate, t, x_t.ndim)
        gain = std**2 * signal_rate / (std**2 * signal_rate**2 + noise_rate**2)
        x_0 = mean + gain * (x_t - signal_rate * mean)
        eps = (x_t - signal_rate * x_0) / noise_rate
        return from_x0_eps(schedule, prediction_type, x_0, eps, t)

    return denoiser


def ode_solution(schedule, mean, std, x_T):
    """Where the probability-flow ODE takes x_T from the last timestep: its z-score is kept."""
    signal_rate, noise_rate = schedule.signal_rate[-1], schedule.noise_rate[-1]
    z = (np.asarray(x_T, np.float64) - signal_rate * mean) / np.hypot(std * signal_rate, noise_rate)
    return mean + std * z


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def relative_error(value, expected):
    """max |value - expected| over max |expected|."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.max(np.abs(value - expected)) / max(np.max(np.abs(expected)), 1e-30)


def normals(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
