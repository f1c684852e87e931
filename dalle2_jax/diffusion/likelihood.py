"""The variational bound on the likelihood, in bits per dimension.

With q the forward process and p the network's reverse process (Ho et al. 2020, arXiv 2006.11239, eq. 5):

    L = L_T + sum_{t > 0} L_t + L_0                                                           (1)
    L_T = KL(q(x_T | x_0) || N(0, I))                                                         (2)
    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                                       (3)
    L_0 = -log p(x_0 | x_1)                                                                   (4)

For (4) images are bytes scaled to [-1, 1]; p is the Gaussian's mass within half a level, including
the tail at both ends (Ho et al., eq. 13). Its distribution function is approximated by

    Phi(z) = (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2                                  (5)

as in the public code, so that results are comparable; the error is below 4e-4.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process, variance
from dalle2_jax.diffusion.loop import predictor
from dalle2_jax.diffusion.process import Denoised, thresholding
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.diffusion.steppers import Predict
from dalle2_jax.types import Denoiser, Metrics


def normal_kl(mean: jax.Array, log_variance: jax.Array, other_mean: jax.Array, other_log_variance: jax.Array):
    """Returns KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)), elementwise, in nats."""
    difference = log_variance - other_log_variance
    distance = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    return 0.5 * (jnp.expm1(difference) - difference + distance)


def byte_log_likelihood(
    x: Float[Array, "B *shape"], mean: Float[Array, "B *shape"], log_std: Float[Array, "B ..."]
) -> Float[Array, "B *shape"]:
    """Returns log p of eq. (4): x holds bytes scaled to [-1, 1]; in nats."""
    inverse_std, half_level = jnp.exp(-log_std), 1.0 / 255.0
    above = _normal_cdf((x - mean + half_level) * inverse_std)
    below = _normal_cdf((x - mean - half_level) * inverse_std)
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(z: jax.Array) -> jax.Array:
    """Eq. (5)."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def _mean_bits(nats: jax.Array) -> Float[Array, "B"]:
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / math.log(2.0)


def vlb_terms(
    schedule: Schedule,
    variance_type: str,
    pair: Denoised,
    x_0: Float[Array, "B *shape"],
    x_t: Float[Array, "B *shape"],
    t: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Returns L_t, eq. (3), or L_0, eq. (4), where t is 0: bits per dimension.

    Args:
        schedule: the process.
        variance_type: the network's, one of ``variance.VARIANCES``.
        pair: the network's prediction at x_t.
        x_0: clean images, bytes scaled to [-1, 1].
        x_t: the noised images.
        t: indices into the schedule.
    """
    true_mean, _, true_log_variance = process.posterior(schedule, x_0, x_t, t)
    mean, _, _ = process.posterior(schedule, pair.x_0, x_t, t)
    log_variance = variance.log_variance(schedule, variance_type, pair.variance, t, x_t.ndim)
    divergence = _mean_bits(normal_kl(true_mean, true_log_variance, mean, log_variance))
    first = _mean_bits(-byte_log_likelihood(x_0, mean, 0.5 * log_variance))
    return jnp.where(t == 0, first, divergence)


def prior_bits(schedule: Schedule, x_0: Float[Array, "B *shape"]) -> Float[Array, "B"]:
    """Returns L_T, eq. (2): bits per dimension. It does not depend on the network."""
    signal_rate, noise_rate = (jnp.float32(rate[-1]) for rate in (schedule.signal_rate, schedule.noise_rate))
    zero = jnp.zeros(())
    return _mean_bits(normal_kl(signal_rate * x_0, 2 * jnp.log(noise_rate), zero, zero))


def bits_per_dim(
    schedule: Schedule,
    prediction_type: str,
    variance_type: str,
    denoiser: Denoiser,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, "B"],
    clip_sample: float | None = 1.0,
) -> Metrics:
    """Returns the bound, eq. (1), of each image, with one noise sample a step. Call it under ``jax.jit``.

    Args:
        schedule: the process; a respaced one has another, usually looser, bound.
        prediction_type: what the denoiser predicts.
        variance_type: the network's, one of ``variance.VARIANCES``.
        denoiser: the network (x_t, t) -> prediction.
        x_0: bytes scaled to [-1, 1], float32.
        keys: one an image.
        clip_sample: bound on the predicted |x_0|; None for no bound.

    Returns:
        "total" and "prior" float32[B]; "vlb" (eq. 3-4), "mse" (of eps) and "x_0_mse" float32[T, B], cleanest first.
    """

    predict = predictor(prediction_type, denoiser, thresholding("static", clip_sample, 1.0), variance_type)

    def body(_, index):
        noise = rng.normal(jax.vmap(rng.at_step, in_axes=(0, None))(keys, index), x_0.shape[1:])
        return None, _terms_at(schedule, variance_type, predict, x_0, noise, index)

    _, (vlb, mse, x_0_mse) = jax.lax.scan(body, None, jnp.arange(schedule.num_steps))
    prior = prior_bits(schedule, x_0)
    return {"total": vlb.sum(axis=0) + prior, "prior": prior, "vlb": vlb, "mse": mse, "x_0_mse": x_0_mse}


def _terms_at(
    schedule: Schedule,
    variance_type: str,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    noise: Float[Array, "B *shape"],
    index: Int[Array, ""],
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Returns eq. (3) or (4) at one step, and the mean squared errors of eps and x_0, given the noise."""
    t = jnp.full(x_0.shape[:1], index, jnp.int32)
    x_t = process.q_sample(schedule, x_0, t, noise)
    pair = predict(x_t, schedule.level_at(index))
    axes = tuple(range(1, x_0.ndim))
    mse = jnp.mean(jnp.square(pair.eps - noise), axis=axes)
    x_0_mse = jnp.mean(jnp.square(pair.x_0 - x_0), axis=axes)
    return vlb_terms(schedule, variance_type, pair, x_0, x_t, t), mse, x_0_mse
