"""The upsamplers: small and large image aligned, trained on crops, sampled whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.stages import UpsamplerStage, Variables, images

STAGE = testing.tiny_stage("upsampler")
LARGE = dataclasses.replace(STAGE, model=dataclasses.replace(STAGE.model, image_size=32), low_size=16)
"""Crops of 16 pixels out of 32, from 8 small ones."""


def ramp(count, side=32):
    """Images whose red counts rows and whose green counts columns, by eights."""
    place = np.arange(side, dtype=np.uint8) * 8
    rows, columns = np.broadcast_to(place[:, None], (side, side)), np.broadcast_to(place, (side, side))
    return {"image": np.broadcast_to(np.stack([rows, columns, rows * 0], axis=-1), (count, side, side, 3))}


def example(stage, batch, seed=0, **fields):
    return jax.jit(dataclasses.replace(stage, **fields).example)({}, rng.root(seed), batch)


@pytest.mark.parametrize("blur_rate", [0.0, 1.0])
def test_the_condition_lies_on_the_crop_pixel_by_pixel(blur_rate):
    x_0, condition = example(LARGE, ramp(64), blur_rate=blur_rate)
    assert x_0.shape == condition["low_res"].shape == (64, 16, 16, 3)
    corners = np.rint((np.asarray(x_0)[:, 0, 0, :2] + 1) * 127.5 / 8).astype(int)
    for column in corners.T:
        assert sorted(set(column.tolist())) == list(range(0, 17, 2))  # each corner of a small pixel
    # Means, a symmetric blur and cubic interpolation keep a linear ramp, away from the crop's edges;
    # a shift by one pixel would be 8 / 127.5 = 0.06.
    inside = (slice(None), slice(6, 10), slice(6, 10))
    np.testing.assert_allclose(condition["low_res"][inside], x_0[inside], atol=1e-5)


def test_the_condition_tells_the_low_frequencies_alone():
    batch = testing.tiny_batch(3)
    x_0, condition = example(STAGE, batch, blur_rate=0.0)
    small = images.resize(x_0, STAGE.crop_side // 2)
    np.testing.assert_allclose(condition["low_res"], STAGE.low_res_condition(small)["low_res"], atol=1e-6)
    chequered = jnp.asarray((-0.1) ** np.add.outer(np.arange(8), np.arange(8)) > 0, jnp.float32)
    jittered = x_0 + (0.2 * chequered - 0.1).reshape(1, 8, 8, 1)  # the mean of each 2x2 pixels is the same
    again = STAGE.low_res_condition(images.resize(jittered, STAGE.crop_side // 2))
    np.testing.assert_allclose(again["low_res"], condition["low_res"], atol=1e-6)


def test_the_share_of_blurred_examples_is_the_rate():
    batch = {name: np.repeat(rows, 2000, axis=0) for name, rows in testing.tiny_batch(1).items() if name == "image"}
    whole = {"crop_fraction": 1.0}
    sharp = example(STAGE, testing.tiny_batch(1), blur_rate=0.0, **whole)[1]["low_res"]
    _, condition = example(STAGE, batch, blur_rate=0.3, **whole)
    blurred = np.asarray(abs(condition["low_res"] - sharp).max(axis=(1, 2, 3)) > 1e-3)
    assert abs(blurred.mean() - 0.3) < 4 * (0.21 / 2000) ** 0.5


def test_the_papers_numbers_are_the_defaults():
    assert (UpsamplerStage.crop_fraction, UpsamplerStage.blur_sigma, UpsamplerStage.blur_rate) == (0.25, 0.6, 1.0)


def test_images_of_another_size_are_fitted():
    large = {"image": testing.tiny_batch(2)["image"].repeat(3, axis=1).repeat(3, axis=2)}
    for ours, theirs in zip(
        jax.tree.leaves(example(STAGE, large)), jax.tree.leaves(example(STAGE, testing.tiny_batch(2))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_trained_on_crops_sampled_at_full_size():
    params = testing.tiny_variables(STAGE).params
    loss, _ = jax.eval_shape(STAGE.loss, params, {}, {}, rng.root(0), testing.tiny_batch(2))
    assert loss.shape == ()

    @jax.jit
    def generate(params, keys, small):
        return STAGE.sample(Variables(params, {}), keys, STAGE.low_res_condition(small), STAGE.plan())

    small = jnp.tanh(jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 3), np.float32)))
    keys = rng.per_image(rng.root(0), jnp.arange(4, dtype=jnp.int32))
    samples = generate(params, keys, small)
    assert samples.shape == (4, 16, 16, 3) and np.isfinite(samples).all() and abs(samples).max() <= 1
    np.testing.assert_allclose(generate(params, keys[2:], small[2:]), samples[2:], atol=1e-5)
    other = generate(params, keys, small[::-1])  # and it does lean on the small image
    assert (abs(other - samples).max(axis=(1, 2, 3)) > 1e-3).all()


def test_dropout_is_on_in_training_alone():
    stage = dataclasses.replace(STAGE, model=dataclasses.replace(STAGE.model, dropout=0.5))
    params, x = testing.tiny_variables(stage).params, jnp.ones((1, 8, 8, 3))

    @jax.jit
    def predict(keys):
        condition, t = {"low_res": x}, jnp.zeros(1, jnp.int32)
        return [stage.bind(params, condition, {}, key)(x, t) for key in (None, *keys)]

    calm, one, other = predict(jax.random.split(rng.root(0), 2))
    assert not np.allclose(calm, one) and not np.allclose(one, other)


def test_sizes_that_do_not_fit_are_rejected():
    with pytest.raises(UserError, check=mentions("upsampler_1", "image_size 16", "low_size 5")):
        dataclasses.replace(STAGE, low_size=5)
    with pytest.raises(UserError, check=mentions("upsampler_1", "6 pixels", 2, 4)):
        dataclasses.replace(STAGE, low_size=4, crop_fraction=0.375)
    with pytest.raises(UserError, check=mentions("upsampler_1", "5 pixels", 2)):
        dataclasses.replace(STAGE, crop_fraction=0.3)
