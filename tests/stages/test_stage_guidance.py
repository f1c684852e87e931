"""Guidance of a stage: a scale for each part of the conditioning, and one program for all scales of a pattern."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe import Probe, condition, keys, params
from raised import mentions

from dalle2_jax import diffusion, testing
from dalle2_jax.errors import UserError
from dalle2_jax.stages import DiffusionConfig, ImageSamplingConfig, SamplingConfig

SIZE = 3
PLAIN = Probe().sampling
"""One step of DDIM: a sample is the network's prediction of x_0."""

PATTERNS = [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (3.0, 3.0), (4.0, 1.5), (1.5, 4.0), (1.0, 3.0), (3.0, 1.0), (0.0, 2.0)]
PATTERNS += [(2.0, 0.0), (0.0, 1.0)]


def generate(stage, image, text, absent=(), **fields):
    """Returns samples of the probe under guidance scales, some of its conditioning absent."""
    config = dataclasses.replace(stage.sampling, image_guidance=image, text_guidance=text, **fields)
    gone = {name: jnp.full(SIZE, name in absent) for name in stage.drop_rates}
    return np.asarray(stage.sample_x_0(params(), keys(SIZE), condition(SIZE), stage.plan(config, absent=gone)))


@pytest.fixture(scope="module")
def alone():
    """Returns the unconditional, image-conditioned and fully conditioned samples, each computed separately."""
    conditioning = (("image", "text"), ("text",), ())
    parts = [generate(Probe(), 1.0, 1.0, absent).astype(np.float64) for absent in conditioning]
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.combinations(parts, 2))
    return parts


@pytest.mark.parametrize(("image", "text"), PATTERNS)
def test_the_image_and_the_text_have_each_a_scale(image, text, alone):
    stage = Probe()
    expected = alone[0] + image * (alone[1] - alone[0]) + text * (alone[2] - alone[1])
    np.testing.assert_allclose(generate(stage, image, text), expected, atol=2e-5)
    (call,) = stage.seen
    assert call["rows"] == SIZE * sum(weight != 0 for weight in (1 - image, image - text, text))
    assert not call["training"]


def test_guidance_is_the_scale_of_every_part_that_has_none_of_its_own():
    whole, apart = Probe(sampling=dataclasses.replace(PLAIN, guidance=3.0)), Probe()
    np.testing.assert_array_equal(generate(whole, None, None), generate(apart, 3.0, 3.0))
    np.testing.assert_array_equal(generate(whole, None, 1.5), generate(apart, 3.0, 1.5))
    assert SamplingConfig(guidance=3.0, image_guidance=0.0).scales == {"image": 0.0, "text": 3.0}


def test_what_is_absent_stays_absent_in_every_branch(alone):
    """No scale brings back a caption that is not there; the image's still counts."""
    np.testing.assert_allclose(generate(Probe(), 3.0, 9.0, ("text",)), alone[0] + 3 * (alone[1] - alone[0]), atol=1e-5)
    np.testing.assert_allclose(generate(Probe(), 3.0, 9.0, ("image", "text")), alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_learned_variance_is_not_guided(name):
    """Where no conditioning changes the mean, no scale changes a sample, though the variances of branches differ."""
    learned = DiffusionConfig("x0", num_steps=100, variance="learned_range", loss="hybrid")
    config = SamplingConfig(name, steps=3, clip_sample=None)

    def samples(conditioning, **fields):
        stage = Probe(learned, config)
        plan = stage.plan(dataclasses.replace(config, **fields))
        return np.asarray(stage.sample_x_0(params(conditioning=conditioning), keys(SIZE), condition(SIZE), plan))

    plain = samples(0.0)
    np.testing.assert_allclose(samples(0.0, guidance=4.0), plain, atol=1e-5)
    np.testing.assert_allclose(samples(0.0, image_guidance=3.0, text_guidance=2.0), plain, atol=1e-5)
    assert (np.abs(samples(0.0, guidance=0.0) - plain).max() > 1e-3) == (name == "ddpm")
    assert np.abs(samples(1.0, guidance=4.0) - samples(1.0)).max() > 0.1


def test_the_guidance_schedule_of_the_config_is_followed(alone):
    """At the one step taken, t = 50 of 100, u is 50 / 99."""
    scale = 1 + 3 * 2 * (1 - 50 / 99)
    expected = alone[0] + scale * (alone[2] - alone[0])
    np.testing.assert_allclose(generate(Probe(), 4.0, 4.0, guidance_schedule="linear"), expected, atol=2e-5)
    np.testing.assert_allclose(generate(Probe(), 4.0, 1.5, guidance_interval=(0.6, 1.0)), alone[2], atol=1e-5)
    rescaled = generate(Probe(), 4.0, 4.0, guidance_rescale=1.0)
    np.testing.assert_allclose(rescaled.std(axis=1), alone[2].std(axis=1), rtol=1e-4)


# --- programs -------------------------------------------------------------------------------


def static(config):
    """Everything about a plan that decides the program."""
    return jax.tree.structure(Probe().plan(config))


def test_the_program_depends_on_the_pattern_of_scales_only():
    values = (0.0, 1.0, 1.5, 7.0)
    for name, (image, text) in itertools.product(("ddim", "ddpm"), itertools.product(values, values)):
        config = SamplingConfig(name, image_guidance=image, text_guidance=text, eta=0.5 * (name == "ddim"))
        plan = Probe().plan(config)
        assert plan.scales == {"image": image, "text": text}
        assert plan.options.eta == (config.eta if name == "ddim" else None) and plan.config.eta == 0
        assert plan.branches == diffusion.branches([image, text])
        assert plan.config.scales == {"image": 1.0, "text": 1.0}
    programs = {
        static(SamplingConfig(image_guidance=image, text_guidance=text, guidance=image + text))
        for image, text in itertools.product((1.5, 3.0, 7.0), repeat=2)
    }
    assert len(programs) == 2  # equal scales, and different ones
    assert static(SamplingConfig(guidance=2.0)) == static(SamplingConfig(guidance=5.0, eta=0.3))
    assert static(SamplingConfig(guidance=2.0)) != static(SamplingConfig(guidance=2.0, guidance_rescale=0.5))


def test_a_plan_compiles_one_program_a_pattern():
    """As an argument of a compiled program; its leaves are scales and eta."""
    stage = Probe()

    @jax.jit
    def run(plan):
        return stage.sample_x_0(params(), keys(SIZE), condition(SIZE), plan)

    for fields in (
        {"image_guidance": 3.0, "text_guidance": 2.0},
        {"image_guidance": 1.5, "text_guidance": 9.0, "eta": 0.4},
        {"guidance": 0.5, "image_guidance": -2.0},
    ):
        config = dataclasses.replace(PLAIN, **fields)
        sampled = run(stage.plan(config))
        np.testing.assert_allclose(
            sampled, generate(Probe(), *config.scales.values()), atol=2e-5
        )  # one step has no noise
    assert len(stage.seen) == 1


def test_examples_of_a_batch_have_each_their_numbers():
    """Arrays in the place of a plan's numbers: each example is sampled as in a batch of its own settings."""
    stage = Probe(sampling=dataclasses.replace(PLAIN, steps=3))
    configs = [
        dataclasses.replace(stage.sampling, image_guidance=image, text_guidance=text, eta=eta)
        for image, text, eta in ((3.0, 2.0, 0.0), (1.5, 9.0, 0.4), (0.5, -2.0, 1.0))
    ]

    def samples(plan):
        return np.asarray(stage.sample_x_0(params(), keys(SIZE), condition(SIZE), plan))

    plans = [stage.plan(config) for config in configs]
    together = samples(jax.tree.map(lambda *numbers: jnp.asarray(numbers, jnp.float32), *plans))
    alone = [samples(plan) for plan in plans]
    assert np.abs(alone[0] - alone[1]).max() > 0.1 and np.abs(alone[1] - alone[2]).max() > 0.1
    np.testing.assert_allclose(together, [alone[i][i] for i in range(SIZE)], atol=2e-5)


def test_only_image_stages_clip_by_default():
    assert SamplingConfig().clip_sample is None and ImageSamplingConfig().clip_sample == 1.0
    assert {kind: testing.tiny_stage(kind).sampling.clip_sample for kind in ("prior", "decoder", "upsampler")} == {
        "prior": None, "decoder": 1.0, "upsampler": 1.0
    }  # fmt: skip


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "facts"),
    [
        ("upsampler", {"text_guidance": 2.0}, ["upsampler_1", "dropping text", "text_guidance"]),
        ("upsampler", {"image_guidance": 1.0}, ["upsampler_1", "dropping image", "image_guidance"]),
        ("upsampler", {"guidance": 2.0}, ["upsampler_1", "its condition", "guidance"]),
        ("prior", {"image_guidance": 2.0}, ["stage prior", "dropping image", "image_guidance"]),
        ("prior", {"steps": 101}, [101, "at most 100"]),
        ("prior", {"name": "ddpm", "variance": "analytic"}, ["'analytic'", "noise_statistics"]),
    ],
)
def test_impossible_samplings_of_a_stage_say_what_to_do(kind, fields, facts):
    stage = testing.tiny_stage(kind)
    stage.check_sampling(stage.sampling)
    with pytest.raises(UserError, check=mentions(*facts)):
        stage.check_sampling(dataclasses.replace(stage.sampling, **fields))


def test_a_decoder_without_a_caption_has_no_scale_for_it():
    decoder = testing.tiny_stage("decoder")
    guided = dataclasses.replace(decoder.sampling, image_guidance=2.0, text_guidance=3.0)
    decoder.check_sampling(guided)
    deaf = dataclasses.replace(decoder, model=dataclasses.replace(decoder.model, text_input=None, text=None))
    deaf.check_sampling(dataclasses.replace(guided, text_guidance=None))
    with pytest.raises(UserError, check=mentions("stage decoder", "dropping text", "text_guidance")):
        deaf.check_sampling(guided)
