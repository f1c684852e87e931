"""AdamW with warm-up, a learning-rate schedule, gradient clipping, and weight decay by rules over parameter names.

All of the paper's models use Adam with decoupled weight decay (Ramesh et al. 2022, App. C, Table 3). `ema_update`
averages the weights.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle2_jax.errors import ConfigError, SystemWarning
from dalle2_jax.ranges import BelowOne, Fraction, NonNegativeFloat, NonNegativeInt, Range
from dalle2_jax.types import Params

DecayRules = tuple[tuple[str, bool], ...]

DECAY_RULES: DecayRules = (
    # Matrices that multiply activations are decayed; tables, gains, offsets and temperatures are not.
    (r"(^|/)(kernel|lora_a|lora_b)$", True),
    (r"(^|/)(bias|position_bias|scale|embedding|logit_scale)$", False),
    (r"(^|/)\w*(embedding|query|token|null|cls)\w*$", False),
)
"""(pattern over the parameter's path, decayed?), first match wins. A stage's own rules go first.

The default is that of GPT. Ramesh et al. 2022 (App. C) give a weight decay for the priors only, and do not say which
parameters it applies to. CLIP's own rules are in ``stages.clip``.
"""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer of one stage.

    Attributes:
      lr: the learning rate after warm-up.
      warmup_steps: steps of linear warm-up; see `warmup_steps` for runs that are shorter.
      schedule: "constant", or "cosine" to zero at the last step.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, times the learning rate.
      clip_norm: maximal global norm of the gradients; 0 turns clipping off.
      ema_decay: largest decay of the averaged weights, see `ema_update`.
      sam_rho: rho of sharpness-aware minimisation, see `sharpness_aware`; 0 turns it off. The paper's CLIP has 0.1.
    """

    lr: Annotated[float, Range(0, 1_000, exclusive_min=True)] = 1e-4
    warmup_steps: NonNegativeInt = 0
    schedule: str = "constant"
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: Fraction = 1e-8
    weight_decay: Annotated[float, Range(0, 1_000)] = 0.0
    clip_norm: NonNegativeFloat = 1.0
    ema_decay: BelowOne = 0.9999
    sam_rho: Annotated[float, Range(0, 1_000)] = 0.0


class Optimizer(NamedTuple):
    """An ``optax.GradientTransformation``, and its learning rate.

    Attributes:
      init: parameters -> state.
      update: (gradients, state, parameters) -> (changes of the parameters, state).
      learning_rate: number of finished steps, int32[] -> the learning rate of the next step, float32[].
      sam_rho: see `OptimConfig`.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: optax.Schedule
    sam_rho: float = 0.0


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate. ConfigError for an unknown schedule."""
    return _rate(config, warmup_steps(config, total_steps), total_steps)


def _rate(config: OptimConfig, warmup: int, total_steps: int) -> optax.Schedule:
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(total_steps - warmup, 1))
    else:
        message = f"config.optim.schedule {config.schedule!r} is unknown: use 'constant' or 'cosine'"
        raise ConfigError(message, "optim.schedule")
    if not warmup:
        return after
    # The first step has a rate above 0, so that it is not wasted.
    rise = optax.linear_schedule(config.lr / warmup, config.lr, warmup)
    return optax.join_schedules([rise, after], [warmup])


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Returns the steps of warm-up of a run.

    They are those of the config, or a tenth of a run that is not longer than they are, such as a smoke test with
    another ``total_steps``, which a warning reports.
    """
    if not 0 < total_steps <= config.warmup_steps:
        return config.warmup_steps
    scaled = total_steps // 10
    warnings.warn(
        f"config.optim.warmup_steps {config.warmup_steps} is not less than total_steps {total_steps}: "
        f"this run warms up for {scaled} steps",
        SystemWarning,
        stacklevel=2,
    )
    return scaled


def path_name(path: tuple) -> str:
    """Returns a tree path as "a/b/c"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def decay_mask(params: Params, rules: DecayRules = ()) -> Params:
    """Returns a tree of bools, true where weight decay applies.

    Args:
      params: a tree of arrays or shapes.
      rules: a stage's own, which go before `DECAY_RULES`.

    Raises:
      ValueError: no rule covers a parameter.
    """

    def covered(path: tuple, _: jax.Array) -> bool:
        name = path_name(path)
        for pattern, decayed in (*rules, *DECAY_RULES):
            if re.search(pattern, name):
                return decayed
        raise ValueError(f"no weight-decay rule covers parameter {name}")

    return jax.tree_util.tree_map_with_path(covered, params)


def make_optimizer(config: OptimConfig, total_steps: int, decay_rules: DecayRules = ()) -> Optimizer:
    """Returns the chain of gradient clipping, Adam, decoupled weight decay and learning rate.

    The state's structure follows from ``bool(config.clip_norm)`` alone, so that a run may continue with other values.

    Args:
      config: the stage's section ``optim``.
      total_steps: of the run, for the schedule.
      decay_rules: the stage's own, see `decay_mask`.
    """
    return _optimizer(config, warmup_steps(config, total_steps), total_steps, decay_rules)


@functools.lru_cache(maxsize=8)  # equal optimizers are one object: see `make_train_step`
def _optimizer(config: OptimConfig, warmup: int, total_steps: int, decay_rules: DecayRules) -> Optimizer:
    schedule = _rate(config, warmup, total_steps)
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=functools.partial(decay_mask, rules=decay_rules),
    )
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # optax raises floats to the power of an integer count, which strict promotion forbids
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    def rate(done: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(schedule(done), jnp.float32)

    return Optimizer(chain.init, update, rate, config.sam_rho)


def sharpness_aware(loss: Callable[..., Any], rho: float) -> Callable[..., Any]:
    """Returns the value and gradient of a loss for sharpness-aware minimisation (Foret et al. 2021, eq. 2 and 3).

    With g the gradient at the parameters w, the result has the gradient at w + rho g / ||g||, and the value and outputs
    at w. Both have the same randomness. The perturbation is that of the global batch: the paper's CLIP has one for each
    replica of 64 examples.

    Args:
      loss: ``Stage.loss``.
      rho: norm of the perturbation; 0 gives the gradient at w.

    Returns:
      A function of the arguments of ``loss``, with the result of ``jax.value_and_grad(loss, has_aux=True)``.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if not rho:
        return value_and_grad

    def perturbed(params: Params, stats: Params, frozen: Any, key: jax.Array, batch: Any) -> Any:
        value, grads = value_and_grad(params, stats, frozen, key, batch)
        step = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
        sharp = jax.tree.map(lambda param, grad: param + step * grad, params, grads)
        return value, value_and_grad(sharp, stats, frozen, jax.random.clone(key), batch)[1]

    return perturbed


def state_structure(config: OptimConfig) -> Any:
    """Returns the tree structure of the optimizer's state; a checkpoint restores only into the structure it has."""
    optimizer = make_optimizer(config, 0)
    return jax.tree.structure(jax.eval_shape(optimizer.init, {"kernel": jax.ShapeDtypeStruct((), jnp.float32)}))


def ema_update(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Returns the exponential moving average of the parameters.

    Args:
      ema: the average so far.
      params: the parameters after ``step``.
      step: int32[], number of finished steps.
      decay: the largest decay.
    """
    now = ema_decay_at(step, decay)
    return jax.tree.map(lambda old, new: old + (1.0 - now) * (new - old), ema, params)


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """Returns the decay of the average after ``step`` finished steps, float32[].

    It grows as min(decay, (1 + step) / (10 + step)), so that the random initial parameters do not dominate the average
    of a short run; it reaches 0.9999 after about 90,000 steps.
    """
    done = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + done) / (10.0 + done))
