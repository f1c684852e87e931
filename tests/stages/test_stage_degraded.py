"""Upsamplers whose small images the host degrades, and upsamplers whose small images are noised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_stage_without_clip as without_clip
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.stages import images
from dalle2_jax.types import DEGRADATIONS, Degrading

PLAIN = testing.tiny_stage("upsampler")
NOISED = dataclasses.replace(PLAIN, noise_augmentation=0.5, sample_noise=0.2)
LEVELS = 50
"""Half of the tiny schedule's steps."""


def pairs(side=8, small=4, count=3):
    """Crops and small images that have nothing to do with each other."""
    noise = np.random.default_rng(0)
    shapes = {"image": (count, side, side, 3), "low_res": (count, small, small, 3)}
    return {name: noise.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}


# --- degraded -------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", ["", "bsr"])
def test_given_pairs_are_taken_as_they_are(degradation):
    stage, batch = dataclasses.replace(PLAIN, degradation=degradation), pairs()
    x_0, condition = jax.jit(stage.example)({}, rng.root(0), batch)
    np.testing.assert_array_equal(images.to_uint8(x_0), batch["image"])
    wanted = stage.low_res_condition(images.to_float(batch["low_res"]))["low_res"]
    np.testing.assert_allclose(condition["low_res"], wanted, atol=1e-6)


def test_pairs_of_other_sizes_are_rejected():
    for side, small in ((16, 4), (8, 8)):
        with pytest.raises(UserError, check=mentions("upsampler_1", "8 pixels", f"{side} made of {small}")):
            PLAIN.example({}, rng.root(0), pairs(side, small))


def test_the_stage_says_what_it_asks_of_the_data():
    assert PLAIN.degrading is None
    for name in DEGRADATIONS:
        assert dataclasses.replace(PLAIN, degradation=name).degrading == Degrading(name, 16, 8, 2)
    with pytest.raises(UserError, check=mentions("degradation", "'bsr_lite'", "'bsr_light'")):
        dataclasses.replace(PLAIN, degradation="bsr_lite")


# --- noised ---------------------------------------------------------------------------------


def test_training_images_are_noised_at_the_level_given_to_the_network():
    count = 3000
    batch = {"image": np.full((count, 16, 16, 3), 204, np.uint8)}  # 0.6
    _, condition = jax.jit(NOISED.example)({}, rng.root(0), batch)
    levels, shown = np.asarray(condition["noise_level"]), np.asarray(condition["low_res"], np.float64)
    assert levels.dtype == np.int32 and {*levels.tolist()} == {*range(LEVELS + 1)}
    assert np.bincount(levels).min() > 25  # of 59 each
    schedule = NOISED.diffusion.make_schedule()
    for level in (0, 1, 20, LEVELS):
        of_level = shown[levels == level]
        alpha_bar = 1.0 if level == 0 else schedule.alpha_bar[level - 1]
        assert abs(of_level.mean() - 0.6 * alpha_bar**0.5) < 5 * ((1 - alpha_bar) / of_level.size) ** 0.5 + 1e-6
        np.testing.assert_allclose(of_level.std(), (1 - alpha_bar) ** 0.5, rtol=0.04, atol=1e-6)


def test_the_network_has_an_mlp_for_the_level_and_leans_on_it():
    plain, noised = (jax.eval_shape(stage.init, rng.root(0)).params for stage in (PLAIN, NOISED))
    assert jax.tree.structure({**noised, "noise_mlp": None}) == jax.tree.structure({**plain, "noise_mlp": None})
    assert noised.keys() - plain.keys() == {"noise_mlp"} and noised["noise_mlp"].keys() == noised["time_mlp"].keys()
    params, x, t = testing.tiny_variables(NOISED).params, jnp.ones((2, 8, 8, 3)), jnp.full(2, 7)

    @jax.jit
    def predict(level):
        return NOISED.bind(params, {"low_res": x, "noise_level": level}, {}, None)(x, t)

    one, other = (predict(jnp.array([first, 30], jnp.int32)) for first in (0, 30))
    assert abs(one[0] - other[0]).max() > 1e-3
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


def samples(stage, rows=slice(None)):
    variables = testing.tiny_variables(NOISED)
    keys = without_clip.keys()[rows]

    @jax.jit
    def generate(variables, keys, small):
        return stage.sample(variables, keys, stage.low_res_condition(small), stage.plan())

    return np.asarray(generate(variables, keys, without_clip.small()[rows]))


def test_samples_are_sampled_at_their_own_level():
    """Sampling at level 0 shows the network the image itself; an image's noise is of its own key."""
    sampled = samples(NOISED)
    clean = dataclasses.replace(NOISED, sample_noise=0.0)
    assert abs(samples(clean) - sampled).max() > 1e-2
    np.testing.assert_allclose(samples(NOISED, slice(1, None)), sampled[1:], atol=1e-5)


def test_the_level_in_sampling_is_the_one_asked_for():
    stage, seen = NOISED, {}

    @dataclasses.dataclass(frozen=True)
    class Seeing(type(stage)):
        def bind(self, params, condition, drops, dropout_key):
            seen.update(condition)
            return lambda x_t, t: jnp.zeros_like(x_t)

    seeing = Seeing(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)})
    flat = jnp.full((64, 8, 8, 3), 0.6)
    keys = rng.per_image(rng.root(0), jnp.arange(64, dtype=jnp.int32))
    seeing.sample(testing.Variables({}, {}), keys, seeing.low_res_condition(flat), seeing.plan())
    assert {*np.asarray(seen["noise_level"]).tolist()} == {20}
    alpha_bar = stage.diffusion.make_schedule().alpha_bar[19]
    np.testing.assert_allclose(np.asarray(seen["low_res"]).std(), (1 - alpha_bar) ** 0.5, rtol=0.03)
    np.testing.assert_allclose(np.asarray(seen["low_res"]).mean(), 0.6 * alpha_bar**0.5, atol=0.01)


def test_conditioned_upsamplers_are_noised_too():
    stage = dataclasses.replace(without_clip.upsampler("tokens"), noise_augmentation=0.5, sample_noise=0.1)
    params, stats = testing.tiny_variables(stage)
    assert "noise_mlp" in params["unet"]
    loss, _ = jax.eval_shape(stage.loss, params, stats, {}, rng.root(0), without_clip.batch("tokens"))
    assert loss.shape == ()
    sampled = without_clip.generate(stage, stage.low_res_condition(without_clip.small(), without_clip.batch("tokens")))
    assert sampled.shape == (without_clip.SIZE, 16, 16, 3) and np.isfinite(sampled).all()


@pytest.mark.parametrize("fields", [(0.2, 0.5), (1.5, 0.0), (0.5, -0.1), (-0.5, 0.0)])
def test_levels_out_of_range_are_rejected(fields):
    largest, sampled = fields
    with pytest.raises(UserError, check=mentions(f"sample_noise {sampled}", f"noise_augmentation {largest}", 1)):
        dataclasses.replace(PLAIN, noise_augmentation=largest, sample_noise=sampled)
