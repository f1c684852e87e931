"""Stages that need no CLIP, GLIDE's and ADM's: what they are told and see of a picture; and a last network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import rng, testing
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import Variables
from dalle2_jax.types import UserError

PLAIN = testing.tiny_stage("upsampler")
SIZE = 3
TEXT = TextConfig(testing.VOCAB_SIZE, testing.CONTEXT_LENGTH, testing.WIDTH, layers=1, heads=2)


def network(text_input, unet, **fields):
    """A decoder's network without CLIP."""
    if text_input == "tokens":
        unet = dataclasses.replace(unet, context_dim=testing.WIDTH)
        return DecoderConfig(dataclasses.replace(unet, **fields), None, text_input="tokens", text=TEXT)
    return DecoderConfig(dataclasses.replace(unet, **fields), None, text_input="label", num_classes=5)


def upsampler(text_input, inpaint=False, **fields):
    channels = 10 if inpaint else 6
    return dataclasses.replace(PLAIN, model=network(text_input, PLAIN.model, in_channels=channels), inpaint=inpaint)


def decoder(text_input, inpaint=False):
    stage = testing.tiny_stage("decoder")
    unet = dataclasses.replace(stage.model.unet, context_dim=None)
    model = network(text_input, unet, in_channels=7 if inpaint else 3)
    return dataclasses.replace(stage, model=model, clip=None, inpaint=inpaint)


KINDS = ("tokens", "label")


def batch(text_input, seed=0):
    """Pictures, and for each a caption or a class."""
    whole = testing.tiny_batch(SIZE, seed)
    if text_input == "label":
        whole |= {"tokens": np.array([[seed], [4], [3]], np.int32), "mask": np.ones((SIZE, 1), bool)}
    return whole


def keys(count=SIZE):
    return rng.per_image(rng.root(0), jnp.arange(count, dtype=jnp.int32))


def small():
    return jnp.tanh(jnp.asarray(np.random.default_rng(0).standard_normal((SIZE, 8, 8, 3), np.float32)))


def draw(stage, condition, absent=None, config=None):
    """What a stage with random weights draws."""

    @jax.jit
    def run(variables, condition, absent):
        return stage.draw(variables, keys(), condition, config or stage.sampling, {}, absent)

    return run(testing.tiny_variables(stage), condition, absent)


# --- what is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_leans_on_what_it_is_told(text_input):
    stage = upsampler(text_input)
    one, other = (draw(stage, stage.condition(small(), batch(text_input, seed))) for seed in (0, 1))
    assert one.shape == (SIZE, 16, 16, 3)
    assert abs(one - other)[0].max() > 1e-3
    if text_input == "label":  # the other two are of the same class in both
        np.testing.assert_array_equal(one[1:], other[1:])


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_without_a_batch_is_told_nothing(text_input):
    stage = upsampler(text_input)
    nothing = draw(stage, stage.condition(small()))
    absent = jnp.array([True, False, True])
    told = draw(stage, stage.condition(small(), batch(text_input)), absent)
    np.testing.assert_allclose(told[::2], nothing[::2], atol=1e-5)
    assert abs(told - nothing)[1].max() > 1e-3


@pytest.mark.parametrize("make", [upsampler, decoder])
@pytest.mark.parametrize("text_input", KINDS)
def test_stages_without_clip_train(make, text_input):
    stage = make(text_input)
    assert stage.borrows == () and set(stage.drop_rates) == {"text"}
    params, stats = jax.eval_shape(stage.init, rng.root(0))
    prepared = stage.prepare({}, batch(text_input))
    assert prepared.keys() == batch(text_input).keys()
    loss, outputs = jax.eval_shape(stage.loss, params, stats, rng.root(0), prepared)
    assert loss.shape == () and jax.tree.structure(outputs.stats) == jax.tree.structure(stats)


def test_captions_are_dropped_at_their_rate():
    """One that always drops does not read them, one that never does, does."""
    params = testing.tiny_variables(upsampler("tokens")).params
    for rate, ignored in ((1.0, True), (0.0, False)):
        stage = dataclasses.replace(upsampler("tokens"), drop_text=rate)
        other = {**batch("tokens"), "tokens": np.flip(batch("tokens")["tokens"], axis=0)}
        loss = jax.jit(stage.loss)
        one, two = (loss(params, {}, rng.root(0), b)[0] for b in (batch("tokens"), other))
        assert (float(one) == float(two)) == ignored


@pytest.mark.parametrize("make", [upsampler, decoder])
def test_bits_per_dimension_of_stages_without_clip(make):
    """Of inpainting networks, too: the bound is of the picture, told what of it is known."""
    stage = make("label", inpaint=True)
    stage = dataclasses.replace(stage, diffusion=dataclasses.replace(stage.diffusion, schedule="cosine", num_steps=3))

    @jax.jit
    def measure(params, batch):
        x_0, condition = stage.example({}, rng.root(0), batch)
        return stage.bits_per_dim(params, keys(), x_0, condition)

    bits = measure(testing.tiny_variables(stage).params, batch("label"))
    assert bits["total"].shape == (SIZE,) and np.isfinite(bits["total"]).all()


def test_a_told_upsampler_has_guidance():
    stage = upsampler("tokens")
    guided = dataclasses.replace(stage.sampling, guidance=3.0)
    stage.check_sampling(guided)
    condition = stage.condition(small(), batch("tokens"))
    assert abs(draw(stage, condition, config=guided) - draw(stage, condition)).max() > 1e-3


def test_a_plain_upsampler_is_a_unet_as_before():
    own, told = (jax.eval_shape(stage.init, rng.root(0)).params for stage in (PLAIN, upsampler("label")))
    assert own.keys() == told["unet"].keys() and told.keys() == {"unet", "label_embedding"}
    assert PLAIN.condition(small(), batch("tokens")).keys() == {"low_res"}


# --- what is known ----------------------------------------------------------------------------


class Echo:
    """In the place of a network: returns its input channels."""

    def apply(self, variables, x, *args, method=None, **kwargs):
        return () if method is DecoderNetwork.encode_condition else x


def known():
    """A picture, and where it is known."""
    noise = np.random.default_rng(1)
    return noise.uniform(-1, 1, (SIZE, 16, 16, 3)).astype(np.float32), noise.uniform(size=(SIZE, 16, 16, 1)) < 0.5


def seen_by(stage, condition, monkeypatch):
    monkeypatch.setattr(type(stage), "network", Echo())
    x_t = jnp.asarray(np.random.default_rng(3).standard_normal((SIZE, 16, 16, 3), np.float32))
    drops = {name: jnp.zeros(SIZE, bool) for name in stage.drop_rates}
    return np.asarray(x_t), np.asarray(stage.bind({}, condition, drops, None)(x_t, jnp.zeros(SIZE, jnp.int32)))


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_sees_the_picture_what_is_known_its_mask_and_the_small_one(text_input, monkeypatch):
    stage, (picture, mask) = upsampler(text_input, inpaint=True), known()
    told = stage.condition(small(), batch(text_input))
    x_t, seen = seen_by(stage, {**told, "known": jnp.asarray(picture), "known_mask": jnp.asarray(mask)}, monkeypatch)
    np.testing.assert_array_equal(seen, np.concatenate([x_t, picture * mask, mask, told["low_res"]], axis=-1))
    _, seen = seen_by(stage, told, monkeypatch)
    np.testing.assert_array_equal(seen, np.concatenate([x_t, 0 * picture, 0 * mask, told["low_res"]], axis=-1))


@pytest.mark.parametrize("text_input", KINDS)
def test_a_decoder_sees_the_picture_what_is_known_and_its_mask(text_input, monkeypatch):
    stage, (picture, mask) = decoder(text_input, inpaint=True), known()
    told = stage.condition(batch(text_input))
    x_t, seen = seen_by(stage, {**told, "known": jnp.asarray(picture), "known_mask": jnp.asarray(mask)}, monkeypatch)
    np.testing.assert_array_equal(seen, np.concatenate([x_t, picture * mask, mask], axis=-1))
    x_t, seen = seen_by(decoder(text_input), told, monkeypatch)
    np.testing.assert_array_equal(seen, x_t)


@pytest.mark.parametrize("make", [upsampler, decoder])
def test_training_shows_part_of_the_picture_itself(make):
    stage = make("tokens", inpaint=True)
    picture, condition = jax.jit(stage.example)({}, rng.root(0), batch("tokens"))
    np.testing.assert_array_equal(condition["known"], picture)
    assert condition["known_mask"].shape == (*picture.shape[:3], 1) and condition["known_mask"].dtype == bool
    assert stage.sample_shape(condition) == picture.shape[1:]


def test_inpainting_draws_are_guided_and_lean_on_what_is_known():
    stage, (picture, mask) = upsampler("tokens", inpaint=True), known()
    told = stage.condition(small(), batch("tokens"))
    guided = dataclasses.replace(stage.sampling, guidance=2.0)
    around = draw(stage, {**told, "known": picture, "known_mask": mask}, config=guided)
    assert abs(around - draw(stage, told, config=guided)).max() > 1e-3


# --- the last network -------------------------------------------------------------------------

TWO = dataclasses.replace(PLAIN, last_network=True)


def two_networks():
    """Two networks' variables, and those of each alone."""
    first, last = (testing.tiny_variables(PLAIN, seed).params for seed in (0, 1))
    return Variables(first, {"last": last}), Variables(first, {}), Variables(last, {})


@pytest.mark.parametrize(
    ("steps", "alone"),
    [("t:20,60,99", "first"), ("t:0", "last"), ("t:0,60,99", "neither")],
)
def test_the_last_network_takes_the_step_at_time_zero_and_no_other(steps, alone):
    config = dataclasses.replace(TWO.sampling, steps=steps)
    both, first, last = two_networks()

    @jax.jit
    def run(variables):
        stage = TWO if variables.stats else PLAIN
        return stage.draw(variables, keys(), stage.condition(small()), config, {}, None)

    drawn, ours = run(both), {"first": run(first), "last": run(last)}
    for name, other in ours.items():
        assert np.allclose(drawn, other, atol=1e-5) == (name == alone)


def test_the_step_at_time_zero_begins_where_the_first_network_ended():
    config = dataclasses.replace(TWO.sampling, steps="t:0,60,99")
    both, first, last = two_networks()
    seen = []

    def watch(x_0):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_0)
        return x_0

    for stage, variables in ((TWO, both), (PLAIN, first)):
        condition = stage.condition(small())
        stage.draw(variables, keys(), condition, config, {}, None, hook=watch)
        jax.effects_barrier()
    ours, theirs = seen[:3], seen[3:]
    for step in (0, 1):
        np.testing.assert_allclose(ours[step], theirs[step], atol=1e-5)
    assert not np.allclose(ours[2], theirs[2], atol=1e-3)


@pytest.mark.parametrize("timesteps", ["uniform", "loss_second_moment"])
def test_training_leaves_the_last_network_as_it_is(timesteps):
    stage = dataclasses.replace(TWO, diffusion=dataclasses.replace(TWO.diffusion, timesteps=timesteps))
    params, first_stats = jax.eval_shape(stage.init, rng.root(0))
    assert jax.tree.map(jnp.shape, first_stats["last"]) == jax.tree.map(jnp.shape, params)
    params, stats = two_networks()[0]
    stats = {**stage.init_stats(), **stats}
    assert stats.keys() == first_stats.keys()
    _, outputs = jax.jit(stage.loss)(params, stats, rng.root(0), testing.tiny_batch(SIZE))
    assert outputs.stats.keys() == stats.keys() and (len(stats) > 1) == (timesteps != "uniform")
    jax.tree.map(np.testing.assert_array_equal, outputs.stats["last"], stats["last"])


# --- mistakes ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    clip_like = DecoderConfig(dataclasses.replace(PLAIN.model, context_dim=8), image_emb_dim=16)
    for change, message in (
        ({"upscale": "cubik"}, "unknown upscale 'cubik': did you mean 'cubic'"),
        ({"model": clip_like}, "upsampler_1: an upsampler is told tokens or a label, and nothing of CLIP's"),
        ({"inpaint": True}, "in_channels 6 is not 3 pictures of the same channels and a mask"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(PLAIN, **change)
