"""Kernel distances between two sets of images: KID and CMMD, squared maximum mean discrepancies.

For features x of one set and y of the other, the unbiased estimate (Gretton et al. 2012, eq. 3) is

    MMD^2 = mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean_(i, j) k(x_i, y_j)      (1)

which is 0 on average for equal distributions, at any number of images, and may be negative.

KID (Bińkowski et al. 2018, section 4) has k(x, y) = (x^T y / D + 1)^3 and is the mean of eq. (1) over random subsets.
CMMD (Jayasumana et al. 2024, section 4) has k(x, y) = exp(-|x - y|^2 / 2 sigma^2) with sigma = 10, over CLIP image
embeddings of unit norm, times 1000.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation import intervals
from dalle2_jax.evaluation.distances import blocks

SUBSETS, SUBSET_SIZE = 100, 1000
"""Number and size of the subsets of published KIDs."""

_SIGMA, _SCALE = 10.0, 1000.0

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""float64[N, D], float64[M, D] -> float64[N, M]."""


def _cubic(x: Float64[np.ndarray, "N D"], y: Float64[np.ndarray, "M D"]) -> Float64[np.ndarray, "N M"]:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base


def _gaussian(x: Float64[np.ndarray, "N D"], y: Float64[np.ndarray, "M D"]) -> Float64[np.ndarray, "N M"]:
    return np.exp(blocks.squared_distances(blocks.unit_rows(x), blocks.unit_rows(y)) / (-2 * _SIGMA**2))


def kid(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 2020,
) -> tuple[float, Float64[np.ndarray, "S"]]:
    """Returns KID, and eq. (1) of each subset.

    The subsets are those of torch-fidelity for the same seed. Published figures are often this times 1000.

    Args:
      a: features of the generated images.
      b: features of the real images.
      subsets: number of subsets S.
      subset_size: images of each set in a subset; at most N and M, and below both for `kid_interval`.
      seed: of the subsets.

    Raises:
      DataError: a set has fewer images than a subset, or features are not finite.
    """
    a, b = blocks.checked_pair(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        smaller = min(len(a), len(b))
        raise DataError(
            f"subsets of KID have {subset_size} images and the smaller set {smaller}: lower the subset size"
        )
    random = np.random.RandomState(seed)  # its stream is the same in all versions of NumPy
    chosen = [
        (random.choice(len(a), subset_size, replace=False), random.choice(len(b), subset_size, replace=False))
        for _ in range(subsets)
    ]
    if subsets * subset_size**2 <= len(a) * len(b):
        each = [_mmd(_cubic, a[i], b[j], np.ones((subset_size, 1)), np.ones((subset_size, 1))) for i, j in chosen]
        values = np.concatenate(each)
    else:  # the sets are small: one kernel matrix serves all subsets
        weights = np.zeros((len(a), subsets)), np.zeros((len(b), subsets))
        for number, pair in enumerate(chosen):
            for weight, indices in zip(weights, pair, strict=True):
                weight[indices, number] = 1.0
        values = _mmd(_cubic, a, b, *weights)
    return float(values.mean()), values


def kid_interval(values: Float64[np.ndarray, "S"], subset_size: int, n: int) -> intervals.Interval | None:
    """Returns the 95 % interval of KID from its subsets, by the delete-d jackknife (Shao & Wu 1989).

    The variance of a subset's value is multiplied by subset_size / (n - subset_size), because subsets are smaller than
    the set and are sampled from it without replacement. For sets that hardly differ it is too wide. Subsets of half the
    images at most are advisable.

    Args:
      values: eq. (1) of each subset, from `kid`.
      subset_size: as given to `kid`.
      n: images of the smaller set.

    Returns:
      The interval; None if the subsets are the whole set, or there is one only.
    """
    if n <= subset_size or len(values) < 2:
        return None
    variance = np.var(values) * subset_size / (n - subset_size)
    return intervals.normal(float(np.mean(values)), float(variance) ** 0.5)


def cmmd(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Returns CMMD, by the unbiased eq. (1).

    The published code includes i = j in the means, which adds about 4 (1 / N + 1 / M) to this; less than 0.0003 at the
    30,000 images of the paper.

    Args:
      a: CLIP image embeddings of the generated images, of any norm.
      b: CLIP image embeddings of the real images, of any norm.

    Raises:
      DataError: a set has fewer than two images, or embeddings are not finite.
    """
    a, b = blocks.checked_pair(a, b, ("embeddings", "embeddings of the other set"), at_least=2)
    return _SCALE * float(_mmd(_gaussian, a, b, np.ones((len(a), 1)), np.ones((len(b), 1)))[0])


def cmmd_interval(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> intervals.Interval:
    """Returns the 95 % interval of CMMD, by the variance of a U-statistic (Sutherland et al. 2017, section 2).

    With h(x) = 2 (mean_j k(x, x_j) - mean_j k(x, y_j)), the variance is var(h) / N for each of the two sets.

    Args:
      a: as `cmmd`.
      b: as `cmmd`.

    Raises:
      DataError: as `cmmd`.
    """
    a, b = blocks.checked_pair(a, b, ("embeddings", "embeddings of the other set"), at_least=2)
    to_a, to_b = np.full((len(a), 1), 1 / len(a)), np.full((len(b), 1), 1 / len(b))
    a_to_b, b_to_a = _weighted(_gaussian, a, b, to_b)[:, 0], _weighted(_gaussian, b, a, to_a)[:, 0]
    in_a = _weighted(_gaussian, a, a, to_a, others=True)[:, 0] * len(a) / (len(a) - 1)
    in_b = _weighted(_gaussian, b, b, to_b, others=True)[:, 0] * len(b) / (len(b) - 1)
    value = in_a.mean() + in_b.mean() - 2 * a_to_b.mean()
    variance = 4 * (np.var(in_a - a_to_b, ddof=1) / len(a) + np.var(in_b - b_to_a, ddof=1) / len(b))
    return intervals.normal(_SCALE * float(value), _SCALE * float(variance) ** 0.5)


def _mmd(
    kernel: Kernel,
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    in_a: Float64[np.ndarray, "N S"],
    in_b: Float64[np.ndarray, "M S"],
) -> Float64[np.ndarray, "S"]:
    """Returns eq. (1) of S subsets: 1 in column s of ``in_a`` and ``in_b`` marks the images of subset s."""
    result = np.zeros(in_a.shape[1])
    for features, chosen in ((a, in_a), (b, in_b)):
        n = chosen.sum(axis=0)
        result += (chosen * _weighted(kernel, features, features, chosen, others=True)).sum(axis=0) / (n * (n - 1))
    return result - 2 * (in_a * _weighted(kernel, a, b, in_b)).sum(axis=0) / (in_a.sum(axis=0) * in_b.sum(axis=0))


def _weighted(
    kernel: Kernel,
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    weights: Float64[np.ndarray, "M S"],
    others: bool = False,
) -> Float64[np.ndarray, "N S"]:
    """Returns the product of the kernel matrix [N, M] and weights, one block of the matrix at a time.

    Args:
      kernel: the kernel.
      a: features.
      b: features.
      weights: one column a sum.
      others: whether ``a`` and ``b`` are one set, of which the pairs i = j do not count.
    """
    result = np.zeros((len(a), weights.shape[1]))
    for rows, x in blocks.rows(a):
        for columns, y in blocks.rows(b):
            matrix = kernel(x, y)
            if others and rows == columns:
                np.fill_diagonal(matrix, 0.0)
            result[rows] += matrix @ weights[columns]
    return result
