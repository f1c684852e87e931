"""Gradients in micro-batches equal those of the whole batch, whatever the loss and its randomness."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages import LoraConfig, LoraStage, Variables
from dalle2_jax.training.accumulation import check_accumulation, loss_and_gradients
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch

BATCH = testing.tiny_batch(8)
EPSILON = 1e-6


def decoder():
    """A decoder with all that may be random in its loss: dropout, visible regions, dropped conditions."""
    stage = testing.tiny_stage("decoder")
    unet = dataclasses.replace(stage.model.unet, dropout=0.3, in_channels=7)
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, unet=unet), inpaint=True)


def upsampler():
    """An upsampler that is trained on crops, some of them blurred, with noise of random levels."""
    return dataclasses.replace(testing.tiny_stage("upsampler"), noise_augmentation=0.5, blur_rate=0.5)


STAGES = {
    "clip": lambda: testing.tiny_stage("clip_vit"),
    "prior": lambda: testing.tiny_stage("prior"),
    "decoder": decoder,
    "upsampler": upsampler,
    "lora of clip": lambda: LoraStage(testing.tiny_stage("clip_vit"), LoraConfig(rank=2)),
}


def frozen_of(stage):
    base = {stage.name: testing.tiny_variables(stage.inner)} if isinstance(stage, LoraStage) else {}
    return {**testing.tiny_frozen(stage if not base else stage.inner), **base}


def compute(stage, count, batch=BATCH):
    return jax.jit(functools.partial(loss_and_gradients, stage, count))(
        testing.tiny_variables(stage), frozen_of(stage), rng.root(3), batch
    )


def assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, np.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=EPSILON * scale)


@pytest.mark.parametrize("kind", STAGES)
def test_micro_batches_equal_the_whole_batch(kind):
    stage = STAGES[kind]()
    whole, accumulated = compute(stage, 1), compute(stage, 4)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(whole[1]))
    assert_equal(accumulated, whole)


def test_a_contrastive_loss_is_over_the_whole_batch():
    """Not the mean over micro-batches, which have fewer captions to choose from."""
    stage = STAGES["clip"]()
    (whole, _), _ = compute(stage, 4)
    part, _ = jax.jit(stage.loss)(*testing.tiny_variables(stage), {}, rng.root(3), {k: v[:2] for k, v in BATCH.items()})
    assert whole > part + 0.1


@pytest.mark.sharding
def test_micro_batches_on_several_devices_equal_one(monkeypatch):
    stage, mesh = STAGES["clip"](), make_mesh(MeshConfig(2, 2, 2))
    batch = testing.tiny_batch(16)
    assert_equal(compute(stage, 4, shard_batch(batch, mesh)), compute(stage, 1, batch))


def test_a_loss_history_has_every_example():
    stage = testing.tiny_stage("prior")
    stage = dataclasses.replace(
        stage, diffusion=dataclasses.replace(stage.diffusion, timesteps="loss_second_moment", num_steps=10)
    )
    variables = Variables(testing.tiny_variables(testing.tiny_stage("prior")).params, stage.init_stats())
    step = jax.jit(functools.partial(loss_and_gradients, stage, 2))
    (_, outputs), _ = step(variables, frozen_of(stage), rng.root(3), BATCH)
    assert int(jnp.sum(outputs.stats["counts"])) == 8


@pytest.mark.parametrize("count, batch_size, nearest", [(3, 64, 2), (7, 64, 8), (128, 64, 64)])
def test_micro_batches_that_do_not_divide_the_batch_are_rejected(count, batch_size, nearest):
    facts = mentions(count, batch_size, nearest, field="optim.accumulate")
    with pytest.raises(ConfigError, check=facts):
        check_accumulation(testing.tiny_stage("prior"), count, batch_size, make_mesh(MeshConfig()))


@pytest.mark.sharding
def test_micro_batches_that_do_not_divide_over_devices_are_rejected():
    with pytest.raises(ConfigError, check=mentions(4, 16, 2, field="optim.accumulate")):
        check_accumulation(testing.tiny_stage("prior"), 4, 16, make_mesh(MeshConfig()))


def test_batch_norm_is_not_computed_in_micro_batches():
    stage, mesh = testing.tiny_stage("clip_resnet"), make_mesh(MeshConfig())
    check_accumulation(stage, 1, 8, mesh)
    with pytest.raises(ConfigError, check=mentions("batch norm", "clip", field="optim.accumulate")):
        check_accumulation(stage, 2, 8, mesh)
