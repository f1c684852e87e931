"""Which timesteps to train on: uniformly, or more often where the loss varies.

Importance sampling by the second moment of the loss (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 18):

    p_t  proportional to  sqrt(E[L_t^2]),        loss = E_{t ~ p} [L_t / (T p_t)]             (1)

with the moment taken over the last `HISTORY` losses of each step, and p uniform until every step has so
many. A share of `UNIFORM` stays uniform, so that no step is forgotten. The losses are part of what
training carries from step to step, so a resumed run goes on exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

HISTORY, UNIFORM = 10, 0.001
SAMPLERS = ("uniform", "loss_second_moment")


class LossHistory(NamedTuple):
    """The last losses of each step: a ring of `HISTORY` places, and how many were ever written."""

    losses: Float[Array, "T H"]
    counts: Int[Array, "T"]


def empty_history(num_steps: int, length: int = HISTORY) -> LossHistory:
    """Returns the history before the first step."""
    return LossHistory(jnp.zeros((num_steps, length), jnp.float32), jnp.zeros(num_steps, jnp.int32))


def probabilities(history: LossHistory, uniform: float = UNIFORM) -> Float[Array, "T"]:
    """Returns p of eq. (1)."""
    num_steps, length = history.losses.shape
    moment = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    total = jnp.sum(moment)
    shares = jnp.where(total > 0, moment / jnp.where(total > 0, total, 1.0), 1.0 / num_steps)
    known = jnp.all(history.counts >= length)
    return jnp.where(known, shares * (1 - uniform) + uniform / num_steps, 1.0 / num_steps)


def record(history: LossHistory, t: Int[Array, "B"], losses: Float[Array, "B"]) -> LossHistory:
    """Returns the history with a batch's losses, each in the place of its step's oldest.

    The same t may come several times, even more often than there are places: the last ones stay.
    """
    length = history.losses.shape[1]
    same = t[:, None] == t[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)
    later = jnp.sum(jnp.triu(same, 1), axis=1)
    place = (history.counts[t] + earlier) % length
    # A row past the end is dropped: of more losses than places only the last find one.
    row = jnp.where(later < length, t, history.losses.shape[0])
    written = history.losses.at[row, place].set(losses.astype(jnp.float32), mode="drop")
    return LossHistory(written, history.counts.at[t].add(1))


def draw(
    key: Key[Array, ""], batch: int, num_steps: int, history: LossHistory | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Returns t, uniform or by eq. (1), and the weight 1 / (T p_t) of each example."""
    if history is None:
        return jax.random.randint(key, (batch,), 0, num_steps), jnp.ones(batch)
    p = probabilities(history)
    t = jax.random.categorical(key, jnp.log(p), shape=(batch,))
    return t, 1.0 / (num_steps * p[t])
