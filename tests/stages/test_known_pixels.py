"""Known pixels of inpainting networks: the shapes that training erases, and the first layer's initial weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, normal, random_variables

from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import known_pixels

UNET = UNetConfig(
    8, 3, 3, 8, (1,), 1, attention_resolutions=(), norm_groups=4, middle_attention=False, patch_size=2, input_skip=True
)


def connected(one):
    """Whether the true pixels of an image are one piece, by their edges and corners."""
    left = {tuple(place) for place in np.argwhere(one)}
    waiting = [left.pop()]
    while waiting:
        row, column = waiting.pop()
        near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
        left -= near
        waiting += near
    return not left


def test_boxes():
    erased = np.asarray(known_pixels.boxes(jax.random.key(0), 4000, 6))
    rows, columns = erased.any(axis=2), erased.any(axis=1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])  # a box,
    for line in (rows, columns):  # in one piece
        starts = np.diff(line.astype(int), axis=1, prepend=0) == 1
        assert (starts.sum(axis=1) == 1).all()
    assert abs(erased.all(axis=(1, 2)).mean() - 1 / 36) < 4 * (1 / 36 / 4000) ** 0.5
    for flipped in (erased[:, ::-1], erased[:, :, ::-1], erased.transpose(0, 2, 1)):  # anywhere, of any form
        assert abs(flipped.mean(axis=0) - erased.mean(axis=0)).max() < 0.05
    assert {*rows.sum(axis=1)} == {*range(1, 7)}


def test_strokes():
    erased = np.asarray(known_pixels.strokes(jax.random.key(0), 200, 24))
    assert all(map(connected, erased))
    shares = erased.mean(axis=(1, 2))
    assert 0 < shares.min() and shares.max() < 0.8 and np.ptp(shares) > 0.2
    assert np.asarray(known_pixels.strokes(jax.random.key(0), 50, 4)).any(axis=(1, 2)).all()


def test_borders():
    """What is left is a box, and every side is erased in some images and whole in others."""
    erased = np.asarray(known_pixels.borders(jax.random.key(0), 1000, 10))
    left = ~erased
    rows, columns = left.any(axis=2), left.any(axis=1)
    np.testing.assert_array_equal(left, rows[:, :, None] & columns[:, None, :])
    for edge in (rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]):
        assert 0.2 < edge.mean() < 0.9
    assert (erased.any(axis=(1, 2))).mean() > 0.95


def test_training_has_all_three_or_nothing():
    visible = np.asarray(known_pixels.visible_region(jax.random.key(0), 3000, 8))
    assert visible.shape == (3000, 8, 8, 1) and visible.dtype == bool
    nothing = ~visible.any(axis=(1, 2, 3))
    assert known_pixels.UNKNOWN_RATE < nothing.mean() < known_pixels.UNKNOWN_RATE + 0.15
    frame = visible[:, :, :, 0]
    corners = frame[:, 0, 0].mean(), frame[:, 0, -1].mean(), frame[:, -1, 0].mean(), frame[:, -1, -1].mean()
    assert np.ptp(corners) < 0.06 and 0.3 < frame.mean() < 0.7


@pytest.mark.parametrize("others", [0, 1])
def test_added_channels_change_nothing_at_first(others):
    """The wider network computes what the narrow one does, whatever is known; then their weights are zero."""
    narrow = dataclasses.replace(UNET, in_channels=3 + 3 * others)
    wide = dataclasses.replace(UNET, in_channels=7 + 3 * others)
    x, known, t = normal(0, 2, 8, 8, 3), normal(1, 2, 8, 8, 4), jnp.array([3, 90], jnp.int32)
    more = normal(2, 2, 8, 8, 3 * others)
    params = random_variables(UNet(narrow), jnp.concatenate([x, more], axis=-1), t)["params"]
    widened = known_pixels.widened(params, wide, 3)
    shapes = jax.eval_shape(UNet(wide).init, jax.random.key(0), jnp.concatenate([x, known, more], axis=-1), t)["params"]
    assert jax.tree.map(jnp.shape, widened) == jax.tree.map(jnp.shape, shapes)
    before = jax.jit(UNet(narrow).apply)({"params": params}, jnp.concatenate([x, more], axis=-1), t)
    after = jax.jit(UNet(wide).apply)({"params": widened}, jnp.concatenate([x, known, more], axis=-1), t)
    close(after, before)
    again = known_pixels.widened(widened, wide, 3)
    assert again is widened
    noisy = jax.tree.map(lambda leaf: leaf + 1, widened)
    silent = known_pixels.silenced(noisy, wide, 3)["conv_in"]["kernel"].reshape(3, 3, 4, wide.in_channels, 8)
    assert not silent[..., 3:7, :].any() and silent[..., :3, :].all() and silent[..., 7:, :].all()
