"""The train step of all stages: pure, jitted, sharded, with a donated state."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import optax
from jax.sharding import Mesh

from dalle2_jax import rng
from dalle2_jax.stages.base import Stage, Variables, abstract_variables
from dalle2_jax.training.accumulation import Gradients, loss_and_gradients
from dalle2_jax.training.configs import HOST
from dalle2_jax.training.optim import Optimizer, ema_decay_at, ema_update
from dalle2_jax.training.sharding import logical_axes, replicated, tree_shardings
from dalle2_jax.training.sharpness import replica_gradients, sharpness_aware
from dalle2_jax.training.state import TrainState
from dalle2_jax.types import Batch, Metrics, Params

Step = Callable[[TrainState, Mapping[str, Variables], jax.Array, Batch], tuple[TrainState, Metrics]]


def train_step(
    stage: Stage,
    optimizer: Optimizer,
    ema_decay: float,
    state: TrainState,
    frozen: Mapping[str, Variables],
    key: jax.Array,
    batch: Batch,
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one step, and the step's metrics on the devices.

    Args:
      stage: what is trained.
      optimizer: the update rule.
      ema_decay: largest decay of the averaged weights.
      state: before the step.
      frozen: the variables of the stages that ``stage.requires`` names.
      key: the run's root key; the step's key follows from it and ``state.step``.
      batch: a global batch, as the stream yields it.
      accumulate: number of micro-batches in which the gradients are computed.
    """
    step_key = rng.at_step(rng.stream(key, "train"), state.step)

    def gradients(params: Params, key: jax.Array) -> Gradients:
        return loss_and_gradients(stage, accumulate, Variables(params, state.stats), frozen, key, batch)

    rho, size = optimizer.sam_rho, optimizer.sam_batch
    if rho and size:
        variables = Variables(state.params, state.stats)
        (loss, outputs), grads = replica_gradients(stage, rho, size, variables, frozen, batch)
    else:
        (loss, outputs), grads = sharpness_aware(gradients, rho)(state.params, step_key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rules = stage.training_rules
    params = rules.project(cast(Params, optax.apply_updates(cast(optax.Params, state.params), updates)))
    step = state.step + 1
    ema = ema_update(state.ema, params, step, ema_decay)
    averaged = {name: outputs.stats[name] for name in rules.averaged_stats}
    ema_stats = ema_update(state.ema_stats, averaged, step, ema_decay)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optimizer.learning_rate(state.step),
        "ema_decay": ema_decay_at(step, ema_decay),
        **outputs.metrics,
    }
    return TrainState(step, params, ema, opt_state, outputs.stats, ema_stats), metrics


def make_train_step(stage: Stage, optimizer: Optimizer, ema_decay: float, shardings: Any, accumulate: int = 1) -> Step:
    """Returns the jitted `train_step`; the state keeps its shardings, so that no step moves a parameter.

    Equal arguments give the same function, so that a run that continues in the same process compiles nothing again.
    """
    leaves, structure = jax.tree.flatten(shardings)
    return _jitted_step(stage, optimizer, ema_decay, accumulate, tuple(leaves), structure)


@functools.lru_cache(maxsize=4)
def _jitted_step(
    stage: Stage,
    optimizer: Optimizer,
    ema_decay: float,
    accumulate: int,
    leaves: tuple[jax.sharding.NamedSharding, ...],
    structure: Any,  # jax.tree_util.PyTreeDef, which is no type to the type checker
) -> Step:
    shardings = jax.tree.unflatten(structure, leaves)
    on_host = any(sharding.memory_kind == HOST for sharding in jax.tree.leaves(shardings.ema))

    def step(state, frozen, key, batch):
        with logical_axes(shardings.step.mesh):
            if on_host:
                devices = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings.ema)
                state = state.replace(ema=jax.device_put(state.ema, devices))
            return train_step(stage, optimizer, ema_decay, state, frozen, key, batch, accumulate)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _create(
    stage: Stage,
    optimizer: Optimizer,
    key: jax.Array,
    stats: Params | None = None,
    params: Params | None = None,
) -> TrainState:
    variables = stage.init(key)
    known = {name: value for name, value in (stats or {}).items() if name in variables.stats}
    params = variables.params if params is None else params
    averaged = stage.training_rules.averaged_stats
    return TrainState.create(params, {**variables.stats, **known}, optimizer, averaged)


def abstract_state(stage: Stage, optimizer: Optimizer) -> TrainState:
    """Returns the shapes of the state; no array is allocated."""

    def create(variables: Variables) -> TrainState:
        return TrainState.create(*variables, optimizer, stage.training_rules.averaged_stats)

    return jax.eval_shape(create, abstract_variables(stage))


def init_state(
    stage: Stage,
    optimizer: Optimizer,
    key: jax.Array,
    mesh: Mesh,
    stats: Params | None = None,
    params: Params | None = None,
    ema_memory: str = "device",
) -> TrainState:
    """Returns the state before the first step; every array is created sharded.

    Args:
      stage: what is trained.
      optimizer: the update rule.
      key: the run's root key.
      mesh: of devices.
      stats: statistics that replace the initial ones of their names.
      params: parameters that replace the initial ones; they are donated.
      ema_memory: where the averaged weights are, see `state_shardings`.
    """
    leaves, structure = jax.tree.flatten(state_shardings(stage, optimizer, mesh, ema_memory))
    return _jitted_create(stage, optimizer, tuple(leaves), structure)(rng.stream(key, "init"), stats, params)


@functools.lru_cache(maxsize=4)
def _jitted_create(
    stage: Stage,
    optimizer: Optimizer,
    leaves: tuple[jax.sharding.NamedSharding, ...],
    structure: Any,  # jax.tree_util.PyTreeDef, which is no type to the type checker
) -> Callable[[jax.Array, Params | None, Params | None], TrainState]:
    shardings = jax.tree.unflatten(structure, leaves)
    return jax.jit(functools.partial(_create, stage, optimizer), out_shardings=shardings, donate_argnums=2)


def state_shardings(stage: Stage, optimizer: Optimizer, mesh: Mesh, ema_memory: str = "device") -> TrainState:
    """Returns the sharding of each array of the state.

    Args:
      stage: what is trained.
      optimizer: the update rule.
      mesh: of devices.
      ema_memory: kind of the memory that holds the averaged weights: "device", or "pinned_host" of its host.
    """
    shardings = tree_shardings(abstract_state(stage, optimizer), mesh)
    shardings = shardings.replace(step=replicated(mesh))
    if ema_memory == "device":
        return shardings
    return shardings.replace(ema=jax.tree.map(lambda one: one.with_memory_kind(ema_memory), shardings.ema))


def parameter_count(stage: Stage) -> int:
    """Returns the number of trainable parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(stage).params))
