"""Sampling around pixels that are known.

After each step down, the known pixels are put in at the noise level that was reached (Lugmayr et al. 2022,
RePaint, arXiv 2201.09865, eq. 8), with z ~ N(0, I):

    x_{t-1} <- m (sqrt(alpha_bar') x_known + sqrt(1 - alpha_bar') z) + (1 - m) x_{t-1}        (1)

What is drawn around them then fits only their last version. So now and then some steps are climbed again,

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z                                           (2)

and taken anew (ibid., section 4.2): an `Itinerary` says which step each turn of the loop takes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion.schedule import Schedule, float32
from dalle2_jax.types import UserError


class Jump(NamedTuple):
    """The coefficients of eq. (2), float32[turns]."""

    signal: np.ndarray
    noise: np.ndarray


class Itinerary(NamedTuple):
    """Which step each turn takes, and whether it takes it down, with the network, or up, with noise."""

    indices: Int[np.ndarray, "turns"]
    climbs: Bool[np.ndarray, "turns"]

    @property
    def starts(self) -> Int[np.ndarray, "turns"]:
        """The step with which each turn's way down began: the first of all, or the first after a climb."""
        begins = ~self.climbs & np.append(True, self.climbs[:-1])
        return self.indices[begins][np.cumsum(begins) - 1]

    def jumps(self, schedule: Schedule) -> Jump:
        """Returns the coefficients of eq. (2) for each turn."""
        beta = schedule.betas[self.indices]
        return Jump(*float32(np.sqrt(1.0 - beta), np.sqrt(beta)))


def one_way(num_steps: int, ascending: bool = False) -> Itinerary:
    """Returns the way through every step once: the noisiest first, or, ascending, the cleanest."""
    indices = np.arange(num_steps, dtype=np.int32)
    return Itinerary(indices if ascending else indices[::-1], np.zeros(num_steps, bool))


def resampling(num_steps: int, jump: int, times: int) -> Itinerary:
    """Returns the way down that takes every stretch of ``jump`` steps ``times`` times, climbing in between.

    Raises:
        UserError: a jump or number of times below 1, or a jump longer than the way.
    """
    if jump < 1 or times < 1 or jump >= num_steps:
        raise UserError(
            f"resampling takes stretches of 1 to {num_steps - 1} steps at least once, not {jump} steps {times} times"
        )
    left = dict.fromkeys(range(0, num_steps - jump, jump), times - 1)
    indices, climbs, level = [], [], num_steps - 1
    while level >= 0:
        indices.append(level)
        climbs.append(False)
        level -= 1
        if left.get(level, 0):
            left[level] -= 1
            indices += range(level + 1, level + jump + 1)
            climbs += [True] * jump
            level += jump
    return Itinerary(np.array(indices, np.int32), np.array(climbs))


class Inpainting(NamedTuple):
    """What is known of the pictures: where ``mask`` is true, x_0 is ``picture``."""

    picture: Float[Array, "B *shape"]
    mask: Bool[Array, "B *shape"]  # or with 1 in place of the channels

    def put(
        self, schedule: Schedule, x_prev: Float[Array, "B *shape"], index: Int[Array, ""], keys: Key[Array, "B"]
    ) -> Float[Array, "B *shape"]:
        """Returns x after step ``index`` with what is known put in, eq. (1); ``keys`` are this turn's."""
        tables = float32(schedule.signal_rate_prev, schedule.noise_rate_prev)
        signal_rate, noise_rate = (jnp.asarray(table)[index] for table in tables)
        z = rng.normal(jax.vmap(lambda key: rng.stream(key, "known"))(keys), x_prev.shape[1:])
        return jnp.where(self.mask, signal_rate * self.picture + noise_rate * z, x_prev)
