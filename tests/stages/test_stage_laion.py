"""The prior's stage around LAION's network: its space, what it goes without, and what does not fit it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig
from dalle2_jax.stages import EmbeddingConfig, PriorStage

SIZE, DIM, LENGTH = 4, testing.EMBED_DIM, testing.CONTEXT_LENGTH
PAPER = testing.tiny_stage("prior")
TINY = LaionPriorConfig(DIM, 1, 2, 6, 12, LENGTH + 2, PAPER.diffusion.num_steps)
NULLS = ("learned", "padding", "hidden")


def stage_of(nulls="learned", **fields):
    return dataclasses.replace(PAPER, model=dataclasses.replace(TINY, nulls=nulls), **fields)


def batch(seed=0):
    """Returns captions, with CLIP's embeddings of them and of images in the stage's contract."""
    noise = np.random.default_rng(seed)
    emb = [PAPER.clip.embedding.apply(noise.standard_normal((SIZE, DIM), np.float32)) for _ in range(2)]
    states = noise.standard_normal((SIZE, LENGTH, DIM), np.float32)
    captions = {name: jnp.asarray(value) for name, value in testing.tiny_batch(SIZE, seed).items() if name != "image"}
    return {**captions, "image_emb": emb[0], "text_emb": emb[1], "text_seq": states}


def variables(stage):
    """Random ones; of unit size where embeddings stand."""
    tiny = testing.tiny_variables(stage)
    nulls = {name: 10 * value for name, value in tiny.params.items() if name.startswith(("null", "query"))}
    return tiny._replace(params={**tiny.params, **nulls})


def keys():
    return rng.per_image(rng.root(0), jnp.arange(SIZE, dtype=jnp.int32))


def differ(one, other):
    """Every row differs."""
    assert (abs(np.asarray(one) - np.asarray(other)).max(axis=1) > 1e-3).all()


# --- what it goes without ---------------------------------------------------------------------


@pytest.mark.parametrize(("nulls", "parts"), [("learned", ("image", "text")), ("padding", ()), ("hidden", ("text",))])
def test_what_may_be_absent_is_the_networks_to_say(nulls, parts):
    stage = stage_of(nulls, drop_text=0.2)
    assert stage.drop_rates == {name: {"image": 0.1, "text": 0.2}[name] for name in parts}
    assert stage.condition(batch()).keys() == {"text_emb", "text", "mask"}
    stage.check_sampling(stage.sampling if parts else dataclasses.replace(stage.sampling, guidance=1.0))


def test_a_network_that_was_never_without_text_has_no_guidance():
    with pytest.raises(UserError, check=mentions("stage prior", "its condition", "guidance")):
        stage_of("padding").check_sampling(PAPER.sampling)
    with pytest.raises(UserError, check=mentions("stage prior", "image_guidance")):
        stage_of("hidden").check_sampling(dataclasses.replace(PAPER.sampling, image_guidance=2.0))


@pytest.mark.parametrize("nulls", NULLS)
def test_training_and_sampling_bind_the_same_network(nulls):
    """Whatever is dropped; and what is dropped is not seen."""
    stage, conditioning = stage_of(nulls), stage_of(nulls).condition(batch())
    params, x_t, t = variables(stage).params, batch(1)["image_emb"], jnp.arange(SIZE, dtype=jnp.int32)

    @jax.jit
    def run(conditioning, x_t, dropped):
        drops = {name: jnp.full(SIZE, dropped[name]) for name in stage.drop_rates}
        ways = [stage.bind(params, conditioning, drops, key)(x_t, t) for key in (None, rng.root(0))]
        return jnp.stack(ways)

    whole = run(conditioning, x_t, {"image": False, "text": False})
    np.testing.assert_allclose(*whole, atol=1e-5)
    other, rows = stage.condition(batch(2)), {"image": x_t, "text": x_t}
    for name in stage.drop_rates:
        dropped = {"image": False, "text": False} | {name: True}
        without = run(conditioning, x_t, dropped)
        np.testing.assert_allclose(*without, atol=1e-5)
        differ(without[0], whole[0])
        unseen = run(conditioning, -rows[name], dropped) if name == "image" else run(other, x_t, dropped)
        np.testing.assert_array_equal(unseen, without)
    differ(run(other, x_t, {"image": False, "text": False})[0], whole[0])


@pytest.mark.parametrize("nulls", ["learned", "hidden"])
def test_guidance_leads_away_from_the_unconditional_prediction(nulls):
    """Without the caption, and where it can be, without the noised embedding."""
    stage, conditioning = stage_of(nulls), stage_of(nulls).condition(batch())
    params, x_t, t = variables(stage).params, batch(1)["image_emb"], jnp.full(SIZE, 50, jnp.int32)
    config = dataclasses.replace(stage.sampling, guidance=2.5)

    @jax.jit
    def run(conditioning, x_t):
        drops = [{name: jnp.full(SIZE, absent) for name in stage.drop_rates} for absent in (True, False)]
        without, whole = (stage.bind(params, conditioning, drop, None)(x_t, t) for drop in drops)
        return stage._guided(params, conditioning, stage.plan(config))(x_t, t), without + 2.5 * (whole - without)

    np.testing.assert_allclose(*run(conditioning, x_t), atol=1e-4)


@pytest.mark.parametrize("nulls", NULLS)
def test_training_lowers_the_loss_and_reaches_every_parameter(nulls):
    stage = stage_of(nulls, drop_text=0.3, drop_image=0.3)
    params, stats, prepared = variables(stage).params, stage.init_stats(), stage.prepare({}, batch())
    loss = jax.jit(jax.value_and_grad(lambda params: stage.loss(params, stats, {}, rng.root(3), prepared)[0]))
    losses = []
    for _ in range(4):
        value, gradients = loss(params)
        losses.append(float(value))
        params = jax.tree.map(lambda leaf, gradient: leaf - 0.004 * gradient, params, gradients)
    assert np.isfinite(losses).all() and sorted(losses, reverse=True) == losses
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert (gradient != 0).any(), jax.tree_util.keystr(path)


# --- its space --------------------------------------------------------------------------------


class Oracle:
    """In the place of a network: knows x_0."""

    def __init__(self, x_0):
        self.x_0 = x_0

    def apply(self, variables, *args, method=None, **drops):
        return () if method == "encode_prefix" else self.x_0[: len(args[-1])]


@pytest.mark.parametrize("scale", [1.0, 17.2])
def test_unit_embeddings_are_diffused_at_sqrt_of_their_width(scale, monkeypatch):
    """Of any scale in the contract, and handed back in it."""
    clip = dataclasses.replace(PAPER.clip, embedding=EmbeddingConfig("unit", scale))
    stage = stage_of("padding", clip=clip)
    emb = clip.embedding.apply(batch()["image_emb"])
    x_0, condition = stage.example({}, rng.root(0), {**batch(), "image_emb": emb})
    np.testing.assert_allclose(jnp.linalg.norm(x_0, axis=-1), DIM**0.5, rtol=1e-5)
    anything = testing.tiny_variables(stage)
    monkeypatch.setattr(PriorStage, "network", Oracle(x_0))
    plain = dataclasses.replace(stage.sampling, guidance=1.0)
    samples = stage.sample(anything, keys(), condition, stage.plan(plain))
    np.testing.assert_allclose(samples, emb, rtol=1e-5, atol=1e-6)


def test_raw_embeddings_lose_their_length():
    raw = dataclasses.replace(PAPER.clip, embedding=EmbeddingConfig("raw", 1.0))
    needs = ("embedding.normalisation 'unit'", "scale 4", "conditioning.whiten True")
    with pytest.raises(UserError, check=mentions("stage prior", *needs)):
        stage_of(clip=raw)
    stage, emb = stage_of(clip=raw, whiten=True), batch()["image_emb"]
    stats = {"mean": jnp.full(DIM, 0.5), "std": jnp.full(DIM, 2.0)}
    x_0, _ = stage.example(stats, rng.root(0), batch())
    np.testing.assert_allclose(x_0, (emb - 0.5) / 2, rtol=1e-6)
    dataclasses.replace(PAPER, clip=raw)  # the paper's takes any


def test_the_papers_prior_diffuses_the_contracts_embeddings():
    ready = testing.tiny_batch(SIZE) | batch()
    np.testing.assert_array_equal(PAPER.example({}, rng.root(0), ready)[0], ready["image_emb"])


def test_token_zero_is_hidden():
    """Within a caption too."""
    conditioning = batch()
    tokens, mask = conditioning["tokens"].at[0, 1].set(0), conditioning["mask"]
    assert mask[0, 1]
    conditioning["tokens"] = tokens
    np.testing.assert_array_equal(stage_of().condition(conditioning)["mask"], mask.at[0, 1].set(False))
    np.testing.assert_array_equal(PAPER.condition(conditioning)["mask"], mask)


def test_a_table_of_timesteps_is_as_long_as_the_schedule():
    long = dataclasses.replace(PAPER.diffusion, num_steps=101)
    with pytest.raises(UserError, check=mentions(100, "model.timesteps", "diffusion.num_steps", 101)):
        stage_of(diffusion=long)
    any_time = dataclasses.replace(TINY, timesteps=None)
    assert dataclasses.replace(stage_of(), model=any_time, diffusion=long).schedule
