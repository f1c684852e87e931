"""Nearest neighbours by features, in the order of LPIPS, and the rank of concepts among real images."""

import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import (
    Neighbors,
    blocks,
    nearest,
    perceptual_distances,
    rank_concepts,
    rerank,
)
from dalle2_jax.evaluation.lpips import Lpips

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (7, 8, 8, 3), np.uint8)
CANDIDATES = RANDOM.integers(0, 256, (40, 8, 8, 3), np.uint8)


def fake_lpips(offset=0.0):
    """The mean squared difference of pixels, and the sizes of the batches that it computed.

    Args:
      offset: added to embeddings.
    """
    embedded, compared = [], []

    def encode(images):
        embedded.append(len(images))
        return jnp.asarray(images, jnp.float32).reshape(len(images), -1) / (255 * 192**0.5) + offset

    def compare(images, others):
        compared.append(len(images))
        return jnp.square(encode(images) - encode(others)).sum(axis=1)

    return Lpips("lpips_vgg16", 8, "0", encode, compare), embedded, compared


def pixels(images, others):
    """The mean squared difference of all pairs."""
    return np.square(images[:, None] / 255.0 - others[None] / 255.0).mean((2, 3, 4))


# --- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 2048])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_nearest_by_sorting_all(block, count, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    a, b = RANDOM.normal(size=(7, 5)), RANDOM.normal(size=(40, 5)).astype(np.float32)
    euclidean = np.linalg.norm(a[:, None] - b[None], axis=2)
    cosine = 1 - (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    for metric, expected in (("l2", euclidean), ("cosine", cosine)):
        found = nearest(a, b, count, metric)
        np.testing.assert_array_equal(found.indices, np.argsort(expected, axis=1)[:, :count])
        np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :count], atol=1e-7)


def test_copies_are_found_at_distance_0():
    features = RANDOM.normal(size=(40, 5)) + 100
    for metric in ("cosine", "l2"):
        found = nearest(features[[3, 17]], features, 2, metric)
        np.testing.assert_array_equal(found.indices[:, 0], [3, 17])
        assert (found.distances[:, 0] == 0).all() and (found.distances[:, 1] > 0).all()
    assert nearest(features[:1], np.repeat(features[:1], 3, axis=0), 3).indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("count", [0, 6])
def test_more_neighbours_than_candidates(count):
    with pytest.raises(DataError, check=mentions(count, "5 candidates")):
        nearest(np.ones((2, 3)), np.ones((5, 3)), count)


def test_rerank_orders_by_lpips():
    lpips, _, compared = fake_lpips()
    found = Neighbors(np.array([[4, 9, 2, 30, 31, 32]] * 7), np.zeros((7, 6)))
    reranked = rerank(found, IMAGES, list(CANDIDATES), lpips)
    expected = pixels(IMAGES, CANDIDATES)[:, found.indices[0]]
    np.testing.assert_allclose(reranked.distances, np.sort(expected, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(reranked.indices, found.indices[0][np.argsort(expected, axis=1)])
    assert compared == [32, 32]  # 42 pairs


# --- concepts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "passes"), [(1 << 30, 1), (1, 1), (192 * 4 * 2 * 16, 1)])
def test_perceptual_distances(memory, passes):
    lpips, embedded, _ = fake_lpips()
    found = perceptual_distances(IMAGES, CANDIDATES, lpips, memory)
    np.testing.assert_allclose(found, pixels(IMAGES, CANDIDATES), atol=2e-6)
    assert {*embedded} == {16}, "one shape, one program"
    assert sum(embedded) == 16 + 16 + passes * 48


def test_embeddings_far_from_zero():
    """Their squared norms are 50,000, the distances below 0.2."""
    found = perceptual_distances(IMAGES, CANDIDATES, fake_lpips(offset=16.0)[0])
    np.testing.assert_allclose(found, pixels(IMAGES, CANDIDATES), atol=1e-4)


def test_images_in_parts_when_memory_is_small():
    lpips, embedded, _ = fake_lpips()
    found = perceptual_distances(CANDIDATES, IMAGES, lpips, memory=1)
    np.testing.assert_allclose(found, pixels(CANDIDATES, IMAGES), atol=2e-6)
    assert sum(embedded) == 16 + 3 * (16 + 16)


def test_distances_of_pixels():
    """Means over blocks of 2x2 pixels; larger images than 32x32 may differ in size from the candidates."""
    large = np.repeat(np.repeat(RANDOM.integers(0, 256, (3, 32, 32, 3), np.uint8), 2, axis=1), 2, axis=2)
    small = RANDOM.integers(0, 256, (5, 32, 32, 3), np.uint8)
    expected = np.sqrt(pixels(large[:, ::2, ::2], small))
    np.testing.assert_allclose(perceptual_distances(large, small), expected, atol=1e-5)
    assert perceptual_distances(small[:1], small)[0, 0] == pytest.approx(0.0, abs=1e-2)


@pytest.mark.parametrize("wrong", [[], [IMAGES[0], IMAGES[1, :4]], [IMAGES[0].astype(float)]])
def test_images_that_are_rejected(wrong):
    with pytest.raises(DataError):
        perceptual_distances(IMAGES, wrong)
    with pytest.raises(DataError):
        perceptual_distances(wrong, CANDIDATES, fake_lpips()[0])


def test_lpips_needs_one_size():
    with pytest.raises(DataError, check=mentions("(8, 8, 3)", "(4, 4, 3)")):
        perceptual_distances(IMAGES, IMAGES[:, :4, :4], fake_lpips()[0])


NAMES = ["apple", "apple", "bus", "cat", "apple", "bus", "cat"]
STYLES = ["flat", "flat", "flat", "flat", "noto", "noto", "noto"]


def test_ranks_of_concepts():
    distances = np.array(
        [
            [0.5, 0.2, 0.3, 0.4, 0.1, 0.9, 0.9],  # nearest of all is noto; of flat the second apple
            [0.1, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9],
            [0.9, 0.9, 0.9, 0.2, 0.3, 0.2, 0.1],
        ]
    )
    found = rank_concepts(distances, ["apple", "cat", "apple"], ["flat", "flat", "noto"], NAMES, STYLES)
    np.testing.assert_array_equal(found.nearest, [1, 0, 6])
    np.testing.assert_array_equal(found.rank, [1, 3, 3])  # two apples are one concept
    np.testing.assert_array_equal(found.same_style, [False, True, True])
    np.testing.assert_array_equal(found.top(1), [True, False, False])
    assert found.top(3).all()


def test_ranks_do_not_depend_on_order():
    distances = RANDOM.random((30, 7))
    concepts, styles = RANDOM.choice(["apple", "bus", "cat"], 30), RANDOM.choice(["flat", "noto"], 30)
    found = rank_concepts(distances, list(concepts), list(styles), NAMES, STYLES)
    order = RANDOM.permutation(7)
    names, kinds = np.array(NAMES)[order], np.array(STYLES)[order]
    again = rank_concepts(distances[:, order], list(concepts), list(styles), list(names), list(kinds))
    np.testing.assert_array_equal(again.rank, found.rank)
    np.testing.assert_array_equal(order[again.nearest], found.nearest)
    np.testing.assert_array_equal(again.same_style, found.same_style)
    for i, (concept, style) in enumerate(zip(concepts, styles, strict=True)):
        best = {}
        for name, kind, distance in zip(NAMES, STYLES, distances[i], strict=True):
            if kind == style:
                best[name] = min(distance, best.get(name, 9.0))
        assert found.rank[i] == 1 + sorted(best, key=best.get).index(concept)


def test_equal_candidates_are_equally_near():
    found = rank_concepts(np.zeros((1, 7)), ["cat"], ["flat"], NAMES, STYLES)
    assert found.rank.tolist() == [1]


def test_concepts_without_a_real_image():
    with pytest.raises(DataError, check=mentions("dog", "flat")):
        rank_concepts(np.zeros((1, 7)), ["dog"], ["flat"], NAMES, STYLES)
    with pytest.raises(DataError, check=mentions("cat", "3d")):
        rank_concepts(np.zeros((1, 7)), ["cat"], ["3d"], NAMES, STYLES)


@pytest.mark.parametrize(
    ("concepts", "styles", "names"), [(["cat"] * 2, ["flat"], NAMES), (["cat"], ["flat"], NAMES[:3])]
)
def test_names_that_do_not_fit_distances(concepts, styles, names):
    with pytest.raises(DataError):
        rank_concepts(np.zeros((1, 7)), concepts, styles, names, STYLES)
