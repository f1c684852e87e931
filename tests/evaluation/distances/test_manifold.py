"""Precision, recall, density and coverage: of sets whose answer is known, and by their definition."""

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks, density_coverage, precision_recall


def normal(seed, n, scale=1.0, dim=3):
    return scale * np.random.default_rng(seed).normal(size=(n, dim))


def by_definition(real, generated, k):
    """Precision, recall, density and coverage from all distances."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    balls, theirs = (np.sort(distances(each, each), axis=1)[:, k] for each in (real, generated))
    cross = distances(generated, real)
    inside = cross <= balls
    recall = (cross.T <= theirs).any(axis=1).mean()
    return inside.any(axis=1).mean(), recall, inside.sum() / k / len(generated), inside.any(axis=0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [4, 2048])
def test_by_definition(k, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    real, generated = normal(0, 31), normal(1, 26, 1.3)
    expected = by_definition(real, generated, k)
    np.testing.assert_allclose(precision_recall(real, generated, k), expected[:2], rtol=1e-12)
    found = density_coverage(real, generated, k)
    np.testing.assert_allclose(found[:2], expected[2:], rtol=1e-12)
    assert found.densities.mean() == pytest.approx(found.density) and found.densities.shape == (26,)
    reordered = density_coverage(real[::-1], generated[::-1], k)
    np.testing.assert_array_equal(reordered.densities, found.densities[::-1])


def test_equal_sets():
    same = normal(0, 40)
    assert precision_recall(same, same[::-1]) == (1.0, 1.0)
    assert density_coverage(same, same[::-1]).coverage == 1.0


def test_disjoint_sets():
    assert precision_recall(normal(0, 40), normal(1, 30) + 100) == (0.0, 0.0)
    assert density_coverage(normal(0, 40), normal(1, 30) + 100)[:2] == (0.0, 0.0)


def test_one_mode_of_two_has_precision_without_recall():
    real = np.concatenate([normal(0, 100), normal(1, 100) + 50])
    precision, recall = precision_recall(real, normal(2, 200))
    assert precision > 0.8 and 0.3 < recall < 0.5
    assert density_coverage(real, normal(2, 200)).coverage == pytest.approx(0.5, abs=0.05)


def test_density_is_1_for_equal_distributions():
    found = [density_coverage(normal(2 * i, 100), normal(2 * i + 1, 100)) for i in range(20)]
    assert np.mean([each.density for each in found]) == pytest.approx(1.0, abs=0.05)


def test_copies_are_inside_balls_without_radius():
    """Of four equal images each has the third neighbour at distance 0, far from the origin too."""
    real = np.repeat(normal(0, 10) + 1000, 4, axis=0)
    assert precision_recall(real, real[::2], k=1) == (1.0, 1.0)
    assert precision_recall(real, real + 1e-3).precision == 0.0


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_sets_that_are_rejected(measure):
    with pytest.raises(DataError, check=mentions("more than 4 images")):
        measure(normal(0, 9), normal(0, 4), k=4)
    with pytest.raises(DataError, check=mentions("neighbour 0")):
        measure(normal(0, 9), normal(0, 9), k=0)
    with pytest.raises(DataError, check=mentions("generated", "image 0")):
        measure(normal(0, 9), np.full((9, 3), np.nan))
    with pytest.raises(DataError, check=mentions("3 dimensions")):
        measure(normal(0, 9), normal(0, 9, dim=2))
