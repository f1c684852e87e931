"""The Inception score and CLIP scores."""

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import clip_s, clip_score, inception_score


def one_hot(classes, number, scale=50.0):
    return scale * np.eye(number)[np.asarray(classes)]


def test_inception_score_of_known_distributions():
    """Sure and even over K classes: K. The same for all images, or unsure: 1."""
    assert inception_score(one_hot(np.arange(40) % 5, 5), splits=1)[0] == pytest.approx(5.0, rel=1e-9)
    assert inception_score(one_hot([2] * 40, 5))[0] == pytest.approx(1.0, rel=1e-9)
    assert inception_score(np.zeros((40, 5)))[0] == pytest.approx(1.0, rel=1e-12)


def test_inception_score_by_definition():
    logits = np.random.default_rng(0).normal(size=(30, 7))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
    value, values = inception_score(logits + 1000, splits=1)  # softmax is invariant to a shift
    assert value == pytest.approx(expected, rel=1e-10) and values.shape == (1,)
    assert inception_score(logits[::-1], splits=1)[0] == pytest.approx(expected, rel=1e-10)


def test_images_sorted_by_class_are_shuffled():
    value, values = inception_score(one_hot(np.repeat(np.arange(5), 100), 5))
    assert values.shape == (10,) and values.min() > 4.5
    assert value == pytest.approx(values.mean())


def test_a_class_that_never_occurs():
    logits = one_hot(np.arange(40) % 2, 3, scale=2000.0)  # the probability of the third class underflows to 0
    assert inception_score(logits, splits=1)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("splits", [0, 41])
def test_splits(splits):
    with pytest.raises(DataError, check=mentions("40 images", f"{splits} splits")):
        inception_score(np.zeros((40, 5)), splits)


def test_clip_scores_of_known_angles():
    images = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    captions = np.tile([0.5, 0.0], (5, 1)).astype(np.float32)
    np.testing.assert_allclose(clip_score(images, captions), [100, 100 / 2**0.5, 0, -100, 0], atol=1e-9)
    np.testing.assert_allclose(clip_s(images, captions), [2.5, 2.5 / 2**0.5, 0, 0, 0], atol=1e-9)


@pytest.mark.parametrize("score", [clip_score, clip_s])
def test_embeddings_that_are_no_pairs(score):
    with pytest.raises(DataError, check=mentions("3 image embeddings", "2 text embeddings")):
        score(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(DataError, check=mentions("2 dimensions", 3)):
        score(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(DataError, check=mentions("text embeddings", "image 1", "finite")):
        score(np.ones((2, 2)), np.array([[1.0, 1.0], [np.nan, 1.0]]))
