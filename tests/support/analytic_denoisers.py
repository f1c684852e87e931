"""Networks that need no training: the exact E[x_0 | x_t] of data whose law is known."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import from_x0_eps
from dalle2_jax.diffusion.process import at


def gaussian(schedule, prediction_type, mean, std):
    """The perfect Denoiser of x_0 ~ N(mean, std^2 I); std 0 is a point mass.

    ``mean`` is a scalar or of the batch's rank. Given timesteps, it looks them up in the unrespaced
    schedule, so a sampler that hands it indices is found out.
    """

    def denoiser(x_t, t):
        signal_rate, noise_rate = at(schedule.signal_rate, t, x_t.ndim), at(schedule.noise_rate, t, x_t.ndim)
        gain = std**2 * signal_rate / (std**2 * signal_rate**2 + noise_rate**2)
        x_0 = mean + gain * (x_t - signal_rate * mean)
        eps = (x_t - signal_rate * x_0) / noise_rate
        return from_x0_eps(schedule, prediction_type, x_0, eps, t)

    return denoiser


def denoiser_of(schedule, prediction_type, law):
    """The perfect Denoiser of a law: a function (x_t, signal rate, noise rate) -> E[x_0 | x_t]."""

    def denoiser(x_t, t):
        signal_rate, noise_rate = at(schedule.signal_rate, t, x_t.ndim), at(schedule.noise_rate, t, x_t.ndim)
        x_0 = law(x_t, signal_rate, noise_rate)
        return from_x0_eps(schedule, prediction_type, x_0, (x_t - signal_rate * x_0) / noise_rate, t)

    return denoiser


def gaussian_law(mean, covariance):
    """E[x_0 | x_t] of x_0 ~ N(mean, covariance) on [B, D], and of the point mass whose covariance is 0."""
    variances, axes = (np.float32(part) for part in np.linalg.eigh(covariance))
    mean = np.float32(mean)[None]

    def law(x_t, signal_rate, noise_rate):
        gain = signal_rate * variances[None] / (signal_rate**2 * variances[None] + noise_rate**2)
        return mean + (((x_t - signal_rate * mean) @ axes) * gain) @ axes.T

    return law


def mixture_law(weights, means, stds):
    """E[x_0 | x_t] of a mixture of Gaussians on a line, on [B, 1] of float32, or of float64 for numpy."""

    def law(x_t, signal_rate, noise_rate):
        numpy = np if isinstance(x_t, np.ndarray) else jnp
        weight, mean, std = (np.asarray(part, x_t.dtype)[None] for part in (weights, means, stds))
        variance = signal_rate**2 * std**2 + noise_rate**2
        distance = x_t - signal_rate * mean
        logits = numpy.log(weight) - 0.5 * numpy.log(variance) - 0.5 * distance**2 / variance
        share = numpy.exp(logits - logits.max(axis=1, keepdims=True))
        x_0 = mean + signal_rate * std**2 * distance / variance
        return (share * x_0).sum(axis=1, keepdims=True) / share.sum(axis=1, keepdims=True)

    return law


def exact_flow(law, x, log_snr_from, log_snr_to, steps=1000):
    """E[x_0 | x] where the probability-flow ODE has taken x to the second level; float64, by Runge and Kutta.

    d(x / a) / d sigma = (x - a x_0) / s with sigma = s / a = exp(-log SNR / 2), in steps of log sigma.
    """

    def rates(log_sigma):
        return 1 / np.hypot(1, np.exp(log_sigma)), 1 / np.hypot(1, np.exp(-log_sigma))

    def slope(log_sigma, scaled):
        signal_rate, noise_rate = rates(log_sigma)
        x_t = signal_rate * scaled
        return np.exp(log_sigma) * (x_t - signal_rate * law(x_t, signal_rate, noise_rate)) / noise_rate

    now, step = -log_snr_from / 2, (log_snr_from - log_snr_to) / 2 / steps
    scaled = np.asarray(x, np.float64) / rates(now)[0]
    for _ in range(steps):
        first = slope(now, scaled)
        second = slope(now + step / 2, scaled + step / 2 * first)
        third = slope(now + step / 2, scaled + step / 2 * second)
        fourth = slope(now + step, scaled + step * third)
        scaled = scaled + step / 6 * (first + 2 * second + 2 * third + fourth)
        now = now + step
    signal_rate, noise_rate = rates(now)
    return law(signal_rate * scaled, signal_rate, noise_rate)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def relative_error(value, expected):
    """max |value - expected| over max |expected|."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.max(np.abs(value - expected)) / max(np.max(np.abs(expected)), 1e-30)


def normals(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def whitened(count, columns, seed=0):
    """Normals [count, columns] of which the means are exactly 0 and the covariance exactly the identity.

    What is linear in them has the covariance that theory gives it: nothing is left to chance.
    """
    z = np.random.default_rng(seed).standard_normal((count, columns))
    return np.linalg.qr(z - z.mean(axis=0))[0] * np.sqrt(count)
