"""Measures equal those that torch-fidelity and pytorch-fid compute of the same features."""

import pathlib

import numpy as np
import pytest

from dalle2_jax.evaluation.distances import Statistics, frechet_distance, inception_score, kid, precision_recall

RECORDED = pathlib.Path(__file__).parents[2] / "fixtures" / "distances" / "measures.npz"

BOUND = 1e-9


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(RECORDED))


@pytest.mark.parametrize("package", ["fidelity", "pytorch_fid"])
def test_frechet_distance(recorded, package):
    found = frechet_distance(Statistics.of(recorded["generated"]), Statistics.of(recorded["real"]))
    assert found == pytest.approx(recorded[f"{package}/fid"], rel=BOUND)


@pytest.mark.parametrize(
    ("key", "subsets", "size"), [("kid", 20, 40), ("kid_whole", 2, 150)], ids=["one kernel matrix", "a matrix a subset"]
)
def test_kid(recorded, key, subsets, size):
    value, values = kid(recorded["generated"], recorded["real"], subsets, size)
    np.testing.assert_allclose([value, values.std()], recorded[f"fidelity/{key}"], rtol=BOUND)


def test_inception_score(recorded):
    value, values = inception_score(3 * recorded["generated"].astype(np.float64))
    np.testing.assert_allclose([value, values.std()], recorded["fidelity/is"], rtol=BOUND)


def test_precision_and_recall(recorded):
    found = precision_recall(recorded["real"], recorded["generated"])
    np.testing.assert_allclose(found, recorded["fidelity/precision_recall"], rtol=1e-6)  # float32 shares
