"""The training images that are nearest to generated ones: what a system that memorises would give itself away by.

    found = nearest(features_of_samples, features_of_training, count=10)
    found = rerank(found, samples, training_images, lpips.load("runs/lpips"))

Features find candidates by semantic similarity; LPIPS then compares the candidates' appearance.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, UInt8

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks
from dalle2_jax.evaluation.lpips import Lpips

_PAIRS = 32
"""Pairs of images that LPIPS compares at a time."""


class Neighbors(NamedTuple):
    """The nearest candidates of each image, the nearest first.

    Attributes:
      indices: of the candidates, int64[N, K].
      distances: to them, float64[N, K].
    """

    indices: Int64[np.ndarray, "N K"]
    distances: Float64[np.ndarray, "N K"]


def nearest(
    features: Float[np.ndarray, "N D"],
    candidates: Float[np.ndarray, "M D"],
    count: int = 1,
    metric: Literal["cosine", "l2"] = "cosine",
) -> Neighbors:
    """Returns the candidates whose features are nearest.

    Args:
      features: of the generated images.
      candidates: features of the training images.
      count: number of neighbours K of each image.
      metric: "cosine", 1 - cos; or "l2", the Euclidean distance.

    Raises:
      DataError: there are fewer candidates than ``count``, or features are not finite.
    """
    features, candidates = blocks.checked_pair(features, candidates, ("features", "features of candidates"))
    if not 1 <= count <= len(candidates):
        raise DataError(f"{count} neighbours of {len(candidates)} candidates were requested: request fewer")
    indices, distances = np.empty((len(features), count), np.int64), np.empty((len(features), count))
    for rows, x in blocks.rows(features):
        best, where = np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
        for columns, y in blocks.rows(candidates):
            numbers = np.broadcast_to(np.arange(columns.start, columns.stop), (len(x), len(y)))
            best = np.concatenate([best, _distances(x, y, metric)], axis=1)
            where = np.concatenate([where, numbers], axis=1)
            if best.shape[1] > count:
                chosen = np.argpartition(best, count - 1, axis=1)[:, :count]
                best, where = np.take_along_axis(best, chosen, 1), np.take_along_axis(where, chosen, 1)
        order = np.lexsort((where, best))
        indices[rows], distances[rows] = np.take_along_axis(where, order, 1), np.take_along_axis(best, order, 1)
    return Neighbors(indices, distances)


def _distances(
    x: Float64[np.ndarray, "N D"], y: Float64[np.ndarray, "M D"], metric: Literal["cosine", "l2"]
) -> Float64[np.ndarray, "N M"]:
    if metric == "l2":
        return np.sqrt(blocks.squared_distances(x, y))
    return blocks.squared_distances(blocks.unit_rows(x), blocks.unit_rows(y)) / 2  # |u - v|^2 = 2 - 2 cos


def rerank(
    found: Neighbors,
    images: UInt8[np.ndarray, "N H W 3"],
    candidates: UInt8[np.ndarray, "M H W 3"] | Sequence[np.ndarray],
    lpips: Lpips,
) -> Neighbors:
    """Returns the same neighbours in the order of their LPIPS distances, with these as distances.

    Args:
      found: neighbours from `nearest`.
      images: the generated images.
      candidates: the training images, of the same size; only those in ``found`` are read.
      lpips: the distance.

    Raises:
      DataError: the images differ in size.
    """
    n, count = found.indices.shape
    pairs = [(image, candidate) for image in range(n) for candidate in found.indices[image]]
    measured: list[np.ndarray] = []
    for start in range(0, len(pairs), _PAIRS):
        some = pairs[start : start + _PAIRS]
        padded = some + some[-1:] * (_PAIRS - len(some))  # one shape, one program
        ours = np.stack([images[image] for image, _ in padded])
        theirs = np.stack([candidates[int(candidate)] for _, candidate in padded])
        measured.append(lpips(ours, theirs)[: len(some)])
    distances = np.concatenate(measured).astype(np.float64).reshape(n, count)
    order = np.lexsort((found.indices, distances))
    return Neighbors(np.take_along_axis(found.indices, order, 1), np.take_along_axis(distances, order, 1))
