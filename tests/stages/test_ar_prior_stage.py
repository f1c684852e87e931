"""The autoregressive prior as a stage: what it learns, how it samples, and that it is calibrated once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.models.priors import codes
from dalle2_jax.models.priors.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import ArPriorStage, ArSamplingConfig, ArSamplingPlan, Variables
from dalle2_jax.stages.ar_prior import top_dots, truncated
from dalle2_jax.stages.base import Stage
from dalle2_jax.training.loop import Job, RunConfig, train
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import (
    MeshConfig,
    make_mesh,
    shard_batch,
    tree_shardings,
    with_shardings,
)
from dalle2_jax.training.step import init_state, make_train_step, state_shardings
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

TEXT = TextConfig(testing.VOCAB_SIZE, testing.CONTEXT_LENGTH, width=16, layers=1, heads=2, activation="gelu")
MODEL = ArPriorConfig(TEXT, 16, 2, 2, context_length=8, embed_dim=testing.EMBED_DIM, components=6, buckets=2)
STAGE = ArPriorStage(MODEL, testing.tiny_stage("clip_vit"), calibration_examples=32)
FINE = dataclasses.replace(STAGE, model=dataclasses.replace(MODEL, buckets=8, layers=1))


def keys(count, first=0):
    return rng.per_image(rng.root(7), jnp.arange(first, first + count, dtype=jnp.int32))


# --- a toy mapping ----------------------------------------------------------------------------
# Four captions, each with two image embeddings: one near its text embedding and one far from it.


def toy_batch():
    """Rows 0-3 are the near pairs of captions 0-3, rows 4-7 the far ones."""
    noise = np.random.default_rng(4)
    images = noise.standard_normal((8, testing.EMBED_DIM)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    text = images[:4] - images[4:]
    tokens, mask = testing.WordTokenizer().encode(["one", "two words", "three", "four"], testing.CONTEXT_LENGTH)
    batch = {"image_emb": images, "text_emb": text, "tokens": tokens, "mask": mask}
    return {name: jnp.asarray(rows if name == "image_emb" else np.tile(rows, (2, 1))) for name, rows in batch.items()}


@pytest.fixture(scope="module")
def toy():
    """Variables overfitted to the toy pairs, the pairs, and the loss at the first step."""
    batch = toy_batch()
    stats = STAGE.calibrate({}, iter([batch] * 4))
    params = jax.jit(STAGE.init)(rng.root(0)).params
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, 200))

    @jax.jit
    def run(params):
        def step(carry, index):
            params, state = carry

            def loss(p):
                return STAGE.loss(p, stats, {}, rng.at_step(rng.root(1), index), batch)

            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(200))

    (params, _), losses = run(params)
    return Variables(params, stats), batch, losses[0]


@pytest.fixture(scope="module")
def generate():
    traces = []

    @jax.jit
    def samples(variables, keys, condition, absent, guidance, quantile):
        traces.append(1)
        plan = ArSamplingPlan(True, guidance, quantile, {"text": absent})
        return STAGE.sample(variables, keys, condition, plan)

    samples.traces = traces
    return samples


def repeated(batch, rows, times):
    return {name: jnp.repeat(value[rows], times, axis=0) for name, value in STAGE.condition(batch).items()}


def nearest(batch, stats, samples):
    """Returns the row of the toy batch that each sample equals, -1 where it equals none."""
    known = codes.encode(stats, batch["image_emb"])
    assert len({tuple(row) for row in np.asarray(known).tolist()}) == 8
    same = (codes.encode(stats, samples)[:, None] == known[None]).all(axis=-1)
    return np.where(same.any(axis=1), same.argmax(axis=1), -1)


def test_loss_starts_at_log_of_buckets_and_falls(toy):
    (params, stats), batch, first = toy
    np.testing.assert_allclose(first, np.log(2), rtol=1e-5)
    conditioning = dataclasses.replace(STAGE, drop_text=0.0)
    loss, (metrics, kept) = jax.jit(conditioning.loss)(params, stats, {}, rng.root(0), batch)
    assert loss < 0.05  # the dot product determines the code, so nothing is left to guess
    assert metrics["accuracy"] > 0.95
    decoded = codes.decode(stats, codes.encode(stats, batch["image_emb"]))
    centred = batch["image_emb"] - batch["image_emb"].mean(axis=0, keepdims=True)
    error = np.sum((decoded - batch["image_emb"]) ** 2) / np.sum(centred**2)
    np.testing.assert_allclose(metrics["code_error"], error, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)


def test_samples_reproduce_the_mapping_that_was_learned(toy, generate):
    variables, batch, _ = toy
    condition, kept = repeated(batch, slice(0, 4), 16), jnp.zeros(64, bool)
    for guidance in (1.0, 1.5):
        samples = generate(variables, keys(64), condition, kept, guidance, 0.5)
        assert np.mean(nearest(batch, variables.stats, samples) == np.repeat(np.arange(4), 16)) > 0.9


def test_the_dot_product_is_asked_for_from_above_the_quantile(toy, generate):
    """From the whole distribution, far embeddings come as often as near ones."""
    variables, batch, _ = toy
    condition = repeated(batch, slice(0, 4), 16)
    rows = nearest(batch, variables.stats, generate(variables, keys(64), condition, jnp.zeros(64, bool), 1.0, 0.0))
    assert 0.3 < np.mean(rows >= 4) < 0.7
    assert np.mean(rows % 4 == np.repeat(np.arange(4), 16)) > 0.85


def test_absent_captions_are_not_read(toy, generate):
    variables, batch, _ = toy
    absent = jnp.arange(64) < 32
    first = generate(variables, keys(64), repeated(batch, slice(0, 4), 16), absent, 1.5, 0.5)
    other = generate(variables, keys(64), repeated(batch, slice(3, None, -1), 16), absent, 1.5, 0.5)
    np.testing.assert_array_equal(first[:32], other[:32])
    assert not np.array_equal(first[32:], other[32:])
    assert len(np.unique(np.asarray(first[:32]), axis=0)) > 4  # not those of one caption


def test_guidance_of_one_is_no_guidance_and_a_key_is_an_image(toy, generate):
    """Every fourth image, sampled alone and without guidance, is what it was in the whole batch."""
    variables, batch, _ = toy
    condition, kept = repeated(batch, slice(0, 4), 16), jnp.zeros(64, bool)
    whole = generate(variables, keys(64), condition, kept, 1.0, 0.0)
    some = {name: value[::4] for name, value in condition.items()}
    plan = STAGE.plan(ArSamplingConfig(dot_quantile=0.0))
    alone = jax.jit(STAGE.sample)(variables, keys(64)[::4], some, plan)
    np.testing.assert_allclose(whole[::4], alone, atol=1e-6)
    assert len(np.unique(np.asarray(whole[:16]), axis=0)) > 1  # of one caption, by their keys alone
    unguided = generate(variables, keys(64), condition, kept, 0.0, 0.0)
    absent = generate(variables, keys(64), condition, ~kept, 1.0, 0.0)
    np.testing.assert_allclose(unguided, absent, atol=1e-6)
    assert not np.allclose(unguided, whole)


def test_guidance_moves_the_logits_by_its_definition():
    """w = 3 on the one code of a one-component prior, against frequencies of softmax(u + 3 (c - u))."""
    stage = dataclasses.replace(FINE, model=dataclasses.replace(FINE.model, components=1))
    batch = toy_batch()
    variables = Variables(testing.tiny_variables(FINE).params, stage.calibrate({}, iter([batch] * 4)))
    condition = {name: value[:1] for name, value in stage.condition(batch).items()}
    count, quantile = 2048, 0.99  # the last dot product bucket alone
    many = {name: jnp.repeat(value, count, axis=0) for name, value in condition.items()}
    plan = stage.plan(ArSamplingConfig(3.0, quantile))
    samples = jax.jit(stage.sample)(variables, keys(count), many, plan)
    frequencies = np.bincount(codes.encode(variables.stats, samples)[:, 0], minlength=8) / count

    top, both = jnp.full(2, 7, jnp.int32), {name: jnp.repeat(value, 2, axis=0) for name, value in condition.items()}
    apply, drop = jax.jit(ArPriorNetwork(stage.model).apply), jnp.array([False, True])
    conditioning, unconditional = apply({"params": variables.params}, top[:, None], top, **both, drop_text=drop)[:, 0]
    expected = jax.nn.softmax(unconditional + 3.0 * (conditioning - unconditional))
    assert np.abs(frequencies - expected).max() < 0.04 < np.abs(frequencies - jax.nn.softmax(conditioning)).max()


def test_new_numbers_compile_nothing(toy, generate):
    variables, batch, _ = toy
    condition, kept = repeated(batch, slice(0, 4), 16), jnp.zeros(64, bool)
    generate(variables, keys(64), condition, kept, 1.0, 0.5)
    before = len(generate.traces)
    for guidance, quantile in ((1.1, 0.5), (4.0, 0.7), (2.0, 0.0)):
        generate(variables, keys(64), condition, kept, guidance, quantile)
    assert len(generate.traces) == before
    plan, other, unguided = (STAGE.plan(ArSamplingConfig(scale, 0.7)) for scale in (3.0, 1.7, 1.0))
    assert (plan.guided, plan.guidance, plan.dot_quantile) == (True, 3.0, 0.7)
    assert jax.tree.structure(plan) == jax.tree.structure(other) != jax.tree.structure(unguided)


def test_examples_of_a_batch_have_each_their_numbers(toy):
    """Arrays in the place of a plan's numbers: each example is sampled as in a batch of its own settings."""
    variables, batch, _ = toy
    numbers = [(3.0, 0.0, 0.5, 0.9), (1.5, 0.9, 5.0, 0.99), (4.0, 0.5, 100.0, 0.5), (0.5, 0.7, 1.0, 0.8)]
    plans = [STAGE.plan(ArSamplingConfig(w, quantile, t, None, top_p)) for w, quantile, t, top_p in numbers]
    sample, condition = jax.jit(STAGE.sample), repeated(batch, slice(0, 4), 4)
    alone = [sample(variables, keys(16), condition, plan) for plan in plans]
    rows = [plans[row % 4] for row in range(16)]
    together = sample(variables, keys(16), condition, jax.tree.map(lambda *each: jnp.asarray(each, jnp.float32), *rows))
    np.testing.assert_allclose(together, [alone[row % 4][row] for row in range(16)], atol=1e-6)
    assert len({tuple(np.asarray(one).ravel().tolist()) for one in alone}) > 1


def test_truncated_logits():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))

    def kept(top_k, top_p):
        return np.isfinite(truncated(logits, top_k, top_p)).tolist()

    assert truncated(logits, None, None) is logits
    assert kept(2, None) == [[True, True, False, False], [False, False, True, True]]
    assert kept(None, 0.6) == [[True, True, False, False], [False, False, True, True]]
    assert kept(None, 0.45) == [[True, False, False, False], [False, False, True, True]]
    assert kept(3, 0.5) == [[True, False, False, False], [False, False, True, True]]  # 0.4 and 0.3 of 0.9
    assert kept(4, 0.999) == [[True] * 4] * 2 and kept(1, 0.01)[0] == [True, False, False, False]
    same = np.where(np.isfinite(truncated(logits, 3, None)), logits, 0)
    np.testing.assert_array_equal(same[np.nonzero(same)], np.asarray(logits)[np.nonzero(same)])


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.85])
def test_dots_are_uniform_above_the_quantile(quantile):
    samples = np.asarray(top_dots(keys(8192), 32, quantile))
    first = int(quantile * 32)
    counts = np.bincount(samples, minlength=32)
    assert counts[:first].sum() == 0 and len(counts) == 32
    share = np.full(32 - first, 1 / 32 / (1 - quantile))
    share[0] = 1 - share[1:].sum()  # the quantile may cut a bucket
    np.testing.assert_allclose(counts[first:] / 8192, share, atol=0.02)


def test_drop_rate():
    """A stage that always drops ignores the caption; one that never does, does not."""
    batch = toy_batch()
    stats = FINE.calibrate({}, iter([batch] * 4))
    params = testing.tiny_variables(FINE).params
    other = {**batch, "text_emb": batch["text_emb"] * 2.0, "tokens": jnp.flip(batch["tokens"], axis=0)}
    for rate, ignored in ((1.0, True), (0.0, False)):
        loss = jax.jit(dataclasses.replace(FINE, drop_text=rate).loss)
        one, two = (loss(params, stats, {}, rng.root(0), b)[0] for b in (batch, other))
        assert (float(one) == float(two)) == ignored


# --- calibration, training, the disk ----------------------------------------------------------


class ImageStream:
    """Batch n has images and captions of seed n; the position is the whole state."""

    def __init__(self):
        self.position, self.log = 0, []

    def __next__(self):
        self.log.append(self.position)
        self.position += 1
        return testing.tiny_batch(8, seed=self.position - 1)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        pass


def one_device():
    axes = jax.sharding.AxisType.Auto
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(axes,) * 3, devices=jax.devices()[:1])


def job(tmp_path, total_steps, stage=FINE):
    run = RunConfig(0, total_steps, batch_size=8, log_every=1, checkpoint_every=2)
    optimizer = make_optimizer(OptimConfig(lr=1e-2), 4)
    folder = StageFolder(tmp_path, stage.name)
    folder.write_json("config.json", {})
    return Job(run, stage, testing.tiny_frozen(stage), optimizer, 0.9, ImageStream(), one_device(), folder)


def test_contract():
    assert STAGE.calibrates and not testing.tiny_stage("prior").calibrates
    assert hash(STAGE) == hash(dataclasses.replace(STAGE)) and STAGE.requires == ("clip",)
    for member in ("init", "prepare", "loss"):
        assert callable(getattr(STAGE, member)) and hasattr(Stage, member)
    prepared = jax.eval_shape(STAGE.prepare, testing.tiny_frozen(STAGE), testing.tiny_batch(3))
    assert prepared["image_emb"].shape == prepared["text_emb"].shape == (3, testing.EMBED_DIM)
    batch = toy_batch()
    assert all(STAGE.prepare({}, batch)[name] is value for name, value in batch.items())  # nothing overwritten
    with pytest.raises(UserError, check=mentions("32 calibration_examples", "33 buckets")):
        dataclasses.replace(STAGE, model=dataclasses.replace(MODEL, buckets=33))
    with pytest.raises(UserError, check=mentions("sampling.dot_quantile", 1.0)):
        ArSamplingConfig(dot_quantile=1.0)
    with pytest.raises(UserError, check=mentions("sampling.top_p", 0.0)):
        ArSamplingConfig(top_p=0.0)
    with pytest.raises(UserError, check=mentions("sampling.temperature", 0.0)):
        ArSamplingConfig(temperature=0.0)
    with pytest.raises(UserError, check=mentions("top_k 3", "2 codes", "stage ar_prior")):
        STAGE.check_sampling(ArSamplingConfig(top_k=3))


def test_the_likeliest_codes_are_the_samples_at_top_k_of_one():
    """Whatever the key; and at a high temperature the samples are spread."""
    stage = dataclasses.replace(STAGE, model=dataclasses.replace(MODEL, buckets=8, layers=1))
    variables, batch = testing.tiny_variables(stage), toy_batch()
    condition = {name: jnp.repeat(value[:1], 16, axis=0) for name, value in stage.condition(batch).items()}
    generate = jax.jit(stage.sample)

    def distinct(**fields):
        plan = stage.plan(ArSamplingConfig(dot_quantile=0.99, **fields))
        return len(np.unique(np.asarray(generate(variables, keys(16), condition, plan)).round(4), axis=0))

    assert distinct(top_k=1) == distinct(top_p=1e-6) == distinct(temperature=1e-5) == 1
    assert distinct(temperature=100.0) == 16


def test_components_must_retain_the_required_variance():
    batch = toy_batch()
    share = 0.999  # eight embeddings of rank 7, of which six components are kept
    demanding = dataclasses.replace(STAGE, retained_variance=share)
    with pytest.raises(
        UserError, check=mentions("config.model.components", 6, share, "conditioning.retained_variance", 7)
    ):
        demanding.calibrate({}, iter([batch] * 4))
    content = dataclasses.replace(STAGE, retained_variance=0.5).calibrate({}, iter([batch] * 4))
    assert content["basis"].shape == (16, 6)


def test_calibration_fills_what_init_left_empty():
    frozen, stream = testing.tiny_frozen(FINE), ImageStream()
    stats = FINE.calibrate(frozen, stream_batches(stream))
    assert stream.log == [0, 1, 2, 3]  # 32 examples
    empty = jax.eval_shape(FINE.init, rng.root(0)).stats
    assert jax.tree.structure(stats) == jax.tree.structure(empty)
    assert all(value.shape == empty[name].shape and value.dtype == empty[name].dtype for name, value in stats.items())
    prepare = jax.jit(FINE.prepare)
    rows = [prepare(frozen, testing.tiny_batch(8, seed=n)) for n in range(4)]
    image_emb, text_emb = (jnp.concatenate([row[name] for row in rows]) for name in ("image_emb", "text_emb"))
    for component in np.asarray(codes.encode(stats, image_emb)).T:
        np.testing.assert_array_equal(np.bincount(component, minlength=8), 4)
    np.testing.assert_array_equal(np.bincount(codes.encode_dot(stats, image_emb, text_emb), minlength=8), 4)


def stream_batches(stream):
    while True:
        yield next(stream)


def test_calibrated_once_then_kept_restored_and_never_trained(tmp_path):
    """And a resumed run is the uninterrupted one, bit for bit."""
    straight = job(tmp_path / "straight", 4)
    whole = train(straight)
    # four batches to calibrate on, then training from the first batch again
    assert straight.stream.log[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
    expected = FINE.calibrate(straight.frozen, stream_batches(ImageStream()))
    for name, value in whole.stats.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)

    train(job(tmp_path / "halves", 2))
    second = job(tmp_path / "halves", 4)
    halves = train(second)
    assert second.stream.log[0] == 2  # no calibration, and on from the third batch
    for one, two in zip(jax.tree.leaves(whole.trees()), jax.tree.leaves(halves.trees()), strict=True):
        np.testing.assert_array_equal(one, two)

    shapes = with_shardings(abstract := jax.eval_shape(FINE.init, rng.root(0)), tree_shardings(abstract, second.mesh))
    restored = Checkpoints(second.folder).restore({"ema": shapes.params, "stats": shapes.stats})
    for name, value in whole.stats.items():
        np.testing.assert_array_equal(restored.trees["stats"][name], value)


@pytest.mark.sharding
def test_sharded_equals_one_device(monkeypatch):
    monkeypatch.setattr("dalle2_jax.training.sharding.SIZE_FLOOR", 64)
    frozen, optimizer = testing.tiny_frozen(FINE), make_optimizer(OptimConfig(lr=1e-2, eps=1e-3), 3)
    # Adam's default eps makes a whole step of a gradient that is rounding alone, such as the last bias's here
    stats, losses = FINE.calibrate(frozen, stream_batches(ImageStream())), {}
    for mesh in (one_device(), make_mesh(MeshConfig(2, 2, 2))):
        state = init_state(FINE, optimizer, rng.root(0), mesh, stats)
        if mesh.size == 8:
            kernel = state.params["context_kv"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
            assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state.stats))
        step = make_train_step(FINE, optimizer, 0.9, state_shardings(FINE, optimizer, mesh))
        losses[mesh.size] = []
        for n in range(3):
            state, metrics = step(state, frozen, rng.root(0), shard_batch(testing.tiny_batch(8, seed=n), mesh))
            losses[mesh.size].append(float(metrics["loss"]))
        np.testing.assert_array_equal(state.stats["edges"], stats["edges"])
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)
