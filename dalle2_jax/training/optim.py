"""AdamW with warm-up, decay, clipping, and weight decay by rules over parameter names.

All of the paper's models use Adam with decoupled weight decay (Ramesh et al. 2022, App. C,
Table 3). The average of the weights is kept by ``ema_update``.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.types import Params, UsageError

DECAY_RULES = (
    # Matrices that multiply activations are decayed; tables, gains, offsets and temperatures are not.
    (r"(^|/)(kernel|lora_a|lora_b)$", True),
    (r"(^|/)(bias|position_bias|scale|embedding|logit_scale)$", False),
    (r"(^|/)\w*(embedding|query|token|null|cls)\w*$", False),
)
"""(pattern over the parameter's path, decayed?), first match wins."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer of one stage.

    ``schedule`` is "constant" or "cosine" (to zero at the last step), after ``warmup_steps``
    of linear warm-up. ``clip_norm`` 0 turns clipping by the global norm off.
    """

    lr: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate. UsageError on an unknown schedule or a warm-up past the end."""
    if config.warmup_steps >= total_steps > 0 and config.warmup_steps:
        raise UsageError(f"config.optim.warmup_steps {config.warmup_steps} leaves no step of total_steps {total_steps}")
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(total_steps - config.warmup_steps, 1))
    else:
        raise UsageError(f"config.optim.schedule {config.schedule!r} is unknown: use 'constant' or 'cosine'")
    if not config.warmup_steps:
        return after
    # The first step already moves: a rate of 0 at step 0 would waste it.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def path_name(path: tuple) -> str:
    """Returns a tree path as "a/b/c"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def decay_mask(params: Params) -> Params:
    """Returns a tree of bools, true where weight decay applies. ValueError for a name no rule covers."""

    def covered(path: tuple, _: jax.Array) -> bool:
        name = path_name(path)
        for pattern, decayed in DECAY_RULES:
            if re.search(pattern, name):
                return decayed
        raise ValueError(f"no weight-decay rule covers parameter {name}")

    return jax.tree_util.tree_map_with_path(covered, params)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the whole chain: clip, Adam, decoupled decay, learning rate."""
    adamw = optax.adamw(
        learning_rate(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        # optax raises floats to the power of an integer count, which strict promotion forbids
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)


def ema_update(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Returns the average after ``step`` finished steps.

    The decay grows as min(decay, (1 + step) / (10 + step)), so that short runs do not average
    over their random start; it reaches 0.9999 after about 90,000 steps.
    """
    done = step.astype(jnp.float32)
    now = jnp.minimum(decay, (1.0 + done) / (10.0 + done))
    return jax.tree.map(lambda old, new: old + (1.0 - now) * (new - old), ema, params)
