"""Steppers that solve the probability-flow equation, in fewer steps than DDPM and DDIM need.

With signal rate a, noise rate s, sigma = s / a and lambda = -log sigma, the probability-flow equation
(Song et al. 2021, arXiv 2011.13456, eq. 13) is, for the scaled state x / a (Karras et al. 2022,
arXiv 2206.00364, eq. 3),

    d(x / a) / d sigma = eps(x, sigma)                                                        (1)

Euler's method on (1) is DDIM with eta = 0, and computed in that form: x / a and sigma eps are large and nearly equal
where there is hardly any signal. Heun's method (Karras et al., algorithm 1) uses the mean of the slopes at both ends of
a step, with two evaluations in all steps but the last.

DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) writes the exact solution from (a, s) to (a', s') with
h = lambda' - lambda as an integral over x_0,

    x' = s'/s x + a' int_0^h e^(r - h) x_0(lambda + r) dr                                     (2)

and replaces x_0 by the polynomial through its last 1, 2 or 3 values m_0, m_1, m_2 (``_extrapolation``). The order 2
multistep solver, 2M (algorithm 2), is accurate to second order in h: it weights the difference by half of
1 - e^(-h) instead of the integral. The equation with noise (SDE-DPM-Solver++ 2M, section 5) is

    x' = s'/s e^(-h) x + a' (1 - e^(-2h)) (m_0 + D / 2) + s' sqrt(1 - e^(-2h)) z              (3)

UniPC (Zhao et al. 2023, arXiv 2302.04867, B(h) = e^h - 1) takes 2M as predictor; the network's prediction at the new
x' then corrects x' before the next step starts from it: one order more without another evaluation.

The step to x_0 itself (h infinite) returns m_0. The arithmetic of lambda is float64 and done once.

On data N(0, d^2) the slope of (1) is k(sigma) x / a with k(sigma) = sigma / (sigma^2 + d^2), so that a step of Heun's
method from sigma to sigma' multiplies x / a by

    1 + (sigma' - sigma) / 2 (k(sigma) + k(sigma') (1 + (sigma' - sigma) k(sigma)))           (4)

Where sigma is far above d and sigma' is not, this is about 1/2 in place of sigma' / sigma, and samples come out far
too wide: 10 steps of cosine, even in t, give 7.4 for d = 0.5. ``sampler.steps_of`` chooses other steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion.schedule import Level, Schedule, float32
from dalle2_jax.errors import UserError


class HeunRow(NamedTuple):
    """The coefficients of Euler's and Heun's methods; each field float32[steps], the levels' too."""

    level: Level
    next_level: Level  # where the second slope is taken; the level itself at the last step, which takes none
    is_last: np.ndarray  # bool
    signal_rate_prev: np.ndarray  # a'
    noise_rate_prev: np.ndarray  # s'
    eps_weight: np.ndarray  # a' (sigma' - sigma)


@dataclasses.dataclass(frozen=True)
class Heun:
    """Euler's (order 1) or Heun's (order 2) method on eq. (1).

    Raises UserError for a schedule that ends in pure noise, where sigma is infinite.
    """

    order: int = 2

    def growth(self, schedule: Schedule, std: float = 0.5) -> float:
        """Returns the standard deviation that order 2 gives Gaussian data, over their own, eq. (4).

        Args:
            schedule: the steps to take, already respaced.
            std: d, the standard deviation of the data. 0.5 is that of images in [-1, 1] (Karras et al., table 1).
        """
        if schedule.alpha_bar[-1] == 0:
            return 1.0  # `rows` rejects it
        sigma = schedule.noise_rate.astype(np.float64) / schedule.signal_rate
        slope = sigma / (sigma**2 + std**2)
        change = sigma[:-1] - sigma[1:]
        factors = 1.0 + 0.5 * change * (slope[1:] + slope[:-1] * (1.0 + change * slope[1:]))
        last = 1.0 - sigma[0] * slope[0]
        return float(np.abs(np.prod(factors)) * last * np.hypot(sigma[-1], std) / std)

    def rows(self, schedule: Schedule) -> HeunRow:
        if schedule.alpha_bar[-1] == 0:
            raise UserError("'euler' and 'heun' cannot start where no signal is left: use sampler 'ddim' or 'dpmpp_2m'")
        signal_prev, noise_prev = schedule.signal_rate_prev, schedule.noise_rate_prev
        before = np.maximum(np.arange(schedule.num_steps) - 1, 0)
        eps_weight = noise_prev - signal_prev * schedule.noise_rate / schedule.signal_rate
        return HeunRow(
            schedule.levels,
            Level(*(table[before] for table in schedule.levels)),
            np.arange(schedule.num_steps) == 0,
            *float32(signal_prev, noise_prev, eps_weight),
        )

    def init(self, x_T):
        return ()

    def step(self, predict, x_t, row, noise, carry):
        pair = predict(x_t, row.level)
        euler = row.signal_rate_prev * pair.x_0 + row.noise_rate_prev * pair.eps
        if self.order == 1:
            return euler, carry

        def heun():
            change = predict(euler, row.next_level).eps - pair.eps
            return euler + row.eps_weight * 0.5 * change

        return jax.lax.cond(row.is_last, lambda: euler, heun), carry


class MultistepRow(NamedTuple):
    """x' = x_t_weight x_t + sum_k weights[k] m_k + std z; each field float32[steps, ...]."""

    level: Level
    x_t_weight: np.ndarray
    weights: np.ndarray  # [steps, order]
    std: np.ndarray


def _log_steps(schedule: Schedule) -> np.ndarray:
    """h of each step, infinite at the last, and at the first of a schedule that starts in pure noise."""
    with np.errstate(divide="ignore"):
        half = 0.5 * schedule.log_snr
    return np.append(np.inf, half[:-1]) - half


def _extrapolation(h: np.ndarray, order: int) -> np.ndarray:
    """Weights [T, order] of m_0, m_1, .. in the integral of eq. (2); fewer than ``order`` where there are fewer.

    2M: (1 - e^-h) (m_0 + (m_0 - m_1) / (2 r)), r = h_1 / h. 3M: the quadratic through three values in Newton's form,
    integrated (in the manner of Lu et al., appendix B). Public code takes half of its curvature, and so keeps order 2.
    """
    count = len(h)
    weights = np.zeros((count, order))
    for i in range(count):
        grown = -np.expm1(-h[i])
        weights[i, 0] = grown
        if not np.isfinite(h[i]) or order == 1 or i + 1 >= count or not np.isfinite(h[i + 1]):
            continue
        r_0 = h[i + 1] / h[i]
        if order == 2 or i + 2 >= count or not np.isfinite(h[i + 2]):
            weights[i, :2] += 0.5 * grown / r_0 * np.array([1.0, -1.0])
            continue
        r_1 = h[i + 2] / h[i]
        first, second = np.array([1.0, -1.0, 0.0]) / r_0, np.array([0.0, 1.0, -1.0]) / r_1
        curvature = (first - second) / (r_0 + r_1)
        slope = first + r_0 * curvature
        weights[i] += (1.0 - grown / h[i]) * slope + (1.0 - 2.0 * (h[i] - grown) / h[i] ** 2) * curvature
    return weights


@dataclasses.dataclass(frozen=True)
class DpmSolver:
    """DPM-Solver++ multistep: 2M and 3M by eq. (2), SDE-2M by eq. (3)."""

    order: int = 2
    stochastic: bool = False

    def rows(self, schedule: Schedule) -> MultistepRow:
        signal_prev, noise_prev = schedule.signal_rate_prev, schedule.noise_rate_prev
        h = _log_steps(schedule)
        ratio = noise_prev / schedule.noise_rate
        if not self.stochastic:
            weights = signal_prev[:, None] * _extrapolation(h, self.order)
            return MultistepRow(schedule.levels, *float32(ratio, weights, np.zeros_like(h)))
        fresh = -np.expm1(-2 * h)
        weights = _extrapolation(h, self.order) / -np.expm1(-h)[:, None] * (signal_prev * fresh)[:, None]
        tables = ratio * np.exp(-h), weights, noise_prev * np.sqrt(fresh)
        return MultistepRow(schedule.levels, *float32(*tables))

    def init(self, x_T):
        return jnp.zeros((self.order - 1, *x_T.shape), jnp.float32)

    def step(self, predict, x_t, row, noise, carry):
        history = jnp.concatenate([predict(x_t, row.level).x_0[None], carry])
        x_prev = row.x_t_weight * x_t + jnp.tensordot(row.weights, history, axes=1)
        if self.stochastic:
            x_prev = x_prev + row.std * noise()
        return x_prev, history[:-1]


class UniPcRow(NamedTuple):
    """The coefficients of UniPC; each field float32[steps, ...]."""

    predictor: MultistepRow
    x_weight: np.ndarray  # of the previous state, in the corrected x_t
    weights: np.ndarray  # [steps, 3], of m_0 (at x_t), m_1, m_2 in the corrected x_t
    corrects: np.ndarray  # bool; not at the first step


class UniPcCarry(NamedTuple):
    """The previous state, and the last two x_0."""

    x: jax.Array
    history: jax.Array  # [2, B, ...]


@dataclasses.dataclass(frozen=True)
class UniPc:
    """UniPC of order 2, multistep."""

    def rows(self, schedule: Schedule) -> UniPcRow:
        predictor = DpmSolver(2).rows(schedule)
        h, count = _log_steps(schedule), schedule.num_steps
        x_weight, weights = np.zeros(count), np.zeros((count, 3))
        for i in range(count - 1):
            # The step that led to x_t went from level i + 1 to level i, over h[i + 1].
            x_weight[i] = schedule.noise_rate[i] / schedule.noise_rate[i + 1]
            weights[i] = schedule.signal_rate[i] * _correction(h[i + 1], h[i + 2] if i + 2 < count else np.inf)
        corrects = np.arange(count) < count - 1
        x_weight, weights = float32(x_weight, weights)
        return UniPcRow(predictor, x_weight, weights, corrects)

    def init(self, x_T):
        return UniPcCarry(jnp.zeros_like(x_T), jnp.zeros((2, *x_T.shape), jnp.float32))

    def step(self, predict, x_t, row, noise, carry):
        history = jnp.concatenate([predict(x_t, row.predictor.level).x_0[None], carry.history])
        corrected = row.x_weight * carry.x + jnp.tensordot(row.weights, history, axes=1)
        x_t = jnp.where(row.corrects, corrected, x_t)
        x_prev = row.predictor.x_t_weight * x_t + jnp.tensordot(row.predictor.weights, history[:2], axes=1)
        return x_prev, UniPcCarry(x_t, history[:2])


def _correction(h: float, h_before: float) -> np.ndarray:
    """Returns the weights of m_0 (new), m_1 and m_2 that correct a step of size h; that of m_2 is 0 after a first step.

    Zhao et al., eq. 8-10, in x_0: the weights rho of the differences from m_1 solve a small linear system, so that
    the integral of eq. (2) is exact for as many powers.
    """
    grown = -np.expm1(-h)
    if not np.isfinite(h):
        return np.array([0.0, grown, 0.0])
    if not np.isfinite(h_before):
        return grown * np.array([0.5, 0.5, 0.0])
    r = -h_before / h  # where m_2 lies, in steps from m_1; the new value lies at 1
    # int_0^1 of e^(h u - h) h u^k du over grown, k = 1, 2: the moments of the polynomial's terms.
    first = 1.0 / grown - 1.0 / h
    second = 1.0 / grown - 2.0 / h * first
    rho = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([first, second]))
    before, new = rho[0] / r, rho[1]
    return grown * np.array([new, 1.0 - new - before, before])
