"""The evaluation on held-out examples: the same on any mesh and at any time, and what each kind of stage measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import rng, testing
from dalle2_jax.diffusion import LossHistory, empty_history, quartile_losses, record, sample_timesteps
from dalle2_jax.stages import LoraConfig, LoraStage, held_out
from dalle2_jax.training.reporting.held_out import EXAMPLES, batch_rows, make_evaluation
from dalle2_jax.training.sharding import MeshConfig, make_mesh

QUARTILES = {f"val/loss_quartile_{n}" for n in (1, 2, 3, 4)}
RECALLS = {f"val/{name}{k}" for name in ("image_to_text", "text_to_image") for k in ("", "_at_5")}
COSINES = {f"val/cosine_{name}" for name in ("image", "other", "text", "text_image")}
MEASURES = {
    "clip_vit": {"val/loss", "val/temperature", *RECALLS},
    "prior": {"val/loss", "val/mse", *QUARTILES, *COSINES},
    "upsampler": {"val/loss", "val/mse", *QUARTILES},
}


def batches():
    return [testing.tiny_batch(16, seed=1), testing.tiny_batch(16, seed=2)]


@pytest.mark.sharding
@pytest.mark.parametrize("kind", MEASURES)
def test_every_kind_of_stage_is_measured(kind):
    """On eight devices, and of CLIP, whose measures compare all examples of a batch, the same on one."""
    stage = testing.tiny_stage(kind)
    variables, frozen = testing.tiny_variables(stage), testing.tiny_frozen(stage)
    evaluate = make_evaluation(stage, frozen, batches, make_mesh(MeshConfig(8)))
    measured = evaluate(variables, 5)
    assert {*measured} == MEASURES[kind] and evaluate(variables, 7) == measured  # no other noise at another step
    if kind == "clip_vit":
        alone = make_evaluation(stage, frozen, batches, one_device())(variables, 5)
        assert measured == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in alone.items()}


def one_device():
    devices, axes = jax.devices()[:1], (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=axes, devices=devices)


def test_a_lora_is_measured_with_merged_weights():
    """Its change is zero at first, so that it measures what the base does."""
    base = testing.tiny_stage("clip_vit")
    lora, variables = LoraStage(base, LoraConfig(rank=2)), testing.tiny_variables(base)
    frozen, batch = {base.name: variables}, testing.tiny_batch(8)
    start = testing.tiny_variables(lora)
    start = start._replace(params=jax.tree.map(jnp.zeros_like, start.params))
    measured = jax.jit(lora.measure)(start, frozen, rng.root(1), batch)
    assert measured == jax.jit(base.measure)(variables, {}, rng.root(1), batch)


def test_retrieval_counts_better_candidates():
    image = np.eye(8, dtype=np.float32)
    text = np.roll(image, 1, axis=0) + 0.5 * image  # every image is nearer to the next caption than to its own
    first, second = held_out.retrieval(image, text, k=1), held_out.retrieval(image, text, k=2)
    assert {name: float(value) for name, value in first.items()} == {"image_to_text_at_1": 0, "text_to_image_at_1": 0}
    assert {name: float(value) for name, value in second.items()} == {"image_to_text_at_2": 1, "text_to_image_at_2": 1}


def test_cosines_of_the_images_themselves():
    image = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    found = held_out.cosines(3 * image, {"image_emb": image, "text_emb": -image})
    cosine = {name: float(value) for name, value in found.items()}
    assert cosine["cosine_image"] == pytest.approx(1) and cosine["cosine_text"] == pytest.approx(-1)
    assert cosine["cosine_text_image"] == pytest.approx(-1) and abs(cosine["cosine_other"]) < 0.9


@pytest.mark.parametrize(
    ("examples", "size", "sizes", "count"),
    [
        (1000, 64, (1, 1), EXAMPLES // 64),
        (1000, 100, (1, 1), 3),
        (70, 64, (1, 1), 1),
        (10, 64, (4, 1), 1),
        (3, 64, (2, 2), 0),
    ],
)
def test_held_out_batches_are_full_and_divide_over_the_devices(examples, size, sizes, count):
    mesh = jax.sharding.AbstractMesh((*sizes, 1), ("data", "fsdp", "tensor"))
    rows = batch_rows(examples, size, mesh)
    indices = [index for batch in rows for index in batch]
    assert len(rows) == count and len({*indices}) == len(indices) and max(indices, default=0) < examples
    assert all(0 < len(batch) <= size and len(batch) % (sizes[0] * sizes[1]) == 0 for batch in rows)


# --- the loss by quartile of t ----------------------------------------------------------------


def test_quartiles_partition_the_loss():
    t, losses = jnp.arange(100), jnp.arange(100.0)
    parts = quartile_losses(t, 100, losses, jnp.ones(100))
    means = [float(part.total / part.weight) for part in parts.values()]
    assert means == [12.0, 37.0, 62.0, 87.0] and [*parts] == [f"loss_quartile_{n}" for n in (1, 2, 3, 4)]
    few = quartile_losses(jnp.array([0, 2]), 3, jnp.array([1.0, 5.0]), jnp.ones(2))
    assert [float(part.weight) for part in few.values()] == [1, 0, 1, 0]


def test_quartiles_of_importance_sampled_timesteps_are_those_of_uniform_ones():
    """With losses t + 1, the mean of a quarter is that over its steps, though later steps are sampled more often."""
    history = empty_history(8)
    for _ in range(10):
        history = record(history, jnp.arange(8), jnp.arange(8.0) + 1)
    t, weights = sample_timesteps(rng.root(0), 40_000, 8, LossHistory(*history))
    parts = quartile_losses(t, 8, t.astype(jnp.float32) + 1, weights)
    means = [float(part.total / part.weight) for part in parts.values()]
    np.testing.assert_allclose(means, [1.5, 3.5, 5.5, 7.5], rtol=0.02)
