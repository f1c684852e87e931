"""Confidence intervals: by their definition, by how often they hold, and against published values."""

import math

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.evaluation.intervals import bootstrap, in_percent, normal, of_mean, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 7), (243, 256), (256, 256), (48, 64)])
def test_wilson_s_ends_are_the_shares_that_are_z_standard_deviations_away(hits, n):
    """It is defined by inverting the score test: |p - q| = z sqrt(q (1 - q) / n) at both ends q."""
    share = hits / n
    for end in wilson(share, n):
        assert 0 <= end <= 1
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), abs=1e-9)
    low, high = wilson(share, n)
    assert low <= share <= high and high - low > 0


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    """Exactly, by the binomial distribution: at least 92 % of the time at n = 64, 95 % on average over shares."""
    n, coverage = 64, []
    intervals = [wilson(hits / n, n) for hits in range(n + 1)]
    for truth in np.linspace(0.05, 0.95, 91):
        mass = [math.comb(n, hits) * truth**hits * (1 - truth) ** (n - hits) for hits in range(n + 1)]
        inside = [low <= truth <= high for low, high in intervals]
        coverage.append(float(np.dot(mass, inside)))
    assert min(coverage) > 0.91 and np.mean(coverage) == pytest.approx(0.95, abs=0.005)


def test_wilson_of_a_published_example():
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    np.testing.assert_allclose(wilson(81 / 263, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(0.0, 20), (0.0, 0.1611), atol=5e-5)


@pytest.mark.parametrize(("share", "n"), [(1.1, 4), (-0.1, 4), (0.5, 0), (float("nan"), 4)])
def test_no_share(share, n):
    with pytest.raises(ValueError, check=mentions("no fraction")):
        wilson(share, n)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    noise = np.random.default_rng(0).exponential(2.0, (2000, 100))
    inside = [low <= 2.0 <= high for low, high in map(of_mean, noise)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)
    low, high = of_mean([1.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0) and high - low == pytest.approx(2 * Z)
    assert of_mean([1.0]) is None


def test_a_share_is_shown_in_percent():
    assert in_percent(243 / 256, wilson(243 / 256, 256)) == "94.9% [91.5, 97.0]"


def test_normal():
    assert normal(3.0, 2.0) == (pytest.approx(3 - 2 * Z), pytest.approx(3 + 2 * Z))


def test_the_bootstrap_of_a_mean_is_that_of_the_central_limit_theorem():
    values = np.random.default_rng(0).exponential(2.0, 400)
    np.testing.assert_allclose(bootstrap(np.mean, values, resamples=2000), of_mean(values), rtol=0.02)


def test_the_bootstrap_resamples_rows_together():
    """The correlation of a variable with itself is 1 in every resampled set."""
    values = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap(lambda a, b: np.corrcoef(a, b)[0, 1], values, 3 * values, resamples=20)
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)


def test_the_bootstrap_covers_a_median_as_often_as_it_states():
    noise = np.random.default_rng(0).normal(size=(100, 60))
    intervals = [bootstrap(np.median, row, resamples=200, seed=seed) for seed, row in enumerate(noise)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.05)


def test_the_bootstrap_by_seed():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(np.mean, values, resamples=50) == bootstrap(np.mean, values, resamples=50)
    assert bootstrap(np.mean, values, resamples=50) != bootstrap(np.mean, values, resamples=50, seed=1)


@pytest.mark.parametrize("arrays", [(), (np.zeros(0),), (np.zeros(3), np.zeros(4))])
def test_arrays_without_a_bootstrap(arrays):
    with pytest.raises(ValueError, check=mentions(0)):
        bootstrap(np.mean, *arrays)
