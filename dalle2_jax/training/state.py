"""The state of a training run."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from dalle2_jax.stages.base import Variables
from dalle2_jax.training.optim import Optimizer
from dalle2_jax.types import Params


class Start(NamedTuple):
    """Parameters and statistics that replace initial ones; None for initial ones."""

    params: Params | None = None
    stats: Params | None = None


@flax.struct.dataclass
class TrainState:
    """Everything a resumed run needs besides its config; random keys follow from ``step``."""

    step: jax.Array  # int32[], number of finished steps
    params: Params  # float32
    ema: Params  # float32, moving average of params, used for sampling
    opt_state: Any
    stats: Params  # batch norm of CLIP's ResNet, the code book of the autoregressive prior, else empty
    ema_stats: Params  # moving average of the statistics that TrainingRules.averaged_stats names

    def trees(self) -> dict[str, Any]:
        """Returns the trees of a checkpoint by name; ``step`` is the checkpoint's number."""
        return {
            "params": self.params,
            "ema": self.ema,
            "opt_state": self.opt_state,
            "stats": self.stats,
            "ema_stats": self.ema_stats,
        }

    @classmethod
    def from_trees(cls, step: int, trees: dict[str, Any], averaged_stats: tuple[str, ...] = ()) -> "TrainState":
        """Returns the state of a checkpoint: the inverse of ``trees``.

        Args:
          step: number of finished steps.
          trees: by name. Without "ema_stats", as in checkpoints of earlier releases, the average starts at "stats".
          averaged_stats: names of the statistics that are averaged.
        """
        start = {"ema_stats": copied(trees["stats"], averaged_stats)} if "ema_stats" not in trees else {}
        return cls(step=jnp.asarray(step, jnp.int32), **trees, **start)

    @property
    def averaged(self) -> Variables:
        """The averaged weights and statistics, which sampling and evaluation use."""
        return Variables(self.ema, {**self.stats, **self.ema_stats})

    @classmethod
    def create(
        cls,
        params: Params,
        stats: Params,
        optimizer: Optimizer,
        averaged_stats: tuple[str, ...] = (),
    ) -> "TrainState":
        """Returns the state before the first step; averages start at the parameters and statistics."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            stats=stats,
            ema_stats=copied(stats, averaged_stats),
        )


def copied(stats: Params, names: tuple[str, ...]) -> Params:
    """Returns copies of some statistics: a donated state must not hold a buffer twice."""
    return jax.tree.map(jnp.copy, {name: stats[name] for name in names})
