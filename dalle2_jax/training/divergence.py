"""Detects training that diverges before it is saved, and reports it in one line with a remedy.

A loss can be finite while a parameter is not (if the update after it overflowed), so that metrics are not enough. The
state is checked before each checkpoint: one reduction on the devices per array, and nothing in the train step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.errors import UserError
from dalle2_jax.training.reporting.metrics import mean_of_finite
from dalle2_jax.training.sharding import on_devices
from dalle2_jax.training.state import TrainState
from dalle2_jax.types import Metrics
from dalle2_jax.workdir.checkpoints import Checkpoints

NAMES = {
    "params": "parameters",
    "ema": "averaged parameters",
    "opt_state": "optimizer state",
    "stats": "statistics",
    "ema_stats": "averaged statistics",
}
"""Names of the trees of a state in messages."""


@jax.jit  # of one array: parameters, averages and moments of one shape share a program, which compiles quickly
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _finite_leaves(tree: Any) -> list[jax.Array]:
    """Returns bool[] on the devices for each array of floats."""
    return [_is_finite(on_devices(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def not_finite(state: TrainState) -> str | None:
    """Returns the name of the first part of a state, in the order of `NAMES`, that has a NaN or infinity, else None.

    A collective operation: in a run of several processes all of them must call it.
    """
    finite = jax.device_get({name: _finite_leaves(tree) for name, tree in state.trees().items()})
    return next((words for name, words in NAMES.items() if not all(finite[name])), None)


class FiniteCheckpoints:
    """Writes the checkpoints of a run, and raises UserError if its metrics or its state are not finite.

    Args:
      checkpoints: where they are written.
      last: step of the newest checkpoint, 0 if there is none.
      remedy: a sentence about what the user can do.
    """

    def __init__(self, checkpoints: Checkpoints, last: int, remedy: str):
        self.last = last
        self._checkpoints, self._remedy = checkpoints, remedy

    def means(self, history: list[tuple[int, Metrics]]) -> dict[str, float]:
        """Returns the mean of each metric over (step, metrics) pairs. UserError if a value is not finite."""
        try:
            return mean_of_finite(history)
        except FloatingPointError as error:
            raise self.diverged(str(error)) from error

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint.

        Raises:
          UserError: the state is not finite, and is not written; or a checkpoint cannot be written.
        """
        wrong = not_finite(state)
        if wrong:
            raise self.diverged(f"the {wrong} became NaN or infinite by step {step}")
        self._checkpoints.save(step, state.trees(), data_state)
        self.last = step

    def diverged(self, reason: str) -> UserError:
        """Returns the error that ends the run."""
        good = f"step {self.last}" if self.last else "none"
        return UserError(f"training stopped: {reason}; the last good checkpoint is {good}. {self._remedy}")
