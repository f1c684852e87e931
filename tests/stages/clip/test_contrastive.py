"""Losses over all pairs of a batch: in parts and on several devices they equal their definitions, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages import ClipStage, ContrastiveConfig
from dalle2_jax.stages.contrastive import sigmoid_loss, softmax_loss
from dalle2_jax.training.optim import decay_mask
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, logical_axes, make_mesh

BATCH, WIDTH, CHUNKS = 32, 8, 4
SCALE, BIAS = 5.0, -2.0


def embeddings(size=BATCH, width=WIDTH):
    noise = np.random.default_rng(0).standard_normal((2, size, width), np.float32)
    return tuple(noise / np.linalg.norm(noise, axis=-1, keepdims=True))


def softmax_by_definition(x, y, scale, bias):
    logits = scale * x @ y.T
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return 0.5 * sum(cross_entropy(each, jnp.arange(len(x))).mean() for each in (logits, logits.T)) + 0.0 * bias


def sigmoid_by_definition(x, y, scale, bias):
    signs = 2.0 * jnp.eye(len(x)) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(signs * (scale * x @ y.T + bias))) / len(x)


LOSSES = {
    "softmax": (lambda x, y, scale, bias: softmax_loss(x, y, scale, CHUNKS), softmax_by_definition),
    "sigmoid": (sigmoid_loss, sigmoid_by_definition),
}


def evaluate(function, mesh, *args):
    """Returns a loss and its gradients by embeddings, scale and offset, with the batch sharded over the mesh."""

    def run(*args):
        with logical_axes(mesh):
            return jax.value_and_grad(function, argnums=(0, 1, 2, 3))(*args)

    rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(run, in_shardings=(rows, rows, whole, whole))(*args)


@pytest.mark.sharding
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_on_eight_devices_are_by_definition(loss, mesh):
    function, definition = LOSSES[loss]
    args = (*embeddings(), jnp.float32(SCALE), jnp.float32(BIAS))
    got = evaluate(lambda *args: function(*args).loss, make_mesh(MeshConfig(*mesh)), *args)
    wanted = jax.value_and_grad(definition, argnums=(0, 1, 2, 3))(*args)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_hits_are_the_largest_logits(loss):
    x, y = embeddings()
    found = LOSSES[loss][0](x, y, jnp.float32(SCALE), jnp.float32(BIAS))
    similarity = x @ y.T
    np.testing.assert_array_equal(found.image_to_text, similarity.argmax(axis=1) == np.arange(BATCH))
    np.testing.assert_array_equal(found.text_to_image, similarity.argmax(axis=0) == np.arange(BATCH))
    assert 0 < found.image_to_text.sum() < BATCH


def temporaries(function, size, width, mesh):
    """Returns the bytes of temporaries of a loss and its gradients on one device, from shapes alone."""
    rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    columns = [jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=rows)] * 2
    scalars = [jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)] * 2

    def run(*args):
        with logical_axes(mesh):
            return jax.value_and_grad(function, argnums=(0, 1, 2, 3))(*args)

    return jax.jit(run).lower(*columns, *scalars).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.sharding
@pytest.mark.numerics
def test_the_softmax_loss_of_65536_pairs_needs_less_than_an_eighth_of_the_memory():
    mesh = make_mesh(MeshConfig())
    whole, parts = (
        temporaries(lambda x, y, s, b, n=n: softmax_loss(x, y, s, n).loss, 65_536, 1024, mesh) for n in (1, 128)
    )
    assert whole > 65_536**2 * 4 / 8 and parts < whole / 8


@pytest.mark.sharding
@pytest.mark.numerics
def test_the_memory_of_the_sigmoid_loss_is_flat_as_devices_grow():
    """At the same number of pairs a device."""
    devices = jax.devices()
    needed = []
    for count in (2, 8):
        mesh = jax.sharding.Mesh(np.array(devices[:count]).reshape(count, 1, 1), ("data", "fsdp", "tensor"))
        needed.append(temporaries(lambda *args: sigmoid_loss(*args).loss, 512 * count, 256, mesh))
    assert needed[1] < 1.1 * needed[0]


# --- the stage --------------------------------------------------------------------------------


def stage(**fields):
    tiny = testing.tiny_stage("clip_vit")
    return ClipStage(tiny.model, tiny.embedding, objective=ContrastiveConfig(**fields))


def test_a_stage_in_parts_has_the_loss_of_the_whole():
    args = (*testing.tiny_variables(stage()), {}, rng.root(0), testing.tiny_batch(8))
    losses = [jax.jit(functools.partial(stage(chunks=chunks).loss))(*args) for chunks in (1, 4)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *losses)


def test_the_sigmoid_loss_begins_with_its_papers_scale_and_offset():
    """At first, nearly the loss of predicting for every pair that it does not match."""
    params = jax.jit(stage(loss="sigmoid").init)(rng.root(0)).params
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(10.0) and float(params["logit_bias"]) == -10.0
    assert decay_mask(params, stage(loss="sigmoid").training_rules.decay)["logit_bias"] is False
    assert "logit_bias" not in jax.eval_shape(stage().init, rng.root(0)).params
    loss, _ = jax.jit(stage(loss="sigmoid").loss)(params, {}, {}, rng.root(0), testing.tiny_batch(8))
    assert 0.0 < float(loss) < 25.0


CONFIG = {
    "stage": "clip",
    "batch_size": 64,
    "data": {"kind": "shapes"},
    "model": {},
    "text": {},
    "optim": {},
    "mesh": {},
}


@pytest.mark.parametrize(
    "objective, field, facts",
    [
        ({"loss": "sigmod"}, "objective", ["sigmod", "sigmoid"]),
        ({"chunks": 0}, "objective.chunks", [0]),
        ({"chunks": 3}, "objective.chunks", [3, 64]),
    ],
)
def test_an_objective_that_cannot_be_is_rejected(objective, field, facts):
    with pytest.raises(ConfigError, check=mentions(*facts, field=field)):
        Experiment.from_config({**CONFIG, "objective": objective}).check_trainable()
