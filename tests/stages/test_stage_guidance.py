"""Guidance of a stage: a scale for each part of what it is told, and one program for all scales of a pattern."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe import Probe, condition, keys, params

from dalle2_jax import diffusion, testing
from dalle2_jax.stages import DiffusionConfig, SamplingConfig
from dalle2_jax.types import UserError

SIZE = 3
PLAIN = Probe().sampling
"""One step of DDIM: a sample is what the network says of x_0."""

PATTERNS = [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (3.0, 3.0), (4.0, 1.5), (1.5, 4.0), (1.0, 3.0), (3.0, 1.0), (0.0, 2.0)]
PATTERNS += [(2.0, 0.0), (0.0, 1.0)]


def draw(stage, image, text, absent=(), given=None, **fields):
    """Samples of the probe under scales, some of what it is told absent."""
    config = dataclasses.replace(stage.sampling, image_guidance=image, text_guidance=text, **fields)
    gone = {name: jnp.full(SIZE, name in absent) for name in stage.drop_rates}
    return np.asarray(stage.sample(params(), keys(SIZE), condition(SIZE), config, given, absent=gone))


@pytest.fixture(scope="module")
def alone():
    """What the network says told nothing, told the image alone, and told everything, each drawn by itself."""
    told = (("image", "text"), ("text",), ())
    parts = [draw(Probe(), 1.0, 1.0, absent).astype(np.float64) for absent in told]
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.combinations(parts, 2))
    return parts


@pytest.mark.parametrize(("image", "text"), PATTERNS)
def test_the_image_and_the_text_have_each_a_scale(image, text, alone):
    stage = Probe()
    expected = alone[0] + image * (alone[1] - alone[0]) + text * (alone[2] - alone[1])
    np.testing.assert_allclose(draw(stage, image, text), expected, atol=2e-5)
    (call,) = stage.seen
    assert call["rows"] == SIZE * sum(weight != 0 for weight in (1 - image, image - text, text))
    assert not call["training"]


def test_guidance_is_the_scale_of_every_part_that_has_none_of_its_own():
    whole, apart = Probe(sampling=dataclasses.replace(PLAIN, guidance=3.0)), Probe()
    np.testing.assert_array_equal(draw(whole, None, None), draw(apart, 3.0, 3.0))
    np.testing.assert_array_equal(draw(whole, None, 1.5), draw(apart, 3.0, 1.5))
    assert SamplingConfig(guidance=3.0, image_guidance=0.0).scales == {"image": 0.0, "text": 3.0}


def test_what_is_absent_stays_absent_in_every_branch(alone):
    """No scale brings back a caption that is not there; the image's still counts."""
    np.testing.assert_allclose(draw(Probe(), 3.0, 9.0, ("text",)), alone[0] + 3 * (alone[1] - alone[0]), atol=1e-5)
    np.testing.assert_allclose(draw(Probe(), 3.0, 9.0, ("image", "text")), alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_learned_variance_is_not_guided(name):
    """Where nothing told changes the mean no scale changes a sample, though each branch has a variance of its own."""
    learned = DiffusionConfig("x0", num_steps=100, variance="learned_range", loss="hybrid")
    config = SamplingConfig(name, steps=3, clip=None)

    def drawn(told, **fields):
        stage, scales = Probe(learned, config), dataclasses.replace(config, **fields)
        return np.asarray(stage.sample(params(told=told), keys(SIZE), condition(SIZE), scales))

    plain = drawn(0.0)
    np.testing.assert_allclose(drawn(0.0, guidance=4.0), plain, atol=1e-5)
    np.testing.assert_allclose(drawn(0.0, image_guidance=3.0, text_guidance=2.0), plain, atol=1e-5)
    assert (np.abs(drawn(0.0, guidance=0.0) - plain).max() > 1e-3) == (name == "ddpm")
    assert np.abs(drawn(1.0, guidance=4.0) - drawn(1.0)).max() > 0.1


def test_the_course_of_the_config_is_followed(alone):
    """At the one step taken, t = 50 of 100, u is 50 / 99."""
    scale = 1 + 3 * 2 * (1 - 50 / 99)
    expected = alone[0] + scale * (alone[2] - alone[0])
    np.testing.assert_allclose(draw(Probe(), 4.0, 4.0, guidance_schedule="linear"), expected, atol=2e-5)
    np.testing.assert_allclose(draw(Probe(), 4.0, 1.5, guidance_interval=(0.6, 1.0)), alone[2], atol=1e-5)
    rescaled = draw(Probe(), 4.0, 4.0, guidance_rescale=1.0)
    np.testing.assert_allclose(rescaled.std(axis=1), alone[2].std(axis=1), rtol=1e-4)


# --- programs -------------------------------------------------------------------------------


def test_the_program_knows_of_scales_their_pattern_alone():
    values = (0.0, 1.0, 1.5, 7.0)
    for name, (image, text) in itertools.product(("ddim", "ddpm"), itertools.product(values, values)):
        config = SamplingConfig(name, image_guidance=image, text_guidance=text, eta=0.5 * (name == "ddim"))
        program, scalars = config.split()
        assert scalars == {"scales": {"image": image, "text": text}, "eta": config.eta}
        assert diffusion.branches([*program.scales.values()]) == diffusion.branches([image, text])
        assert program.split()[0] == program and program.eta == 0
    programs = {
        SamplingConfig(image_guidance=image, text_guidance=text, guidance=image + text).split()[0]
        for image, text in itertools.product((1.5, 3.0, 7.0), repeat=2)
    }
    assert len(programs) == 2  # equal scales, and different ones
    assert SamplingConfig(guidance=2.0).split()[0] == SamplingConfig(guidance=5.0, eta=0.3).split()[0]
    assert SamplingConfig(guidance=2.0).split()[0] != SamplingConfig(guidance=2.0, guidance_rescale=0.5).split()[0]


def test_traced_scales_and_eta_compile_one_program_a_pattern():
    stage = Probe()

    @functools.partial(jax.jit, static_argnames="program")
    def run(program, scalars):
        return stage.sample(params(), keys(SIZE), condition(SIZE), program, **scalars)

    for fields in (
        {"image_guidance": 3.0, "text_guidance": 2.0},
        {"image_guidance": 1.5, "text_guidance": 9.0, "eta": 0.4},
        {"guidance": 0.5, "image_guidance": -2.0},
    ):
        config = dataclasses.replace(PLAIN, **fields)
        program, scalars = config.split()
        drawn = run(program, jax.tree.map(jnp.float32, scalars))
        np.testing.assert_allclose(drawn, draw(Probe(), *config.scales.values()), atol=2e-5)  # one step has no noise
    assert len(stage.seen) == 1


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("upsampler", {"text_guidance": 2.0}, "upsampler_1 was not trained to go without text: it has no text_g"),
        ("upsampler", {"image_guidance": 1.0}, "upsampler_1 was not trained to go without image"),
        ("upsampler", {"guidance": 2.0}, "upsampler_1 was not trained to go without what it is told"),
        ("prior", {"image_guidance": 2.0}, "stage prior was not trained to go without image: it has no image_guidance"),
        ("prior", {"steps": 101}, "ask for at most 100"),
        ("prior", {"name": "ddpm", "variance": "analytic"}, "python -m dalle2_jax.evaluation moments"),
    ],
)
def test_impossible_samplings_of_a_stage_say_what_to_do(kind, fields, says):
    stage = testing.tiny_stage(kind)
    stage.check_sampling(stage.sampling)
    with pytest.raises(UserError, match=says) as error:
        stage.check_sampling(dataclasses.replace(stage.sampling, **fields))
    assert "\n" not in str(error.value)


def test_a_decoder_without_a_caption_has_no_scale_for_it():
    decoder = testing.tiny_stage("decoder")
    guided = dataclasses.replace(decoder.sampling, image_guidance=2.0, text_guidance=3.0)
    decoder.check_sampling(guided)
    deaf = dataclasses.replace(decoder, model=dataclasses.replace(decoder.model, text_input=None, text=None))
    deaf.check_sampling(dataclasses.replace(guided, text_guidance=None))
    with pytest.raises(UserError, match="decoder was not trained to go without text"):
        deaf.check_sampling(guided)
