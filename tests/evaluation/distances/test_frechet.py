"""The Fréchet distance: of Gaussians in closed form, of singular covariances, and its interval."""

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import Origin, Statistics, check_count, frechet_distance, frechet_interval

D = 6


def gaussian(mean, covariance, origin=Origin()):
    return Statistics(np.asarray(mean, np.float64), np.asarray(covariance, np.float64), 100, origin)


def rotation(seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def test_commuting_covariances():
    """Then the distance is |m_a - m_b|^2 + sum (sqrt(a_i) - sqrt(b_i))^2 over the eigenvalues."""
    basis, a, b = rotation(), np.linspace(0.1, 4, D), np.linspace(9, 1, D)
    one = gaussian(np.zeros(D), basis * a @ basis.T)
    other = gaussian(np.full(D, 0.5), basis * b @ basis.T)
    expected = D * 0.25 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    a, b = np.array([[2.0, 0.3], [0.3, 0.5]]), np.array([[0.4, -0.2], [-0.2, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    found = frechet_distance(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b))
    assert found == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances(rank):
    basis = rotation()
    a, b = np.zeros(D), np.zeros(D)
    a[:rank], b[:rank] = 2.0, 5.0
    one, other = (gaussian(np.zeros(D), basis * values @ basis.T) for values in (a, b))
    regular = gaussian(np.zeros(D), np.eye(D))
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(one, other) == pytest.approx(rank * (np.sqrt(5) - np.sqrt(2)) ** 2, abs=1e-10)
    expected = rank * (np.sqrt(2) - 1) ** 2 + D - rank
    assert frechet_distance(one, regular) == pytest.approx(expected, abs=1e-6)


def test_it_is_invariant_to_rotations_and_to_features_that_never_change():
    random = np.random.default_rng(0)
    a, b, turn = random.normal(size=(50, D)), 2 * random.normal(size=(60, D)) + 1, rotation(1)
    expected = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert frechet_distance(Statistics.of(a @ turn), Statistics.of(b @ turn)) == pytest.approx(expected, rel=1e-10)
    padded = [np.concatenate([each, np.zeros((len(each), 4))], axis=1) for each in (a, b)]
    assert frechet_distance(*map(Statistics.of, padded)) == pytest.approx(expected, rel=1e-10)


def test_the_interval_is_as_wide_as_estimates_scatter():
    """Over repeated samples, against a fixed reference and against a sampled one."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(3, 3))
    truth = gaussian(np.full(3, 0.5), mix @ mix.T)
    values, widths = {"fixed": [], "sampled": []}, {"fixed": [], "sampled": []}
    for _ in range(200):
        generated = 1.2 * random.normal(size=(400, 3)) @ mix.T
        real = random.normal(size=(400, 3)) @ mix.T + 0.5
        for name, reference, features in (("fixed", truth, None), ("sampled", Statistics.of(real), real)):
            low, high = frechet_interval(generated, reference, features)
            value = frechet_distance(Statistics.of(generated), reference)
            assert low < value < high
            values[name].append(value)
            widths[name].append((high - low) / 2 / 1.96)
    for name in values:
        assert np.mean(widths[name]) == pytest.approx(np.std(values[name]), rel=0.15)
    assert np.mean(widths["sampled"]) > 1.2 * np.mean(widths["fixed"])


def test_the_interval_of_features_that_never_change():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(80, 3)), random.normal(size=(90, 3)) + 1
    expected = frechet_interval(a, Statistics.of(b), b)
    padded = [np.concatenate([each, np.ones((len(each), 2))], axis=1) for each in (a, b)]
    found = frechet_interval(padded[0], Statistics.of(padded[1]), padded[1])
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_distance_is_not_below_zero():
    same = np.random.default_rng(0).normal(size=(40, D))
    low, high = frechet_interval(same, Statistics.of(same))
    assert 0.0 <= low <= high and low == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(Statistics.of(same), Statistics.of(same[::-1])) == pytest.approx(0.0, abs=1e-9)


def test_too_few_images():
    check_count(2049, 2048)
    with pytest.raises(DataError, check=mentions(2048, "KID", "CMMD")):
        check_count(2048, 2048)


@pytest.mark.parametrize("field", ["network", "fingerprint", "preparation"])
def test_features_of_two_origins(field):
    one = gaussian(np.zeros(D), np.eye(D), Origin("vgg16", "ab", "64x64", "train"))
    fields = {"network": "vgg16", "fingerprint": "ab", "preparation": "64x64", "data": "val"}
    frechet_distance(one, gaussian(np.zeros(D), np.eye(D), Origin(**fields)))
    with pytest.raises(DataError, check=mentions(field)):
        frechet_distance(one, gaussian(np.zeros(D), np.eye(D), Origin(**{**fields, field: "other"})))


def test_features_of_two_sizes():
    with pytest.raises(DataError, check=mentions("6 features", 2)):
        frechet_distance(gaussian(np.zeros(D), np.eye(D)), gaussian(np.zeros(2), np.eye(2)))
