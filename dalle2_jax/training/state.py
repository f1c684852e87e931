"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dalle2_jax.types import Params


@flax.struct.dataclass
class TrainState:
    """Everything a resumed run needs besides its config; random keys follow from ``step``."""

    step: jax.Array  # int32[], number of finished steps
    params: Params  # float32
    ema: Params  # float32, the weights that sampling uses
    opt_state: Any
    stats: Params  # BatchNorm's of CLIP's ResNet, the code book of the autoregressive prior, else empty

    def trees(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, by name; ``step`` is the checkpoint's own number."""
        return {"params": self.params, "ema": self.ema, "opt_state": self.opt_state, "stats": self.stats}

    @classmethod
    def from_trees(cls, step: int, trees: dict[str, Any]) -> "TrainState":
        """The inverse of ``trees``."""
        return cls(step=jnp.asarray(step, jnp.int32), **trees)

    @classmethod
    def create(cls, params: Params, stats: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first step; the average starts at the parameters."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            stats=stats,
        )
