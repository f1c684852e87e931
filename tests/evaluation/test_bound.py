"""Bits per dimension and noise moments over a whole data set, of a network that is known exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.data import ShapesSource, example
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation import bound
from dalle2_jax.stages import DiffusionConfig, SamplingConfig, Variables, images
from dalle2_jax.stages.diffusion import DiffusionStage
from dalle2_jax.system import LoadedStage

SOURCE = ShapesSource("val", 8, max_objects=1, num_examples=64)
STEPS, NUM = 12, 7


@dataclasses.dataclass(frozen=True)
class Known(DiffusionStage):
    """Diffuses images under the perfect denoiser of N(0, std^2), std being its one parameter."""

    drop_rates = {}
    image_size = 4

    def example(self, stats, key, batch):
        image = images.to_float(batch["image"])
        return image, {"untold": jnp.zeros(len(image))}

    def bind(self, params, condition, drops, dropout_key):
        signal, noise = (jnp.asarray(table) for table in self.schedule.levels[1:])

        def network(x_t, t):
            gain = noise[t] / (params["std"] ** 2 * signal[t] ** 2 + noise[t] ** 2)
            return gain[:, None, None, None] * x_t

        return network


STAGE = Known(DiffusionConfig("eps", num_steps=STEPS), SamplingConfig(), "decoder")
PARAMS = {"std": jnp.float32(0.6)}
MEMBERS = {"decoder": LoadedStage(STAGE, Variables(PARAMS, {}), 30, None, None, 0)}


@pytest.fixture(scope="module")
def examples():
    """The examples as the stage diffuses them."""
    return np.stack([example(SOURCE, index)["image"] for index in range(NUM)]).astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def bits(examples):
    """The bound of each image, all in one batch."""
    keys = rng.per_image(rng.root(1), jnp.arange(NUM, dtype=jnp.int32))
    return jax.jit(STAGE.bits_per_dim)(PARAMS, keys, examples, {"untold": jnp.zeros(NUM)})


@pytest.mark.parametrize("batch_size", [1, 3, NUM, 16])
def test_bits_per_dim_are_the_mean_over_the_images_in_any_batches(batch_size, bits):
    """What fills the last batch up is not counted."""
    measured = bound.bits_per_dim(MEMBERS, "decoder", SOURCE, NUM, batch_size, seed=1)
    assert measured.keys() == {"total", "prior", "vlb", "n", "interval"} and measured["n"] == NUM
    np.testing.assert_allclose(measured["total"], np.mean(bits["total"]), rtol=1e-5)
    np.testing.assert_allclose(measured["prior"], np.mean(bits["prior"]), rtol=1e-4)
    np.testing.assert_allclose(measured["vlb"], bits["vlb"].sum(axis=0).mean(), rtol=1e-5)
    reach = 1.959964 * np.std(bits["total"], ddof=1) / NUM**0.5
    ends = measured["total"] - reach, measured["total"] + reach
    np.testing.assert_allclose(measured["interval"]["total"], ends, rtol=1e-4)
    assert np.ptp(bits["total"]) > 0.1  # so that other images would have another mean


def test_another_seed_is_other_noise_alone():
    one, other = (bound.bits_per_dim(MEMBERS, "decoder", SOURCE, NUM, NUM, seed) for seed in (1, 2))
    assert one["vlb"] != other["vlb"] and one["prior"] == other["prior"]
    np.testing.assert_allclose(one["vlb"], other["vlb"], rtol=0.1)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_moments_are_the_mean_power_of_the_noise_at_each_step(batch_size, examples):
    """Of x_t = a x_0 + s eps the network makes g x_t, whose power is g^2 (a^2 E x_0^2 + s^2) exactly."""
    moments = bound.noise_statistics(MEMBERS, "decoder", SOURCE, NUM, 1, batch_size)
    second, alpha_bar = np.mean(examples.astype(np.float64) ** 2), STAGE.schedule.alpha_bar
    gain = np.sqrt(1 - alpha_bar) / (0.36 * alpha_bar + 1 - alpha_bar)
    assert moments.keys() == {"step", "eps", "x_0"} and moments["step"] == 30
    np.testing.assert_allclose(moments["x_0"], second, rtol=1e-5)
    # 1,344 numbers: the power of their noise is within 4 sqrt(2 / 1344) of 1.
    np.testing.assert_allclose(moments["eps"], gain**2 * (alpha_bar * second + 1 - alpha_bar), rtol=0.155)
    again = bound.noise_statistics(MEMBERS, "decoder", SOURCE, NUM, 1, batch_size)
    assert again == moments and len({*moments["eps"]}) == STEPS


def test_stages_that_have_neither_are_rejected():
    def member(kind):
        return LoadedStage(testing.tiny_stage(kind), Variables({}, {}), 1, None, None, 0)

    members = {"clip": member("clip_vit"), "prior": member("prior")}
    with pytest.raises(UserError, check=mentions("stage prior")):
        bound.bits_per_dim(members, "prior", SOURCE, 1, 1, 1)
    with pytest.raises(UserError, check=mentions("stage clip")):
        bound.bits_per_dim(members, "clip", SOURCE, 1, 1, 1)
    with pytest.raises(UserError, check=mentions("stage clip")):
        bound.noise_statistics(members, "clip", SOURCE, 1, 1)


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsampler"])
def test_examples_are_what_the_stage_is_trained_on(kind):
    """A stage with its required variables: those of the system's clip."""
    stage, tokenizer = testing.tiny_stage(kind), testing.WordTokenizer()
    source = ShapesSource("val", testing.IMAGE_SIZE, num_examples=4)
    clip, frozen = testing.tiny_stage("clip_vit"), testing.tiny_frozen(testing.tiny_stage("prior"))
    members = {"clip": LoadedStage(clip, frozen["clip"], 1, None, tokenizer, testing.CONTEXT_LENGTH)}
    if kind == "upsampler":
        tokenizer, members = None, {}
    length = testing.CONTEXT_LENGTH if members else 0
    members[stage.name] = LoadedStage(stage, Variables({}, {}), 1, None, tokenizer, length)
    x_0, condition = bound.examples(members, stage.name, source, [2, 0], 1)
    side = {"decoder": testing.LOW_SIZE, "upsampler": testing.LOW_SIZE}.get(kind)
    assert x_0.shape == ((2, testing.EMBED_DIM) if side is None else (2, side, side, 3))
    assert all(len(value) == 2 for value in condition.values()) and np.isfinite(x_0).all()
    if kind == "decoder":
        wanted = images.resize(images.to_float(np.stack([example(source, i)["image"] for i in (2, 0)])), side)
        np.testing.assert_allclose(x_0, wanted, atol=1e-6)


def test_a_degraded_upsampler_is_measured_on_degraded_images():
    stage = dataclasses.replace(testing.tiny_stage("upsampler"), degradation="bsr")
    members = {"upsampler_1": LoadedStage(stage, Variables({}, {}), 30, None, None, 0)}
    source = ShapesSource("val", 16, max_objects=1, num_examples=8)
    one, other = (bound.examples(members, "upsampler_1", source, [0, 1], seed) for seed in (0, 1))
    assert one[0].shape == (2, 8, 8, 3)  # crops
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # no blur or crop of the device's, which the seed decides
