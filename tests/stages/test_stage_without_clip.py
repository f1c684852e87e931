"""Stages that need no CLIP (GLIDE and ADM): conditioning, inpainting inputs, and a second network for last steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import Variables

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
    """Images, and for each a caption or a class."""
    whole = testing.tiny_batch(SIZE, seed)
    if text_input == "label":
        whole |= {"tokens": np.array([[seed], [4], [3]], np.int32), "mask": np.ones((SIZE, 1), bool)}
    return whole


def keys(count=SIZE):
    return rng.per_image(rng.root(0), jnp.arange(count, dtype=jnp.int32))


def small():
    return jnp.tanh(jnp.asarray(np.random.default_rng(0).standard_normal((SIZE, 8, 8, 3), np.float32)))


def dropped(absent):
    return None if absent is None else {"text": absent}


def generate(stage, condition, absent=None, config=None):
    """Returns samples of a stage with random weights."""

    @jax.jit
    def run(variables, condition, absent):
        return stage.sample(variables, keys(), condition, stage.plan(config, absent=dropped(absent)))

    return run(testing.tiny_variables(stage), condition, absent)


# --- conditioning -----------------------------------------------------------------------------


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_depends_on_its_conditioning(text_input):
    stage = upsampler(text_input)
    one, other = (generate(stage, stage.low_res_condition(small(), batch(text_input, seed))) for seed in (0, 1))
    assert one.shape == (SIZE, 16, 16, 3)
    assert abs(one - other)[0].max() > 1e-3
    if text_input == "label":  # the other two are of the same class in both
        np.testing.assert_array_equal(one[1:], other[1:])


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_without_a_batch_is_unconditional(text_input):
    stage = upsampler(text_input)
    nothing = generate(stage, stage.low_res_condition(small()))
    absent = jnp.array([True, False, True])
    conditioning = generate(stage, stage.low_res_condition(small(), batch(text_input)), absent)
    np.testing.assert_allclose(conditioning[::2], nothing[::2], atol=1e-5)
    assert abs(conditioning - nothing)[1].max() > 1e-3


@pytest.mark.parametrize("make", [upsampler, decoder])
@pytest.mark.parametrize("text_input", KINDS)
def test_stages_without_clip_train(make, text_input):
    stage = make(text_input)
    assert stage.requires == () and set(stage.drop_rates) == {"text"}
    params, stats = jax.eval_shape(stage.init, rng.root(0))
    prepared = stage.prepare({}, batch(text_input))
    assert prepared.keys() == batch(text_input).keys()
    loss, outputs = jax.eval_shape(stage.loss, params, stats, {}, rng.root(0), prepared)
    assert loss.shape == () and jax.tree.structure(outputs.stats) == jax.tree.structure(stats)


def test_captions_are_dropped_at_their_rate():
    """One that always drops does not read them, one that never does, does."""
    params = testing.tiny_variables(upsampler("tokens")).params
    for rate, ignored in ((1.0, True), (0.0, False)):
        stage = dataclasses.replace(upsampler("tokens"), drop_text=rate)
        other = {**batch("tokens"), "tokens": np.flip(batch("tokens")["tokens"], axis=0)}
        loss = jax.jit(stage.loss)
        one, two = (loss(params, {}, {}, rng.root(0), b)[0] for b in (batch("tokens"), other))
        assert (float(one) == float(two)) == ignored


@pytest.mark.parametrize("make", [upsampler, decoder])
def test_bits_per_dimension_of_stages_without_clip(make):
    """Of inpainting networks, too: the bound of the image, conditioned on its known pixels."""
    stage = make("label", inpaint=True)
    stage = dataclasses.replace(stage, diffusion=dataclasses.replace(stage.diffusion, schedule="cosine", num_steps=3))

    @jax.jit
    def measure(params, batch):
        x_0, condition = stage.example({}, rng.root(0), batch)
        return stage.bits_per_dim(params, keys(), x_0, condition)

    bits = measure(testing.tiny_variables(stage).params, batch("label"))
    assert bits["total"].shape == (SIZE,) and np.isfinite(bits["total"]).all()


def test_a_conditioned_upsampler_has_guidance():
    stage = upsampler("tokens")
    guided = dataclasses.replace(stage.sampling, guidance=3.0)
    stage.check_sampling(guided)
    condition = stage.low_res_condition(small(), batch("tokens"))
    assert abs(generate(stage, condition, config=guided) - generate(stage, condition)).max() > 1e-3


def test_a_plain_upsampler_is_a_unet_as_before():
    own, conditioning = (jax.eval_shape(stage.init, rng.root(0)).params for stage in (PLAIN, upsampler("label")))
    assert own.keys() == conditioning["unet"].keys() and conditioning.keys() == {"unet", "label_embedding"}
    assert PLAIN.low_res_condition(small(), batch("tokens")).keys() == {"low_res"}


# --- what is known ----------------------------------------------------------------------------


class Echo:
    """In the place of a network: returns its input channels."""

    def apply(self, variables, x, *args, method=None, **kwargs):
        return () if method is DecoderNetwork.encode_condition else x


def known():
    """An image, and where it is known."""
    noise = np.random.default_rng(1)
    return noise.uniform(-1, 1, (SIZE, 16, 16, 3)).astype(np.float32), noise.uniform(size=(SIZE, 16, 16, 1)) < 0.5


def seen_by(stage, condition, monkeypatch):
    monkeypatch.setattr(type(stage), "network", Echo())
    x_t = jnp.asarray(np.random.default_rng(3).standard_normal((SIZE, 16, 16, 3), np.float32))
    drops = {name: jnp.zeros(SIZE, bool) for name in stage.drop_rates}
    return np.asarray(x_t), np.asarray(stage.bind({}, condition, drops, None)(x_t, jnp.zeros(SIZE, jnp.int32)))


@pytest.mark.parametrize("text_input", KINDS)
def test_an_upsampler_sees_the_image_what_is_known_its_mask_and_the_small_one(text_input, monkeypatch):
    stage, (image, mask) = upsampler(text_input, inpaint=True), known()
    conditioning = stage.low_res_condition(small(), batch(text_input))
    x_t, seen = seen_by(
        stage, {**conditioning, "known": jnp.asarray(image), "known_mask": jnp.asarray(mask)}, monkeypatch
    )
    np.testing.assert_array_equal(seen, np.concatenate([x_t, image * mask, mask, conditioning["low_res"]], axis=-1))
    _, seen = seen_by(stage, conditioning, monkeypatch)
    np.testing.assert_array_equal(seen, np.concatenate([x_t, 0 * image, 0 * mask, conditioning["low_res"]], axis=-1))


@pytest.mark.parametrize("text_input", KINDS)
def test_a_decoder_sees_the_image_what_is_known_and_its_mask(text_input, monkeypatch):
    stage, (image, mask) = decoder(text_input, inpaint=True), known()
    conditioning = stage.condition(batch(text_input))
    x_t, seen = seen_by(
        stage, {**conditioning, "known": jnp.asarray(image), "known_mask": jnp.asarray(mask)}, monkeypatch
    )
    np.testing.assert_array_equal(seen, np.concatenate([x_t, image * mask, mask], axis=-1))
    x_t, seen = seen_by(decoder(text_input), conditioning, monkeypatch)
    np.testing.assert_array_equal(seen, x_t)


@pytest.mark.parametrize("make", [upsampler, decoder])
def test_training_shows_part_of_the_image_itself(make):
    stage = make("tokens", inpaint=True)
    image, condition = jax.jit(stage.example)({}, rng.root(0), batch("tokens"))
    np.testing.assert_array_equal(condition["known"], image)
    assert condition["known_mask"].shape == (*image.shape[:3], 1) and condition["known_mask"].dtype == bool
    assert stage.sample_shape(condition) == image.shape[1:]


def test_inpainting_samples_are_guided_and_lean_on_what_is_known():
    stage, (image, mask) = upsampler("tokens", inpaint=True), known()
    conditioning = stage.low_res_condition(small(), batch("tokens"))
    guided = dataclasses.replace(stage.sampling, guidance=2.0)
    around = generate(stage, {**conditioning, "known": image, "known_mask": mask}, config=guided)
    assert abs(around - generate(stage, conditioning, config=guided)).max() > 1e-3


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
        return stage.sample(variables, keys(), stage.low_res_condition(small()), stage.plan(config))

    samples, ours = run(both), {"first": run(first), "last": run(last)}
    for name, other in ours.items():
        assert np.allclose(samples, other, atol=1e-5) == (name == alone)


def test_the_step_at_time_zero_begins_where_the_first_network_ended():
    config = dataclasses.replace(TWO.sampling, steps="t:0,60,99")
    both, first, last = two_networks()
    seen = []

    def watch(x_0):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_0)
        return x_0

    for stage, variables in ((TWO, both), (PLAIN, first)):
        condition = stage.low_res_condition(small())
        stage.sample(variables, keys(), condition, stage.plan(config, x0_transform=watch))
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
    _, outputs = jax.jit(stage.loss)(params, stats, {}, rng.root(0), testing.tiny_batch(SIZE))
    assert outputs.stats.keys() == stats.keys() and (len(stats) > 1) == (timesteps != "uniform")
    jax.tree.map(np.testing.assert_array_equal, outputs.stats["last"], stats["last"])


# --- mistakes ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_rejected():
    clip_like = DecoderConfig(dataclasses.replace(PLAIN.model, context_dim=8), image_emb_dim=16)
    for change, facts in (
        ({"upscale": "cubik"}, ["upscale", "'cubik'", "'cubic'"]),
        ({"model": clip_like}, ["upsampler_1", "tokens", "label", "CLIP"]),
        ({"inpaint": True}, ["in_channels 6", "3 images", "mask"]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            dataclasses.replace(PLAIN, **change)
