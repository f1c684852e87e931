"""AdamW with warm-up, a learning-rate schedule, gradient clipping, and weight decay by rules over parameter names.

All of the paper's models use Adam with decoupled weight decay (Ramesh et al. 2022, App. C, Table 3). `ema_update`
averages the weights.
"""

import dataclasses
import functools
import re
import warnings
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dalle2_jax.errors import ConfigError, SystemWarning
from dalle2_jax.training.configs import OptimConfig
from dalle2_jax.training.sharding import path_name
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


ONE_FOR_EACH = r"(^|/)(qkv|q|kv|context_kv|fc|image_token_proj)/kernel$"
"""Kernels [D, ..., K] of one axis of inputs: a matrix [D, K] for each index between."""

MUON_MOMENTUM = 0.95
"""Muon's decay of the momentum; ``beta1`` is that of Adam."""

MUON_RMS = 0.2
"""Root mean square of Muon's updates at a learning rate of 1, about that of Adam's (Liu et al. 2025, section 2.2)."""

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""The coefficients of Muon's iterations (Jordan et al. 2024). With a row for each of them optax makes a loop; with one
row for all it would make five copies, which take half as long again to compile and run no faster."""


class Optimizer(NamedTuple):
    """An ``optax.GradientTransformation``, and its learning rate.

    Attributes:
      init: parameters -> state.
      update: (gradients, state, parameters) -> (changes of the parameters, state).
      learning_rate: number of finished steps, int32[] -> the learning rate of the next step, float32[].
      sam_rho: see `OptimConfig`.
      sam_batch: see `OptimConfig`.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: optax.Schedule
    sam_rho: float = 0.0
    sam_batch: int = 0


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
    """Returns the chain of gradient clipping, Adam, Adafactor or Muon, decoupled weight decay and learning rate.

    The state's structure follows from `STATE_FIELDS` alone, so that a run may continue with other values.

    Args:
      config: the stage's section ``optim``.
      total_steps: of the run, for the schedule.
      decay_rules: the stage's own, see `decay_mask`.
    """
    return _optimizer(config, warmup_steps(config, total_steps), total_steps, decay_rules)


@functools.lru_cache(maxsize=8)  # equal optimizers are one object: see `make_train_step`
def _optimizer(config: OptimConfig, warmup: int, total_steps: int, decay_rules: DecayRules) -> Optimizer:
    schedule = _rate(config, warmup, total_steps)
    rule = _update_rule(config, schedule, functools.partial(decay_mask, rules=decay_rules))
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # optax raises floats to the power of an integer count, which strict promotion forbids
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    def rate(done: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(schedule(done), jnp.float32)

    return Optimizer(chain.init, update, rate, config.sam_rho, config.sam_batch)


def _update_rule(config: OptimConfig, schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    """Returns AdamW, Muon, or Adafactor with decoupled weight decay and without a scale by the size of parameters.

    Muon updates a matrix by the semi-orthogonal one nearest to its momentum, from five Newton-Schulz iterations (Jordan
    et al. 2024; Liu et al. 2025, arXiv 2502.16982, eq. 1 and 4). Other parameters have Adam with Nesterov's momentum
    (Dozat 2016), without weight decay.
    Adafactor's second moment decays as 1 - t^-0.8, and updates are clipped to a root mean square of 1 a parameter
    (Shazeer & Stern 2018, sections 6 and 7.2). With ``beta1`` 0 it stores no first moment.
    """
    mu_dtype = None if config.mu_dtype == "float32" else config.mu_dtype
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            mu_dtype=mu_dtype,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    if config.name == "muon":
        return optax.contrib.muon(
            schedule,
            ns_coeffs=NEWTON_SCHULZ,
            beta=MUON_MOMENTUM,
            eps=config.eps,
            mu_dtype=mu_dtype,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=cast(Any, matrix_axes),
            consistent_rms=MUON_RMS,
        )
    momentum = [optax.ema(config.beta1, debias=False, accumulator_dtype=mu_dtype)] if config.beta1 else []
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        *momentum,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def matrix_axes(params: Params) -> Any:
    """Returns the axes of each kernel that Muon takes as a matrix, and None for parameters that Adam updates.

    A matrix has a kernel's inputs, such as the window and the channels of a convolution [H, W, C, D], and its outputs.
    Of `ONE_FOR_EACH` each head and each of queries, keys and values is a matrix, as is each layer of a scan.
    """

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_name(path)
        first = int("blocks" in name.split("/"))
        last = leaf.ndim - 1
        if not name.endswith("kernel") or last <= first:
            return None
        inputs = (first,) if re.search(ONE_FOR_EACH, name) else tuple(range(first, last))
        return optax.contrib.MuonDimensionNumbers(inputs, last)

    return jax.tree_util.tree_map_with_path(axes, params)


STATE_FIELDS = ("clip_norm", "name", "beta1", "mu_dtype")
"""Fields that may change the structure of the optimizer's state."""


def state_structure(config: OptimConfig) -> Any:
    """Returns the tree of dtypes of the optimizer's state; a checkpoint restores only into the state that it has."""
    optimizer = make_optimizer(config, 0)
    state = jax.eval_shape(optimizer.init, {"kernel": jax.ShapeDtypeStruct((), jnp.float32)})
    return jax.tree.structure(state), [leaf.dtype for leaf in jax.tree.leaves(state)]


def changed_state_field(stored: OptimConfig, requested: OptimConfig) -> str | None:
    """Returns the field whose change gives the optimizer's state another form; None if a run may continue."""
    for name in STATE_FIELDS:
        changed = dataclasses.replace(stored, **{name: getattr(requested, name)})
        if state_structure(changed) != state_structure(stored):
            return name
    return None


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
