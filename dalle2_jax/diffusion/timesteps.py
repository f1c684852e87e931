"""Which timesteps to train on: uniformly, or more often where the loss varies.

Importance sampling by the second moment of the loss (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 18):

    p_t  proportional to  sqrt(E[L_t^2]),        loss = E_{t ~ p} [L_t / (T p_t)]             (1)

with the moment taken over the last `HISTORY` losses of each step, and p uniform until every step has that many.
A share of `UNIFORM` stays uniform, so that every step is trained. The history is part of the training state, so a
resumed run continues exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.types import WeightedMean

HISTORY, UNIFORM = 10, 0.001
SAMPLERS = ("uniform", "loss_second_moment")


class LossHistory(NamedTuple):
    """The last losses of each step: a ring buffer of `HISTORY` entries, and the number ever written."""

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
    """Returns the history with a batch's losses, each in place of the oldest loss of its step.

    The same t may occur several times, even more often than the history is long: then the last losses are stored.
    """
    length = history.losses.shape[1]
    same = t[:, None] == t[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)
    later = jnp.sum(jnp.triu(same, 1), axis=1)
    place = (history.counts[t] + earlier) % length
    # Rows past the end are dropped: of too many losses of one step only the last are written.
    row = jnp.where(later < length, t, history.losses.shape[0])
    written = history.losses.at[row, place].set(losses.astype(jnp.float32), mode="drop")
    return LossHistory(written, history.counts.at[t].add(1))


def sample_timesteps(
    key: Key[Array, ""], batch: int, num_steps: int, history: LossHistory | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples t uniformly or, with a history, by eq. (1); returns t and the weight 1 / (T p_t) of each example."""
    if history is None:
        t = rng.randint(key, (batch,), 0, num_steps)
    else:
        logits = jnp.log(probabilities(history))
        t = rng.per_row(lambda key, shape: jax.random.categorical(key, logits, shape=shape), key, (batch,))
    return t, importance(t, num_steps, history)


def importance(t: Int[Array, "B"], num_steps: int, history: LossHistory | None = None) -> Float[Array, "B"]:
    """Returns the weight 1 / (T p_t) of eq. (1) for given timesteps; 1 where they are uniform."""
    return jnp.ones(t.shape) if history is None else 1.0 / (num_steps * probabilities(history)[t])


def quartile_losses(
    t: Int[Array, "B"], num_steps: int, losses: Float[Array, "B"], weights: Float[Array, "B"]
) -> dict[str, WeightedMean]:
    """Returns the mean loss over each quarter of the timesteps, the least noise first.

    Args:
      t: the step of each example.
      num_steps: T.
      losses: of the examples.
      weights: 1 / (T p_t) of eq. (1), so that the mean is that of uniform timesteps.

    Returns:
      "loss_quartile_1" for t below T / 4, to "loss_quartile_4".
    """
    quartile = jnp.minimum(4 * t // num_steps, 3)
    members = jnp.where(quartile[None] == jnp.arange(4)[:, None], weights[None], 0.0)
    totals, counts = jnp.sum(members * losses[None], axis=1), jnp.sum(members, axis=1)
    return {f"loss_quartile_{n + 1}": WeightedMean(totals[n], counts[n]) for n in range(4)}
