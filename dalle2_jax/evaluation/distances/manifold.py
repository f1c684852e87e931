"""Precision and recall, density and coverage: how two sets of features cover each other.

The manifold of a set is the union of the balls B(x, r_k(x)) around its features x, with the distance r_k(x) to the k-th
nearest other feature of the set as radius (Kynkäänniemi et al. 2019, eq. 1 and 2):

    precision = share of generated y in the manifold of the real set,                           (1)
    recall    = share of real x in the manifold of the generated set.

Outliers of the real set have large balls. Density counts how many balls each y is in, and coverage looks at the balls
of the real set alone (Naeem et al. 2020, section 3):

    density  = mean_y (number of x with |y - x| <= r_k(x)) / k,                                 (2)
    coverage = share of real x with some y with |y - x| <= r_k(x).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks

_SETS = ("features of the real images", "features of the generated images")


class PrecisionRecall(NamedTuple):
    """Eq. (1).

    Attributes:
      precision: share of generated images.
      recall: share of real images.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Eq. (2).

    Attributes:
      density: 1 on average for equal distributions; has no upper bound.
      coverage: share of real images.
      densities: the density of each generated image, float64[M].
    """

    density: float
    coverage: float
    densities: Float64[np.ndarray, "M"]


def precision_recall(
    real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M D"], k: int = 3
) -> PrecisionRecall:
    """Returns precision and recall, eq. (1), which published figures compute over VGG16's fc7 and 50,000 images.

    Args:
      real: features of the real images.
      generated: features of the generated images.
      k: neighbour that gives the radius.

    Raises:
      DataError: a set has at most k images, or features are not finite.
    """
    real, generated = _checked(real, generated, k)
    inside, _ = _membership(generated, real, _squared_radii(real, k))
    found, _ = _membership(real, generated, _squared_radii(generated, k))
    return PrecisionRecall(float((inside > 0).mean()), float((found > 0).mean()))


def density_coverage(
    real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M D"], k: int = 5
) -> DensityCoverage:
    """Returns density and coverage, eq. (2).

    Args:
      real: features of the real images.
      generated: features of the generated images.
      k: neighbour that gives the radius.

    Raises:
      DataError: a set has at most k images, or features are not finite.
    """
    real, generated = _checked(real, generated, k)
    balls, covered = _membership(generated, real, _squared_radii(real, k))
    return DensityCoverage(float(balls.mean() / k), float(covered.mean()), balls / k)


def _checked(
    real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M D"], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets after checking them."""
    real, generated = blocks.checked_pair(real, generated, _SETS)
    smaller = min(len(real), len(generated))
    if not 1 <= k < smaller:
        raise DataError(f"the distance to neighbour {k} needs more than {k} images in each set, got {smaller}")
    return real, generated


def _squared_radii(features: Float[np.ndarray, "N D"], k: int) -> Float64[np.ndarray, "N"]:
    """Returns the squared distance of each feature to the k-th nearest other one."""
    radii = np.empty(len(features))
    for rows, x in blocks.rows(features):
        smallest = np.empty((len(x), 0))
        for columns, y in blocks.rows(features):
            squares = blocks.squared_distances(x, y)
            if rows == columns:
                np.fill_diagonal(squares, np.inf)  # not itself
            smallest = np.concatenate([smallest, squares], axis=1)
            if smallest.shape[1] > k:
                smallest = np.partition(smallest, k - 1, axis=1)[:, :k]
        radii[rows] = smallest.max(axis=1)
    return radii


def _membership(
    points: Float[np.ndarray, "N D"], centres: Float[np.ndarray, "M D"], squared_radii: Float64[np.ndarray, "M"]
) -> tuple[Float64[np.ndarray, "N"], Bool[np.ndarray, "M"]]:
    """Returns the number of balls that each point is in, and whether each ball has a point."""
    balls, covered = np.zeros(len(points)), np.zeros(len(centres), bool)
    for rows, x in blocks.rows(points):
        for columns, y in blocks.rows(centres):
            inside = blocks.squared_distances(x, y) <= squared_radii[columns]
            balls[rows] += inside.sum(axis=1)
            covered[columns] |= inside.any(axis=0)
    return balls, covered
