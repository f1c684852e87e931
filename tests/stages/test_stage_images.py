"""Images on their way into a stage, by what they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.stages import images


def random_image(seed=0, side=8, count=2):
    return jnp.tanh(jnp.asarray(np.random.default_rng(seed).standard_normal((count, side, side, 3), np.float32)))


def test_bytes_survive_the_way_there_and_back():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    floats = images.to_float(every)
    assert float(floats.min()) == -1 and float(floats.max()) == 1
    np.testing.assert_array_equal(images.to_uint8(floats), every)
    np.testing.assert_array_equal(images.to_uint8(jnp.array([-7.0, -1.001, 1.001, 3.0])), [0, 0, 255, 255])


def test_resizing_keeps_size_means_and_constants():
    image = random_image(side=12)
    assert images.resize(image, 12) is image
    by_hand = np.asarray(image).reshape(2, 4, 3, 4, 3, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(images.resize(image, 4), by_hand, atol=1e-6)
    for side in (5, 8, 24):
        resized = images.resize(jnp.full((1, 12, 12, 3), 0.25), side)
        assert resized.shape == (1, side, side, 3)
        np.testing.assert_allclose(resized, 0.25, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.4, 0.6, 2.0])
def test_the_blur_is_a_normalised_gaussian(sigma):
    impulse = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3, 0].set(1.0)
    blurred = np.asarray(images.gaussian_blur(impulse, sigma))[0, :, :, 0]
    offset = np.arange(-3, 4)
    line = np.exp(-(offset**2) / (2 * sigma**2)) * (abs(offset) < 2)
    kernel = np.outer(line, line)
    np.testing.assert_allclose(blurred, kernel / kernel.sum(), atol=1e-6)
    np.testing.assert_allclose(blurred.sum(), 1, rtol=1e-6)


def test_the_blur_keeps_constants_to_the_edge_and_colours_apart():
    constant = jnp.broadcast_to(jnp.array([0.2, -0.9, 1.0]), (1, 5, 5, 3))
    np.testing.assert_allclose(images.gaussian_blur(constant, 0.6), constant, atol=1e-6)
    image = random_image()
    blurred = images.gaussian_blur(image, 0.6)
    only_red = images.gaussian_blur(image.at[..., 1:].set(0.0), 0.6)
    np.testing.assert_allclose(only_red[..., 0], blurred[..., 0])
    assert float(jnp.abs(only_red[..., 1:]).max()) == 0


def test_crops_are_where_they_should_be():
    image, corners = random_image(count=3), jnp.array([[0, 0], [4, 1], [2, 4]])
    for one, corner, cut in zip(np.asarray(image), np.asarray(corners), images.crop(image, corners, 4), strict=True):
        np.testing.assert_array_equal(cut, one[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4])


def test_corners_cover_the_grid_evenly():
    corners = np.asarray(images.random_corners(jax.random.key(0), 4000, side=16, crop_side=8, grid=2))
    assert corners.shape == (4000, 2)
    for column in corners.T:
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == [0, 2, 4, 6, 8]
        assert abs(counts - 800).max() < 4 * 800**0.5
    assert abs(np.corrcoef(corners.T)[0, 1]) < 4 / 4000**0.5
    assert not images.random_corners(jax.random.key(0), 9, side=8, crop_side=8, grid=2).any()


def test_images_and_masks_among_the_channels():
    assert images.image_channels(3, inpaint=False) == images.image_channels(7, inpaint=True) == 3
    assert (
        images.image_channels(6, False, conditioning_images=1)
        == images.image_channels(10, True, conditioning_images=1)
        == 3
    )
    for channels, inpaint, extra in ((8, True, 0), (5, False, 1), (1, True, 0), (0, False, 0)):
        with pytest.raises(UserError, check=mentions(f"in_channels {channels}")):
            images.image_channels(channels, inpaint, extra)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("side", "new"), [(48, 32), (97, 32), (64, 32), (20, 32)])
def test_images_on_the_device_are_resized_as_by_pillow(resample, side, new):
    """To within one of 255 levels: Pillow rounds between the axes too."""
    levels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    pillow = filters.get(resample, Image.Resampling.LANCZOS)
    theirs = np.asarray(Image.fromarray(levels[0]).resize((new, new), pillow)).astype(int)
    ours = images.to_uint8(images.resize(images.to_float(jnp.asarray(levels)), new, resample))[0]
    assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 1
