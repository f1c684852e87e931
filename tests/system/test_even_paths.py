"""Frames of a path that are equally far apart."""

import numpy as np
import pytest

from dalle2_jax.system.editing.even_paths import even_path, evenly_chosen
from dalle2_jax.system.editing.similarity import root_mean_square

FRAMES = 6


def rendered(brightness):
    """A function from places to plain images, whose brightness in levels is a function of the place."""
    return lambda places: np.stack([np.full((2, 2, 3), np.rint(brightness(place)), np.uint8) for place in places])


def ratio(path):
    apart = root_mean_square(path.images[:-1], path.images[1:])
    return apart.max() / apart.mean()


@pytest.mark.parametrize(
    "brightness",
    [
        lambda place: 200 * place,
        lambda place: 200 / (1 + np.exp(-(place - 0.3) / 1e-3)),  # still, a steep change, and still
        lambda place: 200 * place**8,
    ],
    ids=["even", "steep", "late"],
)
def test_neighbours_are_equally_far_apart(brightness):
    path = even_path(rendered(brightness), FRAMES, root_mean_square)
    assert ratio(path) < 1.25 and len(path.images) == FRAMES
    assert path.places[0] == 0 and path.places[-1] == 1 and (np.diff(path.places) > 0).all()
    np.testing.assert_array_equal(path.images, rendered(brightness)(path.places))


def test_equal_steps_would_not_be_even():
    steep = rendered(lambda place: 200 / (1 + np.exp(-(place - 0.3) / 1e-3)))(np.linspace(0, 1, FRAMES))
    apart = root_mean_square(steep[:-1], steep[1:])
    assert apart.max() / apart.mean() > 4


@pytest.mark.parametrize(
    "brightness", [lambda place: 0 * place, lambda place: 200 * (place > 0.4)], ids=["still", "jump"]
)
def test_paths_that_cannot_be_even_end(brightness):
    path = even_path(rendered(brightness), FRAMES, root_mean_square)
    assert len(path.images) == FRAMES and (np.diff(path.places) > 0).all()


def test_as_many_images_as_frames():
    np.testing.assert_array_equal(evenly_chosen(np.ones((4, 4)), 4), [0, 1, 2, 3])


def test_the_most_even_choice():
    """Points on a line: of 0, 1, 5, 6, 10 the three most even are 0, 5, 10."""
    points = np.asarray([0.0, 1.0, 5.0, 6.0, 10.0])
    np.testing.assert_array_equal(evenly_chosen(np.abs(points[:, None] - points), 3), [0, 2, 4])


def test_distances_of_one_batch_size():
    """So that a compiled distance has one shape."""
    sizes = set()

    def distance(images, others):
        sizes.add(len(images))
        return root_mean_square(images, others)

    even_path(rendered(lambda place: 200 * place**4), FRAMES, distance)
    assert len(sizes) == 1
