"""Steppers: one step from x_t to x_{t-1}, given the network's prediction. Here DDPM, DDIM and its inversion;
``solvers`` has the solvers of the probability-flow equation.

In what follows x_0 and eps are predicted by the network, after clipping; alpha_bar' is alpha_bar of the previous
step (1 before the first), and z ~ N(0, I).

DDPM, ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2): the posterior with the
network's x_0 in place of the true one,

    x_{t-1} = c_t x_0 + d_t x_t + sigma_t z                                                   (1)

with sigma_t as in ``variance``.

DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): eta = 0 is deterministic, eta = 1 has the
variance beta_tilde of DDPM,

    x_{t-1} = sqrt(alpha_bar') x_0 + sqrt(1 - alpha_bar' - sigma_t^2) eps + sigma_t z          (2)
    sigma_t = eta sqrt((1 - alpha_bar') r_t),       r_t = beta_t / (1 - alpha_bar_t)          (3)

With 1 - r_t = (1 - beta_t) (1 - alpha_bar') / (1 - alpha_bar_t), the root in (2) is computed as

    sqrt(1 - alpha_bar') sqrt((1 - r_t) + r_t (1 - eta) (1 + eta))                            (4)

a sum of positive terms, which is accurate in float32. In all of them sigma_0 = 0: the last step adds no noise.

DDIM inversion runs (2) with eta = 0 backwards, from an image to the noise that reproduces it (Dhariwal & Nichol 2021,
arXiv 2105.05233, appendix F; Ramesh et al. 2022, section 3): with the network's (x_0, eps) at x_t,

    x_{t+1} = sqrt(alpha_bar_{t+1}) x_0 + sqrt(1 - alpha_bar_{t+1}) eps                       (5)

A stepper converts a schedule to *rows*, its coefficients at each step (computed in float64, cast to
float32), and takes one step with one row. It may evaluate the network several times in one step, and
carry any state from step to step (a multistep solver its last x_0).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import variance
from dalle2_jax.diffusion.process import Denoised
from dalle2_jax.diffusion.schedule import Level, Schedule, float32
from dalle2_jax.diffusion.variance import NoiseStatistics
from dalle2_jax.errors import UserError, choose
from dalle2_jax.types import PerExample

Predict = Callable[[jax.Array, Level], Denoised]
"""(x_t [B, ...], its level) -> the network's (x_0, eps), already clipped or thresholded."""

Carry = Any
"""The state of a stepper from step to step: any tree of arrays of constant shapes."""


@runtime_checkable
class Stepper(Protocol):
    """One sampler. The loop around it is ``loop.integrate``."""

    def rows(self, schedule: Schedule) -> Any:
        """Returns a tree of arrays [T], the coefficients of each step of the schedule."""
        ...

    def init(self, x_T: jax.Array) -> Carry:
        """Returns the carry before the first step."""
        ...

    def step(
        self, predict: Predict, x_t: jax.Array, row: Any, noise: Callable[[], jax.Array], carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """Returns x_{t-1} and the next carry.

        Args:
            predict: evaluates the network.
            x_t: float32[B, ...].
            row: this step's slice of ``rows``.
            noise: returns the normals of this step [B, ...], the same however often it is called.
            carry: the state after the previous step.
        """
        ...


class DdpmRow(NamedTuple):
    """The coefficients of DDPM; each field float32[steps]."""

    level: Level
    x_0_weight: np.ndarray  # c_t
    x_t_weight: np.ndarray  # d_t
    std: np.ndarray  # sigma_t; 1 for a learned variance, 0 at the last step
    log_small: np.ndarray  # log beta_tilde_t
    log_large: np.ndarray  # log beta_t


@dataclasses.dataclass(frozen=True)
class Ddpm:
    """Ancestral sampling, eq. (1), with a variance of ``variance.VARIANCES``, or "analytic" (needs the statistics)."""

    variance: str = "fixed_small"
    noise_statistics: NoiseStatistics | None = None

    def __post_init__(self) -> None:
        choose("variance", self.variance, dict.fromkeys((*variance.VARIANCES, "analytic")))
        if self.variance == "analytic" and self.noise_statistics is None:
            raise UserError(
                "variance 'analytic' needs the network's noise statistics: measure them by "
                "`dalle2 evaluate SYSTEM --measures noise_statistics --stage STAGE`"
            )

    def _std(self, schedule: Schedule) -> np.ndarray:
        if self.variance in variance.LEARNED:
            return np.ones(schedule.num_steps)
        if self.variance == "analytic" and self.noise_statistics is not None:
            return np.sqrt(variance.analytic(schedule, self.noise_statistics))
        return np.sqrt(schedule.posterior_variance if self.variance == "fixed_small" else schedule.betas)

    def rows(self, schedule: Schedule) -> DdpmRow:
        std = self._std(schedule)
        std[0] = 0.0
        tables = schedule.posterior_mean_x_0, schedule.posterior_mean_x_t, std, *variance.bounds(schedule)
        return DdpmRow(schedule.levels, *float32(*tables))

    def init(self, x_T):
        return ()

    def step(self, predict, x_t, row, noise, carry):
        pair = predict(x_t, row.level)
        mean = row.x_0_weight * pair.x_0 + row.x_t_weight * x_t
        std = row.std
        if self.variance in variance.LEARNED:
            std = std * jnp.exp(0.5 * variance.mixed(self.variance, pair.variance, row.log_small, row.log_large))
        return mean + std * noise(), carry


class DdimRow(NamedTuple):
    """The coefficients of DDIM; each field float32[steps]."""

    level: Level
    signal_rate_prev: np.ndarray  # sqrt(alpha_bar')
    noise_rate_prev: np.ndarray  # sqrt(1 - alpha_bar')
    fresh: np.ndarray  # r_t, the share of the noise variance that is new noise at eta = 1
    old: np.ndarray  # 1 - r_t


@dataclasses.dataclass(frozen=True, eq=False)
class Ddim:
    """DDIM, eq. (2)-(4). eta in [0, 1], one number or one for each example, may be traced.

    No normals are generated while it is 0 for all examples.
    """

    eta: PerExample = 0.0

    def rows(self, schedule: Schedule) -> DdimRow:
        noise_var, noise_var_prev = 1.0 - schedule.alpha_bar, 1.0 - schedule.alpha_bar_prev
        fresh = schedule.betas / noise_var
        old = (1.0 - schedule.betas) * noise_var_prev / noise_var
        tables = schedule.signal_rate_prev, schedule.noise_rate_prev, fresh, old
        return DdimRow(schedule.levels, *float32(*tables))

    def init(self, x_T):
        return ()

    def step(self, predict, x_t, row, noise, carry):
        pair = predict(x_t, row.level)
        eta = jnp.asarray(self.eta, jnp.float32).reshape((-1,) + (1,) * (x_t.ndim - 1))
        towards = row.noise_rate_prev * jnp.sqrt(row.old + row.fresh * (1 - eta) * (1 + eta))
        sigma = eta * row.noise_rate_prev * jnp.sqrt(row.fresh)
        z = jax.lax.cond(jnp.any(eta > 0), noise, lambda: jnp.zeros_like(x_t))
        return row.signal_rate_prev * pair.x_0 + towards * pair.eps + sigma * z, carry


class InversionRow(NamedTuple):
    """The coefficients of inversion; each field float32[steps]."""

    level: Level
    signal_rate_next: np.ndarray  # sqrt(alpha_bar_{t+1}); 0 after the last
    noise_rate_next: np.ndarray  # sqrt(1 - alpha_bar_{t+1})


@dataclasses.dataclass(frozen=True)
class InverseDdim:
    """DDIM inversion, eq. (5). It goes from clean to noisy: ``loop.integrate`` takes its rows cleanest first.

    The clean image takes the place of x at the first level. The last step would end in pure noise, a level that no
    sampler starts from. With ``skip_last``, which Dhariwal & Nichol found better, inversion ends where DDIM starts.
    """

    skip_last: bool = True

    def rows(self, schedule: Schedule) -> InversionRow:
        following = np.append(schedule.alpha_bar[1:], 0.0)
        tables = np.sqrt(following), np.sqrt(1.0 - following)
        row = InversionRow(schedule.levels, *float32(*tables))
        return jax.tree.map(lambda table: table[:-1], row) if self.skip_last else row

    def init(self, x_T):
        return ()

    def step(self, predict, x_t, row, noise, carry):
        pair = predict(x_t, row.level)
        return row.signal_rate_next * pair.x_0 + row.noise_rate_next * pair.eps, carry
