"""The forward process and its inverses: noising, the posterior, the prediction types, and clipping of x_0.

With signal rate a_t = sqrt(alpha_bar_t) and noise rate s_t = sqrt(1 - alpha_bar_t), a^2 + s^2 = 1,
noising at once (Ho et al. 2020, arXiv 2006.11239, eq. 4) is

    x_t = a_t x_0 + s_t eps,            eps ~ N(0, I)                                         (1)

A network may predict eps, x_0, or v (Salimans & Ho 2022, arXiv 2202.00512, appendix D):

    v = a_t eps - s_t x_0                                                                     (2)

Given x_t, any of them gives the pair (x_0, eps), through which all conversions go:

    from eps:   x_0 = (x_t - s_t eps) / a_t                                                   (3)
    from x_0:   eps = (x_t - a_t x_0) / s_t                                                   (4)
    from v:     x_0 = a_t x_t - s_t v,      eps = s_t x_t + a_t v                             (5)

and the posterior q(x_{t-1} | x_t, x_0) has the mean and variance of Ho et al. eq. 6-7
(``schedule`` eq. 4-7):

    mean = c_t x_0 + d_t x_t,           variance = beta_tilde_t                               (6)

A predicted x_0 outside the range of the data, which guidance often produces, is clipped:

    static     clip(x_0, -c, c)                                          (Ho et al. 2020)        (7)
    dynamic    clip(x_0, -s, s) c / s,    s = max(c, the p-quantile of |x_0| of each image)
               (Saharia et al. 2022, Imagen, arXiv 2205.11487, section 2.3)                     (8)

Where less than a share 1 - p of an image's values is out of range, both clip alike.

Everything is float32. Here t is an *index* int32[B] into the given schedule, which equals the network's
timestep only where the schedule is not respaced.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion.schedule import Level, Schedule
from dalle2_jax.errors import UserError, choose

THRESHOLDS = ("static", "dynamic")


class Denoised(NamedTuple):
    """A network's prediction at x_t: the clean example and the noise in it, each [B, ...].

    ``variance`` is the raw output for the variance of the reverse step (``variance``), None where it has none.
    """

    x_0: jax.Array
    eps: jax.Array
    variance: jax.Array | None = None


def _eps_from_x0(x_0, x_t, signal_rate, noise_rate):
    """Eq. (4)."""
    return (x_t - signal_rate * x_0) / noise_rate


def _from_eps(eps, x_t, signal_rate, noise_rate):
    """Eq. (3)."""
    return Denoised((x_t - noise_rate * eps) / signal_rate, eps)


def _from_x0(x_0, x_t, signal_rate, noise_rate):
    """Eq. (4)."""
    return Denoised(x_0, _eps_from_x0(x_0, x_t, signal_rate, noise_rate))


def _from_v(v, x_t, signal_rate, noise_rate):
    """Eq. (5)."""
    return Denoised(signal_rate * x_t - noise_rate * v, noise_rate * x_t + signal_rate * v)


_DENOISED = {"eps": _from_eps, "x0": _from_x0, "v": _from_v}

_TARGET = {
    "eps": lambda x_0, eps, signal_rate, noise_rate: eps,
    "x0": lambda x_0, eps, signal_rate, noise_rate: x_0,
    "v": lambda x_0, eps, signal_rate, noise_rate: signal_rate * eps - noise_rate * x_0,  # eq. (2)
}


def check_prediction(prediction_type: str) -> None:
    """Raises UserError unless the prediction type is "eps", "x0" or "v"."""
    choose("prediction type", prediction_type, _DENOISED)


def denoised(
    prediction_type: str,
    prediction: Float[Array, "B *shape"],
    x_t: Float[Array, "B *shape"],
    signal_rate: Float[Array | np.ndarray, "..."],
    noise_rate: Float[Array | np.ndarray, "..."],
) -> Denoised:
    """Returns (x_0, eps) of a prediction at a noise level, eq. (3)-(5).

    The rates are scalars, or of the rank of x_t. ``to_x0_eps`` is the same by index.

    Raises:
        UserError: the prediction type is none of "eps", "x0", "v".
    """
    return choose("prediction type", prediction_type, _DENOISED)(prediction, x_t, signal_rate, noise_rate)


def at(table: np.ndarray, t: Int[Array, "B"], ndim: int) -> Float[Array, "B ..."]:
    """Returns table[t] as float32[B, 1, ...] of rank ndim, ready to scale a batch."""
    return jnp.asarray(table.astype(np.float32))[t].reshape(t.shape + (1,) * (ndim - 1))


def q_sample(
    schedule: Schedule, x_0: Float[Array, "B *shape"], t: Int[Array, "B"], eps: Float[Array, "B *shape"]
) -> Float[Array, "B *shape"]:
    """Returns x_t, the noised x_0, eq. (1)."""
    return at(schedule.signal_rate, t, x_0.ndim) * x_0 + at(schedule.noise_rate, t, x_0.ndim) * eps


def posterior(
    schedule: Schedule, x_0: Float[Array, "B *shape"], x_t: Float[Array, "B *shape"], t: Int[Array, "B"]
) -> tuple[Float[Array, "B *shape"], Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Returns mean [B, *shape], variance and log-variance [B, 1, ...] of q(x_{t-1} | x_t, x_0), eq. (6).

    The variance is 0 at t = 0; the log-variance there is that of t = 1, as in the public code.
    """
    mean = at(schedule.posterior_mean_x_0, t, x_t.ndim) * x_0 + at(schedule.posterior_mean_x_t, t, x_t.ndim) * x_t
    variance = at(schedule.posterior_variance, t, x_t.ndim)
    return mean, variance, at(schedule.posterior_log_variance, t, x_t.ndim)


def to_x0_eps(
    schedule: Schedule,
    prediction_type: str,
    prediction: Float[Array, "B *shape"],
    x_t: Float[Array, "B *shape"],
    t: Int[Array, "B"],
) -> Denoised:
    """Returns (x_0, eps) of a prediction "eps", "x0" or "v", eq. (3)-(5); UserError on another type."""
    rates = at(schedule.signal_rate, t, x_t.ndim), at(schedule.noise_rate, t, x_t.ndim)
    return denoised(prediction_type, prediction, x_t, *rates)


def from_x0_eps(
    schedule: Schedule,
    prediction_type: str,
    x_0: Float[Array, "B *shape"],
    eps: Float[Array, "B *shape"],
    t: Int[Array, "B"],
) -> Float[Array, "B *shape"]:
    """Returns the target of a network of this prediction type, eq. (2); UserError on another type."""
    rates = at(schedule.signal_rate, t, x_0.ndim), at(schedule.noise_rate, t, x_0.ndim)
    return choose("prediction type", prediction_type, _TARGET)(x_0, eps, *rates)


def with_x_0(pair: Denoised, x_0: Float[Array, "B *shape"], x_t: Float[Array, "B *shape"], level: Level) -> Denoised:
    """Returns the pair with a corrected x_0; eps is computed from it and x_t, eq. (4)."""
    return pair._replace(x_0=x_0, eps=_eps_from_x0(x_0, x_t, level.signal_rate, level.noise_rate))


def thresholding(kind: str, bound: float | None, quantile: float) -> Callable | None:
    """Returns a function of x_0 [B, ...], eq. (7) or (8); None where there is no bound.

    Args:
        kind: one of `THRESHOLDS`.
        bound: c, ``SamplerConfig.clip_sample``.
        quantile: p of "dynamic".

    Raises:
        UserError: an unknown kind, a bound or quantile out of range, or a dynamic threshold without a bound.
    """
    choose("threshold", kind, dict.fromkeys(THRESHOLDS))
    if bound is None:
        if kind == "dynamic":
            raise UserError("threshold 'dynamic' needs the range of the data: set clip_sample, for images to 1.0")
        return None
    if not 0 < bound < float("inf"):
        raise UserError(f"clip_sample must be positive, not {bound}; use None for no bound")
    if not 0 < quantile <= 1:
        raise UserError(f"quantile must be above 0 and at most 1, not {quantile}")
    if kind == "static":
        return lambda x_0: jnp.clip(x_0, -bound, bound)
    return lambda x_0: _dynamic(x_0, bound, quantile)


def _dynamic(x_0: Float[Array, "B *shape"], bound: float, quantile: float) -> Float[Array, "B *shape"]:
    """Eq. (8)."""
    reach = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    reach = jnp.maximum(reach, bound).reshape((-1,) + (1,) * (x_0.ndim - 1))
    return jnp.clip(x_0, -reach, reach) * (bound / reach)
