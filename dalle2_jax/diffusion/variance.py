"""The variance of a reverse step p(x_{t-1} | x_t): fixed, predicted by the network, or the optimal one.

    fixed_small     beta_tilde_t, exact when x_0 is certain          (Ho et al. 2020, sec. 3.2)  (1)
    fixed_large     beta_t, exact when the data are N(0, I)                                      (2)
    learned         exp(o), o being the second half of the network's channels                    (3)
    learned_range   exp(f log beta_t + (1 - f) log beta_tilde_t),    f = (o + 1) / 2
                    (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15)                           (4)

Given the network's mean, the variance that is optimal in Kullback-Leibler divergence is known
(Bao et al. 2022, Analytic-DPM, arXiv 2201.06503, theorem 1). With c_t the weight of x_0 in the posterior
mean it reads

    sigma_t^2 = beta_tilde_t + c_t^2 E Var(x_0 | x_t),                                           (5)
    E Var(x_0 | x_t) = (1 - alpha_bar_t) / alpha_bar_t (1 - E ||eps_theta(x_t, t)||^2 / dim)     (6)

per dimension. It lies between 0 and the second moment of the data (the law of total variance), and the
estimate is clipped to this range (ibid., sec. 3.1): at the noisiest steps (6) is a small difference times a large
number.

Logarithms and their mixtures are float32 also where a network computes in bfloat16.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.diffusion.process import at
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.errors import UserError
from dalle2_jax.ranges import NonNegativeFloat

LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_large", *LEARNED)


def split(variance: str, output: Float[Array, "B *shape"]) -> tuple[jax.Array, jax.Array | None]:
    """Splits a network's output into the prediction and, for a learned variance, the raw variance (else None).

    Raises:
        UserError: a learned variance and an odd number of channels.
    """
    if variance not in LEARNED:
        return output, None
    if output.shape[-1] % 2:
        raise UserError(f"variance {variance!r} needs an even number of output channels, not {output.shape[-1]}")
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, raw


def bounds(schedule: Schedule) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """Returns log beta_tilde and log beta of each step, between which eq. (4) mixes."""
    return schedule.posterior_log_variance, np.log(schedule.betas)


def mixed(
    variance: str, raw: Float[Array, "B *shape"], log_small: Float[Array, "..."], log_large: Float[Array, "..."]
) -> Float[Array, "B *shape"]:
    """Returns the log-variance that a network predicts, eq. (3) or (4)."""
    raw = raw.astype(jnp.float32)
    if variance == "learned":
        return raw
    share = (raw + 1) / 2
    return share * log_large + (1 - share) * log_small


def log_variance(
    schedule: Schedule, variance: str, raw: Float[Array, "B *shape"] | None, t: Int[Array, "B"], ndim: int
) -> Float[Array, "B ..."]:
    """Returns log sigma_t^2 by index, eq. (1)-(4); at step 0, where (1) is 0, that of step 1 as in the public code."""
    small, large = bounds(schedule)
    if raw is not None:  # where a variance is learned
        return mixed(variance, raw, at(small, t, ndim), at(large, t, ndim))
    if variance == "fixed_large":
        return at(np.append(small[0], large[1:]), t, ndim)
    return at(small, t, ndim)


@dataclasses.dataclass(frozen=True)
class NoiseStatistics:
    """Statistics of a trained network and its data that eq. (5) needs, per dimension.

    Attributes:
        eps: E ||eps_theta(x_t, t)||^2 / dim for each timestep of training.
        x_0: E ||x_0||^2 / dim.
    """

    eps: tuple[NonNegativeFloat, ...]
    x_0: NonNegativeFloat


def analytic(schedule: Schedule, statistics: NoiseStatistics) -> Float[np.ndarray, "T"]:
    """Returns sigma_t^2 of eq. (5) for each step, float64.

    Raises:
        UserError: the statistics belong to a schedule with fewer timesteps.
    """
    if schedule.timesteps[-1] >= len(statistics.eps):
        raise UserError(
            f"noise statistics of {len(statistics.eps)} timesteps belong to a shorter schedule: measure them again by "
            "`dalle2 evaluate SYSTEM --measures noise_statistics --stage STAGE`"
        )
    eps = np.asarray(statistics.eps, np.float64)[schedule.timesteps]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (1.0 - schedule.alpha_bar) / schedule.alpha_bar * (1.0 - eps)
    # At pure noise (6) is undefined, and the variance of x_0 given x_t is that of the data.
    spread = np.where(schedule.alpha_bar > 0, np.clip(spread, 0.0, statistics.x_0), statistics.x_0)
    return schedule.posterior_variance + schedule.posterior_mean_x_0**2 * spread
