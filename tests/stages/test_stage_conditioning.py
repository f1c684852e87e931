"""What Karlo, GLIDE and ECLIPSE ask of the stages: whitened embeddings, the empty caption, no CLIP, one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.diffusion.timesteps import HISTORY
from dalle2_jax.errors import UserError
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.stages import DecoderStage, DiffusionConfig, SamplingConfig, Variables
from dalle2_jax.stages.clip import empty_captions

SIZE = 3
EMPTY = testing.WordTokenizer().encode([""], testing.CONTEXT_LENGTH)


def variant(kind, model=None, **fields):
    stage = testing.tiny_stage(kind)
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, **(model or {})), **fields)


STATES = {"text_input": "clip", "text_width": testing.WIDTH}
PRIOR = variant("prior", {**STATES, "vocab_size": None, "learned_null": False})
TOKEN_PRIOR = variant("prior", {"learned_null": False})
DECODER = variant("decoder", {**STATES, "text": None, "text_emb_proj": True}, empty_caption=True)
WITH_EMPTY = {"prior": PRIOR, "prior of tokens": TOKEN_PRIOR, "decoder": DECODER}


def keys(count=SIZE):
    return rng.per_image(rng.root(3), jnp.arange(count, dtype=jnp.int32))


@functools.cache
def prepared(stage, seed=0):
    batch = testing.tiny_batch(SIZE, seed)
    image_emb = np.random.default_rng(seed).standard_normal((SIZE, testing.EMBED_DIM), np.float32)
    return jax.jit(stage.prepare)(testing.tiny_frozen(stage), {**batch, "image_emb": image_emb})


@functools.cache
def drawer(stage, guidance):
    config = dataclasses.replace(stage.sampling, guidance=guidance)
    variables = testing.tiny_variables(stage)
    return jax.jit(
        lambda condition, absent: stage.sample(
            variables, keys(), condition, stage.plan(config, absent={"text": absent})
        )
    )


def generate(stage, batch, absent=(False,) * SIZE, guidance=1.0):
    return np.asarray(drawer(stage, guidance)(stage.condition(batch), jnp.array(absent)))


def close(left, right):
    np.testing.assert_allclose(left, right, atol=2e-5)


# --- the empty caption ------------------------------------------------------------------------


def test_the_empty_caption_follows_from_any_other():
    tokens, mask = testing.WordTokenizer().encode(["", "a", "a b c d e f g h i j"], testing.CONTEXT_LENGTH)
    for ours, theirs in zip(empty_captions(jnp.asarray(tokens), jnp.asarray(mask)), EMPTY, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, np.repeat(theirs, 3, axis=0))


@pytest.mark.parametrize("stage", WITH_EMPTY.values(), ids=WITH_EMPTY)
def test_an_absent_caption_is_the_empty_one(stage):
    """In sampling and under guidance; and what it replaces does not matter."""
    batch, other = prepared(stage), prepared(stage, seed=1)
    empty = {"text_emb": "null_text_emb", "text_seq": "null_text_seq", "mask": "null_mask"}
    written = {**batch, **{name: batch[null] for name, null in empty.items()}}
    written["tokens"] = jnp.asarray(np.repeat(EMPTY[0], SIZE, axis=0))
    absent = generate(stage, batch, (True,) * SIZE)
    close(absent, generate(stage, written))
    close(absent, generate(stage, {**other, "image_emb": batch["image_emb"]}, (True,) * SIZE))
    present = generate(stage, batch)
    assert (abs(absent - present).reshape(SIZE, -1).max(axis=1) > 1e-3).all()
    mixed = generate(stage, batch, (True, False, True))
    close(mixed, np.where(np.array([True, False, True]).reshape(-1, *(1,) * (absent.ndim - 1)), absent, present))


def test_clip_reads_the_empty_caption_as_any_other():
    clip = PRIOR.clip
    predicted = clip.encode_text(testing.tiny_variables(clip), dict(zip(("tokens", "mask"), EMPTY, strict=True)))
    for stage in (PRIOR, DECODER):
        for name, value in predicted.items():
            close(prepared(stage)[f"null_{name}"], np.repeat(value, SIZE, axis=0))


def test_training_drops_captions_for_the_empty_one():
    """A dropped condition has no influence; one that is not dropped has."""
    stage = PRIOR
    batch = {name: jnp.repeat(rows[:1], 64, axis=0) for name, rows in prepared(stage).items()}
    other = {name: jnp.repeat(rows[1:2], 64, axis=0) for name, rows in prepared(stage).items()}
    condition = [stage.condition(rows) for rows in (batch, other)]
    drop = jnp.arange(64) < 32
    noise, t = jnp.asarray(correlated(64)), jnp.ones(64, jnp.int32)
    params = testing.tiny_variables(stage).params

    @jax.jit
    def predict(condition):
        return stage.bind(params, condition, {"text": drop}, rng.root(0))(noise, t)

    one, two = map(predict, condition)
    np.testing.assert_array_equal(one[:32], two[:32])
    assert (abs(one - two)[32:].max(axis=1) > 1e-3).all()


def test_reading_adds_what_is_lacking_and_needs_no_clip_where_nothing_is():
    names = {"text_emb", "text_seq", "null_text_emb", "null_text_seq", "null_mask"}
    for stage in (PRIOR, DECODER):
        batch = testing.tiny_batch(SIZE)
        read = stage.prepare_captions(testing.tiny_variables(stage.clip), batch)
        assert {*read} - {*batch} == names
        assert (
            stage.prepare_captions(None, read).keys() == read.keys()
            and stage.prepare({}, prepared(stage)).keys() >= names
        )
    plain = testing.tiny_stage("decoder")
    assert plain.prepare_captions(None, batch) == batch  # it reads tokens


# --- whitening --------------------------------------------------------------------------------

WHITE = variant("prior", whiten=True, calibration_examples=20)


def correlated(count, seed=0):
    generate = np.random.default_rng(seed)
    scale = np.linspace(0.1, 3.0, testing.EMBED_DIM)
    return (5.0 + scale * generate.standard_normal((count, testing.EMBED_DIM))).astype(np.float32)


def batches(size=8):
    for seed in range(10):
        yield testing.tiny_batch(size, seed) | {"image_emb": jnp.asarray(correlated(size, seed))}


def test_mean_and_deviation_are_measured_on_whole_batches():
    assert WHITE.calibrates and not testing.tiny_stage("prior").calibrates
    stream = batches()
    stats = WHITE.calibrate(testing.tiny_frozen(WHITE), stream)
    assert next(stream)["image_emb"][0, 0] == correlated(8, 3)[0, 0]  # 20 examples are three batches of 8
    rows = np.concatenate([correlated(8, seed) for seed in range(3)]).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], rows.std(axis=0), rtol=1e-6)
    empty = WHITE.init_stats()
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in stats.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in empty.items()
    }
    assert WHITE.init_stats().keys() == jax.eval_shape(WHITE.init, rng.root(0)).stats.keys() == {"mean", "std"}
    x_0, _ = WHITE.example(stats, rng.root(0), {"image_emb": jnp.asarray(rows, jnp.float32), **conditioning(24)})
    np.testing.assert_allclose(x_0.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x_0.std(axis=0), 1, rtol=1e-4)


def conditioning(count):
    batch = testing.tiny_batch(count)
    return {"tokens": batch["tokens"], "mask": batch["mask"], "text_emb": jnp.ones((count, testing.EMBED_DIM))}


@pytest.mark.parametrize("value", [2.0, np.nan])
def test_embeddings_that_cannot_be_whitened_are_rejected(value):
    dull = ({**batch, "image_emb": batch["image_emb"].at[:, 3].set(value)} for batch in batches())
    with pytest.raises(UserError, check=mentions("not finite", "whitened", "conditioning.whiten False")):
        WHITE.calibrate(testing.tiny_frozen(WHITE), dull)


def test_a_whitened_prior_learns_and_samples_what_a_plain_one_does_in_its_space():
    plain = dataclasses.replace(WHITE, whiten=False)
    params, batch = testing.tiny_variables(plain).params, next(batches())
    stats = {"mean": jnp.full(testing.EMBED_DIM, 5.0), "std": jnp.linspace(0.1, 3.0, testing.EMBED_DIM)}
    batch |= {"text_emb": jnp.ones((8, testing.EMBED_DIM))}
    white = {**batch, "image_emb": (batch["image_emb"] - 5.0) / stats["std"][None]}
    ours = jax.jit(WHITE.loss)(params, stats, {}, rng.root(0), batch)
    theirs = jax.jit(plain.loss)(params, {}, {}, rng.root(0), white)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert ours[1].stats.keys() == stats.keys() and all((ours[1].stats[name] == stats[name]).all() for name in stats)
    condition = plain.condition(batch)

    def samples(stage, stats):
        variables, config = Variables(params, stats), stage.sampling
        plan = stage.plan(config, absent={"text": jnp.zeros(8, bool)})
        return jax.jit(lambda: stage.sample(variables, keys(8), condition, plan))()

    np.testing.assert_allclose(
        samples(WHITE, stats), 5.0 + stats["std"][None] * samples(plain, {}), rtol=1e-5, atol=1e-5
    )


def test_whitening_and_importance_sampling_share_the_statistics():
    stage = dataclasses.replace(WHITE, diffusion=DiffusionConfig("x0", num_steps=4, timesteps="loss_second_moment"))
    stats = stage.calibrate(testing.tiny_frozen(stage), batches())
    assert stats.keys() == stage.init_stats().keys() == {"mean", "std", "losses", "counts"}
    assert stats["losses"].shape == (4, HISTORY)
    after = jax.jit(stage.loss)(
        testing.tiny_variables(stage).params, stats, {}, rng.root(0), next(batches()) | conditioning(8)
    )
    after = after[1].stats
    assert after["counts"].sum() == 8 and (after["mean"] == stats["mean"]).all() and after.keys() == stats.keys()


# --- one step, no time ------------------------------------------------------------------------


def test_a_prior_without_time_goes_from_noise_to_the_embedding_at_once():
    stage = variant("prior", {"time_token": False}, sampling=SamplingConfig("ddim", steps="t:99", clip_sample=None))
    stage.check_sampling(stage.sampling)
    variables, batch = testing.tiny_variables(stage), next(batches(SIZE)) | conditioning(SIZE)
    assert "time_mlp" not in variables.params
    assert variables.params["positional_embedding"].shape == (testing.CONTEXT_LENGTH + 3, testing.WIDTH)
    condition, noise = stage.condition(batch), jnp.asarray(correlated(SIZE))

    @jax.jit
    def run(condition, noise):
        text = [condition[name] for name in ("text_emb", "text", "mask")]
        predicted = [
            stage.network.apply({"params": variables.params}, noise, jnp.full(SIZE, t), *text) for t in (0, 99)
        ]
        return stage.sample(variables, keys(), condition, stage.plan(x_T=noise)), *predicted

    samples, early, late = run(condition, noise)
    close(samples, early)
    np.testing.assert_array_equal(early, late)
    assert not np.allclose(run(condition, noise + 1.0)[0], samples, atol=1e-3)


# --- without CLIP -----------------------------------------------------------------------------


def test_a_decoder_without_an_image_embedding_requires_no_stage():
    model = testing.tiny_stage("decoder").model
    stage = variant("decoder", {"image_emb_dim": None}, clip=None)
    assert stage.requires == () and stage.drop_rates == {"text": 0.5}
    batch = testing.tiny_batch(SIZE)
    assert stage.prepare({}, batch) is batch and stage.prepare_captions(None, batch) is batch
    _, condition = stage.example({}, rng.root(0), batch)
    assert condition.keys() == {"text", "mask"}
    variables = testing.tiny_variables(stage)
    assert not any("image" in name for name in variables.params)
    loss, outputs = jax.jit(stage.loss)(*variables, {}, rng.root(0), batch)
    assert np.isfinite(loss) and outputs.stats == {}
    guided = generate(stage, batch, guidance=3.0)
    plain, alone = generate(stage, batch), generate(stage, batch, (True,) * SIZE)
    assert guided.shape == (SIZE, 8, 8, 3) and abs(guided - plain).max() > 1e-3 and abs(alone - plain).max() > 1e-3
    for wrong in (model, dataclasses.replace(model, image_emb_dim=None, text=None, **STATES)):
        with pytest.raises(UserError, check=mentions("stage decoder", "needs a clip")):
            dataclasses.replace(stage, model=wrong)
    with pytest.raises(UserError, check=mentions("empty_caption", "model.text_input 'clip'")):
        dataclasses.replace(stage, empty_caption=True)


def test_an_unconditional_decoder():
    unet = dataclasses.replace(testing.tiny_stage("decoder").model.unet, context_dim=None)
    base = testing.tiny_stage("decoder")
    sampling = dataclasses.replace(base.sampling, guidance=1.0)
    stage = DecoderStage(base.diffusion, sampling, "decoder", DecoderConfig(unet, None), None)
    assert stage.drop_rates == {} and stage.condition(testing.tiny_batch(SIZE)) == {}
    plan = stage.plan(sampling, absent={"text": jnp.ones(SIZE, bool)})
    samples = stage.sample(testing.tiny_variables(stage), keys(), {}, plan)
    assert samples.shape == (SIZE, 8, 8, 3)
    stage.check_sampling(sampling)


def test_a_clip_of_captions_alone():
    whole = testing.tiny_stage("clip_vit")
    stage = dataclasses.replace(whole, model=dataclasses.replace(whole.model, vision=None))
    variables, batch = testing.tiny_variables(stage), testing.tiny_batch(SIZE)
    assert variables.params.keys() == {"text", "logit_scale"}
    both = Variables({**testing.tiny_variables(whole).params, **variables.params}, {})
    for name, value in stage.encode_text(variables, batch).items():
        np.testing.assert_array_equal(value, whole.encode_text(both, batch)[name])
    for call in (
        lambda: stage.encode_image(variables, batch["image"]),
        lambda: stage.loss(*variables, {}, rng.root(0), batch),
    ):
        with pytest.raises(UserError, check=mentions("no image tower", "image encoder")):
            call()
