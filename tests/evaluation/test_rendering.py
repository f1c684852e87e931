"""Flatness of backgrounds and width of edges, of images whose noise and blur are known."""

import cv2
import numpy as np
import pytest

from dalle2_jax.data import ShapesSource
from dalle2_jax.evaluation.measures.rendering import background_std, edge_width, figures

SOURCE = ShapesSource("val", 64, max_objects=2)
IMAGES = SOURCE.fetch(range(12))["image"]


def test_rendered_images_have_plain_backgrounds_and_edges_of_a_pixel():
    assert {background_std(image) for image in IMAGES} == {0.0}
    assert np.mean([edge_width(image) for image in IMAGES]) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_noise_is_measured_in_levels(sigma):
    grey = [image for index, image in enumerate(IMAGES) if SOURCE.scene(index).background == "gray"]
    noise = np.random.default_rng(0).normal(0, sigma, grey[0].shape)
    noisy = np.clip(np.rint(grey[0] + noise), 0, 255).astype(np.uint8)
    assert background_std(noisy) == pytest.approx(sigma, rel=0.1)


def test_a_gradient_is_not_flat():
    image = np.full((64, 64, 3), 200, np.uint8)
    image += np.linspace(0, 30, 64).astype(np.uint8)[:, None, None]
    assert background_std(image) == pytest.approx(30 / 12**0.5, rel=0.1)


def test_blur_widens_edges():
    """A box of w pixels makes edges 0.8 w wide."""
    image = np.full((64, 64, 3), 255, np.uint8)
    image[16:48, 16:48] = (30, 60, 225)
    widths = [edge_width(cv2.blur(image, (w, w))) for w in (3, 5, 7)]
    assert widths == sorted(widths) and widths[1] == pytest.approx(4, abs=0.7)


def test_images_without_background_or_object_are_omitted():
    plain, noise = np.full((64, 64, 3), 9, np.uint8), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert edge_width(plain) is None and background_std(plain) == 0 and background_std(noise) is None
    found = figures(np.stack([plain, *IMAGES[:3]]), IMAGES, seed=0)
    assert found["edge_width"].n == 3 and found["background_std"].n == 4
    assert found["edge_width"].baseline.n == 12 and found["edge_width"].interval is not None
