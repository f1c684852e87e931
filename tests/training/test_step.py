"""The one train step: the same on any mesh, compiled once, and it learns, for a stage of every kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dalle2_jax import rng, testing
from dalle2_jax.stages import LoraConfig, LoraStage
from dalle2_jax.stages.base import Outputs, StageDefaults, TrainingRules, Variables
from dalle2_jax.training import sharding
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import (
    MeshConfig,
    make_mesh,
    shard_batch,
    tree_shardings,
)
from dalle2_jax.training.state import TrainState
from dalle2_jax.training.step import (
    abstract_state,
    init_state,
    make_train_step,
    parameter_count,
    state_shardings,
)

STEPS, LONG = 10, 60
MESHES = [(kind, (2, 2, 2)) for kind in (*testing.KINDS, "lora")]  # every axis splits something
MESHES += [("clip_vit", (8, 1, 1)), ("clip_vit", (2, 4, 1))]
OPTIMIZER = make_optimizer(OptimConfig(lr=1e-3, weight_decay=0.01), LONG)
BATCH = testing.tiny_batch(16)


pytestmark = pytest.mark.sharding


@pytest.fixture(scope="module", autouse=True)
def small_arrays_are_split():
    """Splits even small arrays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SIZE_FLOOR", 512)
        yield


def stage_and_frozen(kind):
    """A tiny stage, or a LoRA of one, and the weights that it requires."""
    if kind != "lora":
        return testing.tiny_stage(kind), testing.tiny_frozen(testing.tiny_stage(kind))
    inner = testing.tiny_stage("prior")
    frozen = {**testing.tiny_frozen(inner), inner.name: testing.tiny_variables(inner)}
    return LoraStage(inner, LoraConfig(rank=8)), frozen


def one_device():
    return jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def run(kind, mesh, steps):
    """Trains on one batch; returns the losses, the last state and the step."""
    stage, frozen = stage_and_frozen(kind)
    shardings = state_shardings(stage, OPTIMIZER, mesh)
    variables = jax.tree.map(np.array, testing.tiny_variables(stage))
    averaged = stage.training_rules.averaged_stats
    state = jax.device_put(TrainState.create(*variables, OPTIMIZER, averaged), shardings)
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    step, losses = make_train_step(stage, OPTIMIZER, 0.9, shardings), []
    for _ in range(steps):
        state, metrics = step(state, frozen, rng.root(0), shard_batch(BATCH, mesh))
        losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses)), state, step


@functools.cache
def alone(kind):
    """Returns the losses of a kind of stage on one device, and its last state."""
    losses, state, step = run(kind, one_device(), LONG)
    assert step._cache_size() == 1
    return losses, state


@pytest.mark.parametrize("kind", [*testing.KINDS, "lora"])
def test_the_loss_of_one_batch_falls(kind):
    losses, state = alone(kind)
    assert np.isfinite(losses).all() and int(state.step) == LONG
    first, last = losses[:5].mean(), losses[-5:].mean()
    assert last < (0.5 if kind.startswith("clip") else 0.8) * first, losses


@pytest.mark.parametrize("kind, sizes", MESHES, ids=str)
def test_eight_devices_equal_one(kind, sizes):
    losses, _ = alone(kind)
    mesh = make_mesh(MeshConfig(*sizes))
    spread, state, step = run(kind, mesh, STEPS)
    np.testing.assert_allclose(spread, losses[:STEPS], rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1  # not one program more after the first step
    for tree in (state.params, state.ema):
        split = [leaf for leaf in jax.tree.leaves(tree) if not leaf.sharding.is_fully_replicated]
        assert bool(split) == (sizes != (8, 1, 1))
        assert all(leaf.addressable_shards[0].data.size < leaf.size for leaf in split)
    over_tensor = ["tensor" in leaf.sharding.spec for leaf in jax.tree.leaves(state.params)]
    assert any(over_tensor) == (sizes[2] > 1)


def test_a_state_is_born_where_it_lives_and_the_same_everywhere():
    stage, mesh = testing.tiny_stage("prior"), make_mesh(MeshConfig(2, 2, 2))
    born = init_state(stage, OPTIMIZER, rng.root(3), mesh)
    for leaf, wanted in zip(
        jax.tree.leaves(born), jax.tree.leaves(state_shardings(stage, OPTIMIZER, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    # Not equal to the last bit: a program over eight devices may be fused in another way, and so round differently.
    single = init_state(stage, OPTIMIZER, rng.root(3), one_device())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), born, single)
    jax.tree.map(np.testing.assert_array_equal, born.params, born.ema)
    assert int(born.step) == 0
    assert parameter_count(stage) == sum(leaf.size for leaf in jax.tree.leaves(born.params))


@dataclasses.dataclass(frozen=True)
class Climber(StageDefaults):
    """Its kernel grows without end but for its projection; a statistic follows the kernel."""

    name: str = "climber"
    training_rules: TrainingRules = TrainingRules(
        averaged_stats=("norm",), project=lambda params: {"kernel": jnp.minimum(params["kernel"], 1.0)}
    )

    def init(self, key):
        stats = {"norm": {"mean": jnp.zeros((64, 8))}, "steps": jnp.zeros((), jnp.int32)}
        return Variables({"kernel": jnp.zeros((64, 8))}, stats)

    def loss(self, params, stats, frozen, key, batch):
        stats = {"norm": {"mean": 10 * params["kernel"]}, "steps": stats["steps"] + 1}
        return -params["kernel"].sum(), Outputs({}, stats)


def train_steps(steps):
    """Returns the states of a run over fsdp, copied before they are donated."""
    stage, optimizer, mesh = Climber(), make_optimizer(OptimConfig(lr=0.4), 10), make_mesh(MeshConfig(1, 8, 1))
    step = make_train_step(stage, optimizer, 0.5, state_shardings(stage, optimizer, mesh))
    state, states = init_state(stage, optimizer, rng.root(0), mesh), []
    for _ in range(steps):
        state, _ = step(state, {}, rng.root(0), {})
        states.append(jax.tree.map(np.array, state))
    assert not state.params["kernel"].sharding.is_fully_replicated
    return states


def test_parameters_are_projected_before_they_are_averaged():
    by_hand = 0.0
    for count, state in enumerate(train_steps(5), 1):
        kernel = min(0.4 * count, 1.0)
        by_hand += (1 - min(0.5, (1 + count) / (10 + count))) * (kernel - by_hand)
        np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-5)
        np.testing.assert_allclose(state.ema["kernel"], by_hand, rtol=1e-5)


def test_statistics_are_averaged_as_the_weights_are():
    by_hand, states = 0.0, train_steps(4)
    for count, state in enumerate(states, 1):
        by_hand += (1 - min(0.5, (1 + count) / (10 + count))) * (10 * min(0.4 * (count - 1), 1.0) - by_hand)
        assert state.ema_stats.keys() == {"norm"}
        np.testing.assert_allclose(state.ema_stats["norm"]["mean"], by_hand, rtol=1e-5)
    assert not np.array_equal(states[-1].ema_stats["norm"]["mean"], states[-1].stats["norm"]["mean"])
    params, stats = states[-1].averaged
    assert params is states[-1].ema and stats["norm"] is states[-1].ema_stats["norm"] and stats["steps"] == 4


@pytest.mark.parametrize("kind", testing.KINDS)
def test_a_state_survives_its_trees(kind):
    state = abstract_state(testing.tiny_stage(kind), OPTIMIZER)
    trees = state.trees()
    assert set(trees) == {"params", "ema", "opt_state", "stats", "ema_stats"}
    again = jax.eval_shape(lambda trees: TrainState.from_trees(7, trees), trees)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    del trees["ema_stats"]  # as in checkpoints of earlier releases
    names = testing.tiny_stage(kind).training_rules.averaged_stats
    earlier = jax.eval_shape(lambda trees: TrainState.from_trees(7, trees, names), trees)
    assert jax.tree.structure(earlier) == jax.tree.structure(state)
    assert again.step.dtype == state.step.dtype and again.step.shape == ()
