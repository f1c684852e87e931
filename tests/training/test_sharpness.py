"""Sharpness-aware minimisation, with one perturbation for the batch and with one for each replica."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages import LoraConfig, LoraStage, Variables
from dalle2_jax.training.accumulation import loss_and_gradients
from dalle2_jax.training.configs import OptimConfig
from dalle2_jax.training.optim import make_optimizer
from dalle2_jax.training.sharding import MeshConfig, logical_axes, make_mesh, shard_batch
from dalle2_jax.training.sharpness import check_replicas, replica_gradients, sharpness_aware

RHO = 0.3
KEY = rng.root(0)


@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_sharpness_aware_gradients_are_those_uphill(rho):
    """Of the quadratic w^T A w / 2 + b noise: value at w, gradient at w + rho g / |g|, both with the same noise."""
    curvature = jnp.array([[2.0, 0.5], [0.5, 1.0]])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradients(params, key):
        w = params["w"]
        noise = jax.random.normal(key, w.shape)
        return 0.5 * w @ curvature @ w + 0.5 * jnp.sum(noise * w), "outputs"

    w, key = jnp.array([1.0, -3.0]), jax.random.key(0)
    (value, outputs), grads = sharpness_aware(gradients, rho)({"w": w}, key)
    noise = jax.random.normal(jax.random.clone(key), w.shape)
    gradient = curvature @ w + 0.5 * noise
    expected = gradient + rho * curvature @ gradient / jnp.linalg.norm(gradient)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * w @ curvature @ w + 0.5 * jnp.sum(noise * w), rtol=1e-5)
    assert outputs == "outputs"


# --- replicas ------------------------------------------------------------------------------------


def clip():
    stage = testing.tiny_stage("clip_vit")
    return stage, testing.tiny_variables(stage)


def of_replicas(stage, variables, batch, size, frozen=None):
    return jax.jit(functools.partial(replica_gradients, stage, RHO, size))(variables, frozen or {}, batch)


def plain(stage, variables, batch):
    return jax.jit(functools.partial(loss_and_gradients, stage, 1))(variables, {}, KEY, batch)


def assert_close(got, wanted, atol=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol * max(1.0, np.abs(other).max(initial=0)))


def by_hand(stage, variables, batch, size):
    """Eq. (1) and (2) with the derivative of one function of all replicas' parameters."""
    params, stats = variables
    parts = [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, len(batch["mask"]), size)]

    def loss(each, of_loss):
        found = [stage.embed(own, stats, {}, part) for own, part in zip(each, parts, strict=True)]
        joined = {name: jnp.concatenate([one[name] for one in found]) for name in found[0]}
        return stage.contrast(of_loss, stats, {}, joined)[0]

    def step(grads):
        return RHO / jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))

    def moved(grads, step):
        return jax.tree.map(lambda param, grad: param + step * grad, params, grads)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_replicas, of_loss = grad([params] * len(parts), params)
    share = jax.tree.map(lambda leaf: leaf / len(parts), of_loss)
    gradients = [jax.tree.map(jnp.add, own, share) for own in of_replicas]
    steps = [step(each) for each in gradients]
    places = [moved(*pair) for pair in zip(gradients, steps, strict=True)]
    each, of_loss = grad(places, moved(share, sum(steps) / len(steps)))
    return jax.tree.map(lambda *leaves: sum(leaves), of_loss, *each)


def test_each_replica_has_its_own_perturbation():
    (stage, variables), batch = clip(), testing.tiny_batch(4)
    (loss, _), grads = of_replicas(stage, variables, batch, 2)
    assert_close(grads, by_hand(stage, variables, batch, 2))
    (expected, _), unperturbed = plain(stage, variables, batch)
    assert_close(loss, expected)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(unperturbed), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) > 1e-3


def test_one_replica_is_the_whole_batch():
    (stage, variables), batch = clip(), testing.tiny_batch(4)

    def gradients(params, key):
        return loss_and_gradients(stage, 1, Variables(params, variables.stats), {}, key, batch)

    whole = jax.jit(sharpness_aware(gradients, RHO))(variables.params, KEY)
    assert_close(of_replicas(stage, variables, batch, 4), whole)


def test_a_lora_of_clip_has_replicas():
    stage = LoraStage(testing.tiny_stage("clip_vit"), LoraConfig(rank=2))
    frozen = {stage.name: testing.tiny_variables(stage.inner)}
    _, grads = of_replicas(stage, testing.tiny_variables(stage), testing.tiny_batch(4), 2, frozen)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.sharding
def test_replicas_on_several_devices_equal_those_on_one():
    (stage, variables), batch, mesh = clip(), testing.tiny_batch(16), make_mesh(MeshConfig(2, 2, 2))
    expected = of_replicas(stage, variables, batch, 2)
    with logical_axes(mesh):
        found = of_replicas(stage, variables, shard_batch(batch, mesh), 2)
    assert_close(found, expected)


def test_the_optimizer_names_both():
    optimizer = make_optimizer(OptimConfig(sam_rho=0.1, sam_batch=64), 10)
    assert (optimizer.sam_rho, optimizer.sam_batch) == (0.1, 64)


@pytest.mark.parametrize(
    ("kind", "optim", "facts"),
    [
        ("clip_vit", {"sam_batch": 4}, [4, "sam_rho"]),
        ("clip_vit", {"sam_batch": 4, "sam_rho": 0.1, "accumulate": 2}, ["accumulate"]),
        ("clip_vit", {"sam_batch": 5, "sam_rho": 0.1}, [5, 16, 4]),
        ("clip_resnet", {"sam_batch": 4, "sam_rho": 0.1}, ["batch norm"]),
        ("prior", {"sam_batch": 4, "sam_rho": 0.1}, ["prior", "CLIP"]),
    ],
)
def test_replicas_that_are_not_possible(kind, optim, facts):
    with pytest.raises(ConfigError, check=mentions(*facts, field="optim.sam_batch")):
        check_replicas(testing.tiny_stage(kind), OptimConfig(**optim), 16, make_mesh(MeshConfig()))


def test_batches_without_replicas_are_not_checked():
    check_replicas(testing.tiny_stage("prior"), OptimConfig(), 16, make_mesh(MeshConfig()))
