"""The one train step of all stages: pure, jitted, sharded, its state donated."""

import functools
from collections.abc import Callable, Mapping

import jax
import optax
from jax.sharding import Mesh

from dalle2_jax import rng
from dalle2_jax.stages.base import Stage, Variables
from dalle2_jax.training.optim import ema_update
from dalle2_jax.training.sharding import replicated, tree_shardings
from dalle2_jax.training.state import TrainState
from dalle2_jax.types import Batch, Metrics, Params

Step = Callable[[TrainState, Mapping[str, Variables], jax.Array, Batch], tuple[TrainState, Metrics]]


def train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    frozen: Mapping[str, Variables],
    key: jax.Array,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One step. ``key`` is the run's root key; the step's own key follows from ``state.step``."""
    step_key = rng.at_step(rng.stream(key, "train"), state.step)
    batch = stage.prepare(frozen, batch)
    grad_fn = jax.value_and_grad(stage.loss, has_aux=True)
    (loss, outputs), grads = grad_fn(state.params, state.stats, step_key, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema = ema_update(state.ema, params, step, ema_decay)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **outputs.metrics}
    return TrainState(step, params, ema, opt_state, outputs.stats), metrics


def make_train_step(stage: Stage, optimizer: optax.GradientTransformation, ema_decay: float, shardings) -> Step:
    """Compiles ``train_step`` with the state's shardings fixed, so that no step moves a parameter."""

    def step(state, frozen, key, batch):
        return train_step(stage, optimizer, ema_decay, state, frozen, key, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _create(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    stats: Params | None = None,
    params: Params | None = None,
) -> TrainState:
    variables = stage.init(key)
    known = {name: value for name, value in (stats or {}).items() if name in variables.stats}
    params = variables.params if params is None else params
    return TrainState.create(params, {**variables.stats, **known}, optimizer)


@functools.lru_cache(maxsize=8)  # tracing a large network takes seconds, and a run asks for its shapes several times
def abstract_state(stage: Stage, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state's shapes; no array is made."""
    return jax.eval_shape(lambda key: _create(stage, optimizer, key), jax.random.key(0))


def init_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    stats: Params | None = None,
    params: Params | None = None,
) -> TrainState:
    """Returns the state before the first step, each array created where it will live: none ever exists unsharded.

    ``stats`` take the place of fresh ones of their names. ``params`` take the place of fresh ones, and are given away.
    """
    shardings = state_shardings(stage, optimizer, mesh)
    create = jax.jit(functools.partial(_create, stage, optimizer), out_shardings=shardings, donate_argnums=2)
    return create(rng.stream(key, "init"), stats, params)


def state_shardings(stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns where each array of the state lives."""
    shardings = tree_shardings(abstract_state(stage, optimizer), mesh)
    return shardings.replace(step=replicated(mesh))


def parameter_count(stage: Stage) -> int:
    """Returns the number of trainable parameters, from shapes alone."""
    params = jax.eval_shape(stage.init, jax.random.key(0)).params
    return sum(leaf.size for leaf in jax.tree.leaves(params))
