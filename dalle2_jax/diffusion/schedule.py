"""Noise schedules: how much of the picture and how much noise there is at each step.

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

    linear   beta from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T           (Ho et al. sec. 4)  (8)
    cosine   alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, u = i / T, beta <= 0.999
             (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)                               (9)

*Respacing* (Nichol & Dhariwal sec. 4) keeps the alpha_bar of some of the timesteps and derives the
betas of the jumps between them:

    beta_k = 1 - alpha_bar_{t_k} / alpha_bar_{t_{k-1}}                                       (10)

An *index* counts the steps of a schedule; a *timestep* is what the network was trained on. They are
the same until a schedule is respaced; ``Schedule.timesteps`` maps one to the other.

Tables are float64 numpy, cast to float32 once where they enter a compiled program. Both makers
remember what they made, so equal arguments return the same object, which is hashed by identity.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dalle2_jax.types import UserError, choose


class Level(NamedTuple):
    """One noise level (scalars), or all the levels of a schedule (arrays [T])."""

    timestep: jax.Array | np.ndarray  # int32, what the network is told
    signal_rate: jax.Array | np.ndarray  # float32, sqrt(alpha_bar)
    noise_rate: jax.Array | np.ndarray  # float32, sqrt(1 - alpha_bar)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of T steps; every table is float64[T], indexed by step, read-only.

    Attributes:
        betas: variance added by each step, in (0, 1], eq. (1).
        timesteps: the network's timestep of each step, ascending.
    """

    betas: Float[np.ndarray, "T"]
    timesteps: Int[np.ndarray, "T"]

    def __post_init__(self):
        self.betas.flags.writeable = False
        self.timesteps.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @functools.cached_property
    def alpha_bar(self) -> Float[np.ndarray, "T"]:
        """Share of the signal's variance that is left, eq. (2)."""
        table = np.cumprod(1.0 - self.betas)
        table.flags.writeable = False
        return table

    @property
    def alpha_bar_prev(self) -> Float[np.ndarray, "T"]:
        """alpha_bar of the step before; 1 before the first."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def signal_rate(self) -> Float[np.ndarray, "T"]:
        """sqrt(alpha_bar), eq. (3)."""
        return np.sqrt(self.alpha_bar)

    @property
    def noise_rate(self) -> Float[np.ndarray, "T"]:
        """sqrt(1 - alpha_bar), eq. (3)."""
        return np.sqrt(1.0 - self.alpha_bar)

    @property
    def posterior_mean_x_0(self) -> Float[np.ndarray, "T"]:
        """Weight of x_0 in the posterior mean, eq. (5)."""
        return self.betas * np.sqrt(self.alpha_bar_prev) / (1.0 - self.alpha_bar)

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
    def levels(self) -> Level:
        """All the noise levels, ready for a compiled program: int32[T], float32[T], float32[T]."""
        return Level(
            self.timesteps.astype(np.int32), self.signal_rate.astype(np.float32), self.noise_rate.astype(np.float32)
        )


def _linear(num_steps: int) -> np.ndarray:
    """Betas of eq. (8)."""
    if num_steps <= 20:
        raise UserError(f"the linear schedule needs more than 20 steps, not {num_steps}; use 'cosine'")
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


def _cosine(num_steps: int) -> np.ndarray:
    """Betas of eq. (9)."""
    u = np.arange(num_steps + 1) / num_steps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


_BETAS = {"linear": _linear, "cosine": _cosine}


@functools.lru_cache(maxsize=None)
def make_schedule(name: str, num_steps: int) -> Schedule:
    """Returns the schedule "linear" (eq. 8) or "cosine" (eq. 9) of num_steps steps.

    Raises UserError on an unknown name or a number of steps that the schedule cannot have.
    """
    betas = choose("noise schedule", name, _BETAS)
    if num_steps < 1:
        raise UserError(f"a noise schedule needs at least 1 step, not {num_steps}")
    return Schedule(betas(num_steps), np.arange(num_steps))


def respace(schedule: Schedule, spec: int | str) -> Schedule:
    """Returns the schedule of a part of the steps, eq. (10); the same object for the same arguments.

    Args:
        schedule: the schedule to take steps from, T steps.
        spec: which steps, in the grammar of the public code (guided-diffusion, GLIDE):
            50 or "50"     50 steps evenly spaced from the first to the last, both included;
                           1 takes the last alone
            "10,10,3,2,2"  so many steps, likewise, in each of equal sections, cleanest first
            "ddim50"       every (T/50)-th step from the first (Song et al. 2021, sec. 4)
            "fast27"       "10,10,3,2,2", whose last step is drawn two back from pure noise

    Raises:
        UserError: more steps than there are, a stride that does not divide, or no such grammar.
    """
    return _respace(schedule, str(spec).replace(" ", ""))


@functools.lru_cache(maxsize=None)
def _respace(schedule: Schedule, spec: str) -> Schedule:
    kept = _kept_steps(schedule.num_steps, spec)
    if len(kept) == schedule.num_steps:
        return schedule
    alpha_bar = schedule.alpha_bar[kept]
    betas = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return Schedule(betas, schedule.timesteps[kept])


def _kept_steps(num_steps: int, spec: str) -> np.ndarray:
    """Returns the indices that a respacing keeps, ascending."""
    if spec == "fast27":
        kept = _kept_steps(num_steps, "10,10,3,2,2")
        kept[-1] = num_steps - 3
        return kept
    if spec.startswith("ddim") and spec[4:].isdecimal():
        return _strided(num_steps, int(spec[4:]))
    parts = spec.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"not a respacing: {spec!r}; write one like 50, 'ddim50', '10,10,3,2,2' or 'fast27'")
    counts = [int(part) for part in parts]
    if counts == [1]:
        # Even spacing would keep step 0, from which noise cannot become a picture.
        return np.array([num_steps - 1])
    # Sections differ by one step at most, the longer ones first.
    sections = np.array_split(np.arange(num_steps), len(counts))
    return np.concatenate([_even(section, count) for section, count in zip(sections, counts, strict=True)])


def _even(section: np.ndarray, count: int) -> np.ndarray:
    """Returns count of the steps of a section, from its first to its last."""
    if count > len(section):
        raise UserError(f"a respacing asks for {count} of {len(section)} steps; ask for at most {len(section)}")
    stride = (len(section) - 1) / (count - 1) if count > 1 else 0.0
    # A running sum and half-to-even rounding, as the public code has, decide the ties.
    return section[np.rint(np.cumsum([0.0] + [stride] * (count - 1))).astype(int)]


def _strided(num_steps: int, count: int) -> np.ndarray:
    """Returns every k-th step, for the smallest k that leaves exactly count of them."""
    strides = {len(range(0, num_steps, k)): k for k in range(num_steps, 0, -1)}
    if count not in strides:
        nearest = min(strides, key=lambda n: abs(n - count))
        raise UserError(f"'ddim{count}' does not divide {num_steps} steps; the nearest that does is 'ddim{nearest}'")
    return np.arange(0, num_steps, strides[count])
