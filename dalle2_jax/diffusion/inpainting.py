"""Inpainting: sampling with some pixels known (RePaint).

After each denoising step the known pixels are put in at the noise level that was reached (Lugmayr et al. 2022,
arXiv 2201.09865, eq. 8), with z ~ N(0, I):

    x_{t-1} <- m (sqrt(alpha_bar') x_known + sqrt(1 - alpha_bar') z) + (1 - m) x_{t-1}        (1)

The unknown pixels are then only consistent with the last version of the known ones. So noise is added again from
time to time,

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z                                           (2)

and the steps are repeated (ibid., section 4.2, "resampling"): a `StepPlan` is the order of denoising and re-noising.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion.schedule import Schedule, float32
from dalle2_jax.errors import UserError


class Jump(NamedTuple):
    """The coefficients of eq. (2), float32[steps]."""

    signal: np.ndarray
    noise: np.ndarray


class StepPlan(NamedTuple):
    """The order in which the loop takes the steps of a schedule.

    Attributes:
        indices: the index into the schedule of each step of the loop.
        renoise: whether the loop adds noise at this step, eq. (2), instead of denoising.
    """

    indices: Int[np.ndarray, "steps"]
    renoise: Bool[np.ndarray, "steps"]

    @property
    def starts(self) -> Int[np.ndarray, "steps"]:
        """The index at which each step's run of denoising steps started: at the beginning, or after re-noising."""
        starting = ~self.renoise & np.append(True, self.renoise[:-1])
        return self.indices[starting][np.cumsum(starting) - 1]

    def jumps(self, schedule: Schedule) -> Jump:
        """Returns the coefficients of eq. (2) for each step of the loop."""
        beta = schedule.betas[self.indices]
        return Jump(*float32(np.sqrt(1.0 - beta), np.sqrt(beta)))


def one_way(num_steps: int, ascending: bool = False) -> StepPlan:
    """Returns the plan that takes every step once: the noisiest first, or, ascending, the cleanest."""
    indices = np.arange(num_steps, dtype=np.int32)
    return StepPlan(indices if ascending else indices[::-1], np.zeros(num_steps, bool))


def resampling(num_steps: int, jump: int, times: int) -> StepPlan:
    """Returns the plan that takes every ``jump`` steps ``times`` times, adding noise in between.

    Args:
        num_steps: of the respaced schedule.
        jump: the number of steps that are repeated.
        times: how often they are taken, at least 1.

    Raises:
        UserError: a jump or number of times below 1, or a jump as long as the schedule.
    """
    if jump < 1 or times < 1 or jump >= num_steps:
        raise UserError(f"resampling repeats 1 to {num_steps - 1} steps at least once, not {jump} steps {times} times")
    left = dict.fromkeys(range(0, num_steps - jump, jump), times - 1)
    indices, renoise, level = [], [], num_steps - 1
    while level >= 0:
        indices.append(level)
        renoise.append(False)
        level -= 1
        if left.get(level, 0):
            left[level] -= 1
            indices += range(level + 1, level + jump + 1)
            renoise += [True] * jump
            level += jump
    return StepPlan(np.array(indices, np.int32), np.array(renoise))


class Inpainting(NamedTuple):
    """The known pixels: where ``mask`` is true, x_0 is ``image``."""

    image: Float[Array, "B *shape"]
    mask: Bool[Array, "B *shape"]  # or with 1 in place of the channels

    def put(
        self, schedule: Schedule, x_prev: Float[Array, "B *shape"], index: Int[Array, ""], keys: Key[Array, "B"]
    ) -> Float[Array, "B *shape"]:
        """Returns x after step ``index`` with the known pixels put in, eq. (1); ``keys`` are those of the step."""
        tables = float32(schedule.signal_rate_prev, schedule.noise_rate_prev)
        signal_rate, noise_rate = (jnp.asarray(table)[index] for table in tables)
        z = rng.normal(jax.vmap(lambda key: rng.stream(key, "known"))(keys), x_prev.shape[1:])
        return jnp.where(self.mask, signal_rate * self.image + noise_rate * z, x_prev)
