"""KID and CMMD: by their definition, unbiased, invariant to order and blocks, and their intervals."""

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks, cmmd, cmmd_interval, kid, kid_interval


def normal(seed, n, shift=0.0, dim=4):
    return np.random.default_rng(seed).normal(size=(n, dim)) + shift


def by_definition(kernel, a, b):
    """Eq. (1), one pair at a time."""
    own = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return own[0] + own[1] - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_kid_of_the_whole_sets():
    a, b = normal(0, 12), normal(1, 12, 0.5)
    value, values = kid(a, b, subsets=3, subset_size=12)
    expected = by_definition(lambda x, y: (x @ y / 4 + 1) ** 3, a, b)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert value == pytest.approx(expected, rel=1e-12)


def test_cmmd_by_definition():
    a, b = normal(0, 12), normal(1, 15, 0.5)
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (a, b)]
    expected = 1000 * by_definition(lambda x, y: np.exp(-np.square(x - y).sum() / 200), *units)
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(3 * a, 7 * b) == pytest.approx(expected, rel=1e-9)
    low, high = cmmd_interval(a, b)
    assert (low + high) / 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("measure", ["kid", "cmmd"])
def test_equal_distributions_are_at_0_on_average_and_others_above(measure):
    def values(shift):
        pairs = [(normal(2 * i, 30), normal(2 * i + 1, 30, shift)) for i in range(200)]
        return np.array([kid(a, b, 1, 30)[0] if measure == "kid" else cmmd(a, b) for a, b in pairs])

    same, other = values(0.0), values(0.7)
    error = same.std() / len(same) ** 0.5
    assert abs(same.mean()) < 3 * error and same.min() < 0 < same.max()
    assert other.mean() > 10 * error


@pytest.mark.parametrize("block", [3, 8, 1000])
def test_blocks_and_order_change_nothing(block, monkeypatch):
    a, b = normal(0, 20), normal(1, 25, 0.5)
    expected = kid(a, b, 5, 8)[1], cmmd(a, b), cmmd_interval(a, b)
    monkeypatch.setattr(blocks, "BLOCK", block)
    np.testing.assert_allclose(kid(a, b, 5, 8)[1], expected[0], rtol=1e-10)
    assert cmmd(a[::-1], b[::-1]) == pytest.approx(expected[1], rel=1e-9)
    np.testing.assert_allclose(cmmd_interval(a[::-1], b[::-1]), expected[2], rtol=1e-9)


def test_subsets_are_the_same_by_either_way():
    """One kernel matrix serves all subsets of small sets; 2 subsets of 8 of 20 images have matrices of their own."""
    a, b = normal(0, 20), normal(1, 25, 0.5)
    np.testing.assert_allclose(kid(a, b, 2, 8)[1], kid(a, b, 50, 8)[1][:2], rtol=1e-10)
    assert not np.allclose(kid(a, b, 2, 8, seed=1)[1], kid(a, b, 2, 8)[1])


def test_intervals_are_as_wide_as_estimates_scatter():
    """That of KID errs on the wide side."""
    values, widths = {"kid": [], "cmmd": []}, {"kid": [], "cmmd": []}
    for seed in range(100):
        a, b = normal(2 * seed, 120), normal(2 * seed + 1, 120, 0.6)
        value, subsets = kid(a, b, 60, 30)
        for name, point, interval in (
            ("kid", value, kid_interval(subsets, 30, 120)),
            ("cmmd", cmmd(a, b), cmmd_interval(a, b)),
        ):
            values[name].append(point)
            widths[name].append((interval[1] - interval[0]) / 2 / 1.96)
    assert np.mean(widths["cmmd"]) == pytest.approx(np.std(values["cmmd"]), rel=0.2)
    assert 0.9 < np.mean(widths["kid"]) / np.std(values["kid"]) < 1.7


def test_subsets_that_are_the_whole_set_have_no_interval():
    value, values = kid(normal(0, 10), normal(1, 10), 4, 10)
    assert kid_interval(values, 10, 10) is None and kid_interval(values[:1], 5, 10) is None


@pytest.mark.parametrize("size", [1, 11])
def test_subsets_larger_than_a_set(size):
    with pytest.raises(DataError, check=mentions(f"{size} images", 10)):
        kid(normal(0, 10), normal(1, 12), 4, size)


@pytest.mark.parametrize("measure", [cmmd, cmmd_interval, kid])
def test_sets_that_are_rejected(measure):
    with pytest.raises(DataError, check=mentions("4 dimensions")):
        measure(normal(0, 10), normal(0, 10, dim=3))
    with pytest.raises(DataError, check=mentions("image 3", "finite")):
        measure(normal(0, 10), np.where(np.arange(10)[:, None] == 3, np.nan, normal(0, 10)))
    with pytest.raises(DataError):
        measure(normal(0, 1), normal(0, 10))
