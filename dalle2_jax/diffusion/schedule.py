"""Noise schedules: the signal rate and the noise rate at each step.

Diffusion runs over steps i = 0 .. T-1, from almost clean to almost pure noise. Each step adds
noise of variance beta_i (Ho et al. 2020, arXiv 2006.11239, eq. 2-4):

    q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I)                                  (1)
    alpha_bar_i      = prod_{j <= i} (1 - beta_j),         alpha_bar_{-1} = 1                 (2)
    q(x_i | x_0)     = N(sqrt(alpha_bar_i) x_0, (1 - alpha_bar_i) I)                          (3)

so sqrt(alpha_bar) is the *signal rate* and sqrt(1 - alpha_bar) the *noise rate*. Bayes' rule gives
the step back when x_0 is known (Ho et al. eq. 6-7):

    q(x_{i-1} | x_i, x_0) = N(c_i x_0 + d_i x_i, beta_tilde_i I)                              (4)
    c_i = sqrt(alpha_bar_{i-1}) beta_i / (1 - alpha_bar_i)                                    (5)
    d_i = sqrt(1 - beta_i) (1 - alpha_bar_{i-1}) / (1 - alpha_bar_i)                          (6)
    beta_tilde_i = beta_i (1 - alpha_bar_{i-1}) / (1 - alpha_bar_i)                           (7)

Schedules:

    linear          beta from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T     (Ho et al. sec. 4) (8)
    scaled_linear   sqrt(beta) from sqrt(8.5e-4) to sqrt(0.012), scaled likewise
                    (Rombach et al. 2022, arXiv 2112.10752, app. E.1)                         (9)
    cosine          alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, u = (i + 1) / T,
                    beta <= 0.999        (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)   (10)
    sigmoid         alpha_bar(u) = (S(3) - S(6 u - 3)) / (S(3) - S(-3)), S the logistic function,
                    beta <= 0.999                        (Jabri et al. 2022, arXiv 2212.11972) (11)

Two functions transform a schedule:

    with zero terminal SNR (Lin et al. 2023, arXiv 2305.08891, algorithm 1): the signal rate a_i becomes

        a_0 (a_i - a_{T-1}) / (a_0 - a_{T-1})                                                (12)

    which ends in pure noise; x_0 does not follow from eps there, so a network must predict x_0 or v.

    for another resolution (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 4): in an image of r times the side,
    noise is averaged over r^2 times the pixels, so log SNR becomes

        log SNR - 2 log r,                SNR = alpha_bar / (1 - alpha_bar)                  (13)

An *index* counts the steps of a schedule; a *timestep* is the network's input. They are
the same until a schedule is respaced (``respacing``); ``Schedule.timesteps`` maps one to the other.

Tables are float64 numpy, cast to float32 once where they enter a compiled program (``in_float32`` makes a schedule
that computes them in float32, as some public code does). The functions are cached: equal arguments return the same
object, which is hashed by identity.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError, choose


class Level(NamedTuple):
    """One noise level (scalars), or all the levels of a schedule (arrays [T])."""

    timestep: jax.Array | np.ndarray  # int32, the network's input
    signal_rate: jax.Array | np.ndarray  # float32, sqrt(alpha_bar)
    noise_rate: jax.Array | np.ndarray  # float32, sqrt(1 - alpha_bar)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of T steps; every table has shape [T], is indexed by step and read-only.

    Attributes:
        betas: variance added by each step, in (0, 1], eq. (1). Its dtype, float64 or float32, is that of every table.
        timesteps: the network's timestep of each step, ascending.
        rounded_alpha_bar: alpha_bar where it is not exactly the product of eq. (2), as in ``in_float32``; else None.
    """

    betas: Float[np.ndarray, "T"]
    timesteps: Int[np.ndarray, "T"]
    rounded_alpha_bar: Float[np.ndarray, "T"] | None = None

    def __post_init__(self):
        self.betas.flags.writeable = False
        self.timesteps.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> Float[np.ndarray, "T"]:
        """The share of the signal's variance at each step, eq. (2)."""
        table = np.cumprod(1.0 - self.betas) if self.rounded_alpha_bar is None else self.rounded_alpha_bar
        table.flags.writeable = False
        return table

    @property
    def alpha_bar_prev(self) -> Float[np.ndarray, "T"]:
        """alpha_bar of the previous step; 1 before the first."""
        return np.append(np.ones(1, self.betas.dtype), self.alpha_bar[:-1])

    @property
    def signal_rate(self) -> Float[np.ndarray, "T"]:
        """sqrt(alpha_bar), eq. (3)."""
        return np.sqrt(self.alpha_bar)

    @property
    def noise_rate(self) -> Float[np.ndarray, "T"]:
        """sqrt(1 - alpha_bar), eq. (3)."""
        return np.sqrt(1.0 - self.alpha_bar)

    @property
    def signal_rate_prev(self) -> Float[np.ndarray, "T"]:
        """The signal rate after each reverse step: 1 after the last."""
        return np.sqrt(self.alpha_bar_prev)

    @property
    def noise_rate_prev(self) -> Float[np.ndarray, "T"]:
        """The noise rate after each reverse step: 0 after the last."""
        return np.sqrt(1.0 - self.alpha_bar_prev)

    @property
    def posterior_mean_x_0(self) -> Float[np.ndarray, "T"]:
        """Weight of x_0 in the posterior mean, eq. (5)."""
        return self.betas * self.signal_rate_prev / (1.0 - self.alpha_bar)

    @property
    def posterior_mean_x_t(self) -> Float[np.ndarray, "T"]:
        """Weight of x_t in the posterior mean, eq. (6)."""
        return (1.0 - self.alpha_bar_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alpha_bar)

    @property
    def posterior_variance(self) -> Float[np.ndarray, "T"]:
        """beta_tilde, eq. (7); 0 at step 0, which ends in x_0 itself."""
        return self.betas * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> Float[np.ndarray, "T"]:
        """log beta_tilde; step 0, where it would be -inf, takes the value of step 1 (or of beta)."""
        variance = self.posterior_variance
        first = variance[1] if self.num_steps > 1 else self.betas[0]
        return np.log(np.append(first, variance[1:]))

    @property
    def log_snr(self) -> Float[np.ndarray, "T"]:
        """log(alpha_bar / (1 - alpha_bar)); -inf at pure noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)

    @property
    def levels(self) -> Level:
        """All the noise levels, ready for a compiled program: int32[T], float32[T], float32[T]."""
        return Level(self.timesteps.astype(np.int32), *float32(self.signal_rate, self.noise_rate))

    def level_at(self, index: Int[Array, ""]) -> Level:
        """The noise level of one step, whose index may be traced."""
        return jax.tree.map(lambda table: jnp.asarray(table)[index], self.levels)


def float32(*tables: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns tables as float32, the dtype of compiled programs."""
    return tuple(table.astype(np.float32) for table in tables)


def _linear(num_steps: int) -> np.ndarray:
    """Betas of eq. (8)."""
    if num_steps <= 20:
        raise UserError(f"the linear schedule needs more than 20 steps, not {num_steps}; use 'cosine'")
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


def _scaled_linear(num_steps: int) -> np.ndarray:
    """Betas of eq. (9)."""
    scale = np.sqrt(1000 / num_steps)
    return np.linspace(scale * np.sqrt(8.5e-4), scale * np.sqrt(0.012), num_steps, dtype=np.float64) ** 2


def _of_signal(alpha_bar: Float[np.ndarray, "T_plus_1"]) -> np.ndarray:
    """Betas of an alpha_bar given before the first step and after each, bounded as in eq. (10)."""
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _cosine(num_steps: int) -> np.ndarray:
    """Betas of eq. (10)."""
    u = np.arange(num_steps + 1) / num_steps
    return _of_signal(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)


def _sigmoid(num_steps: int) -> np.ndarray:
    """Betas of eq. (11)."""
    first, last = 1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-3.0))
    u = np.arange(num_steps + 1) / num_steps
    return _of_signal((last - 1 / (1 + np.exp(3 - 6 * u))) / (last - first))


_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine, "sigmoid": _sigmoid}


@functools.cache
def make_schedule(name: str, num_steps: int) -> Schedule:
    """Returns the schedule "linear", "scaled_linear", "cosine" or "sigmoid" of num_steps steps, eq. (8)-(11).

    Raises UserError on an unknown name or a number of steps that the schedule cannot have.
    """
    betas = choose("noise schedule", name, _BETAS)
    if num_steps < 1:
        raise UserError(f"a noise schedule needs at least 1 step, not {num_steps}")
    return Schedule(betas(num_steps), np.arange(num_steps))


def of_alpha_bar(alpha_bar: Float[np.ndarray, "T"], timesteps: Int[np.ndarray, "T"] | None = None) -> Schedule:
    """Returns the schedule with a given alpha_bar, such as another implementation's ``alphas_cumprod``.

    Args:
        alpha_bar: descending, in [0, 1). Of float32 all tables are computed in float32, otherwise in float64.
        timesteps: the network's timestep of each step, ascending; 0 to T - 1 by default.

    Raises:
        UserError: alpha_bar or timesteps that do not descend or ascend, are out of range, or differ in length.
    """
    alpha_bar = np.array(alpha_bar, np.float32 if np.asarray(alpha_bar).dtype == np.float32 else np.float64, ndmin=1)
    timesteps = np.arange(alpha_bar.size) if timesteps is None else np.array(timesteps)
    before = np.append(np.ones(1, alpha_bar.dtype), alpha_bar.ravel()[:-1])
    if alpha_bar.shape != before.shape or not (alpha_bar < before).all() or not alpha_bar[-1] >= 0:
        raise UserError("alpha_bar must be one row of numbers that descend from below 1 to 0 or above")
    if timesteps.shape != alpha_bar.shape or not (np.diff(timesteps, prepend=-1) > 0).all():
        raise UserError(f"timesteps must be {alpha_bar.size} ascending numbers from 0 on, one for each alpha_bar")
    rounded = alpha_bar if alpha_bar.dtype == np.float32 else None
    return Schedule(1.0 - alpha_bar / before, timesteps, rounded)


@functools.cache
def in_float32(schedule: Schedule) -> Schedule:
    """Returns the schedule with tables in float32, as diffusers' schedulers have them.

    betas are rounded, alpha_bar is their product rounded at each step, and everything computed from these is rounded
    again: at step 0 of cosine the weight of x_0 in the posterior mean, 1, comes out as 0.99947. Samples of a network
    then equal those of diffusers, from the same noise, up to float32 rounding.

    Raises:
        UserError: the first steps add so little noise that float32 cannot tell alpha_bar from 1.
    """
    betas = schedule.betas.astype(np.float32)
    # torch.cumprod accumulates in float64.
    alpha_bar = np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)
    if alpha_bar[0] == 1:
        raise UserError(
            f"a schedule of {schedule.num_steps} steps cannot have float32 tables: its first beta is rounded away"
        )
    return Schedule(betas, schedule.timesteps.copy(), alpha_bar)


def selected(schedule: Schedule, indices: Int[np.ndarray, "n"]) -> Schedule:
    """Returns the schedule of some of the steps, by ascending index: betas are those of the jumps between them."""
    jumps = of_alpha_bar(schedule.alpha_bar[indices], schedule.timesteps[indices])
    if schedule.rounded_alpha_bar is None:
        return jumps
    # The beta of a step that follows its predecessor is copied: computed from float32 alpha_bar it would differ.
    follows = np.diff(indices, prepend=-1) == 1
    return dataclasses.replace(jumps, betas=np.where(follows, schedule.betas[indices], jumps.betas))


def first_steps(schedule: Schedule, count: int) -> Schedule:
    """Returns the schedule of the ``count`` cleanest steps."""
    rounded = schedule.rounded_alpha_bar
    return Schedule(schedule.betas[:count], schedule.timesteps[:count], None if rounded is None else rounded[:count])


@functools.cache
def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Returns the schedule stretched so that its last step is pure noise, eq. (12)."""
    if schedule.num_steps < 2:
        raise UserError("a schedule of one step cannot end in pure noise: it would have no signal at all")
    rate = schedule.signal_rate
    stretched = rate[0] * (rate - rate[-1]) / (rate[0] - rate[-1])
    return of_alpha_bar(stretched**2, schedule.timesteps)


@functools.cache
def shifted(schedule: Schedule, ratio: float) -> Schedule:
    """Returns the schedule for images of ``ratio`` times the side, eq. (13).

    Raises UserError unless the ratio is above 0.
    """
    if not ratio > 0 or not np.isfinite(ratio):
        raise UserError(f"resolution_shift, a ratio of image sides, must be above 0, not {ratio}")
    signal, noise = schedule.alpha_bar, ratio**2 * (1.0 - schedule.alpha_bar)
    return of_alpha_bar(signal / (signal + noise), schedule.timesteps)
