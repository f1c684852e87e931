"""Fréchet distance between two sets of images, as Gaussians in the space of a network's features.

With the means m and covariances C of the features (Heusel et al. 2017, eq. 6; Dowson & Landau 1982):

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))                                    (1)

For C_a = L L^T the eigenvalues of C_a C_b are those of the symmetric L^T C_b L, so that

    tr (C_a C_b)^(1/2) = sum_i sqrt(eig_i(L^T C_b L)) = sum_i sv_i(L^T M),   C_b = M M^T      (2)

The first form is fast; the second is accurate for singular covariances too.

Over the features of FID's Inception it is FID. Estimated from finite sets it is biased upward by O(1/n) (Bińkowski et
al. 2018, section 4), so that only figures of equal n compare.

The distribution of the estimate is normal for large n, with the variance of its influence function over the images of
set a: with w = L^-1 (x - m_a),

    h(x) = 2 (m_a - m_b)^T (x - m_a) + |x - m_a|^2 - w^T (L^T C_b L)^(1/2) w,    var(d^2) = var(h) / n      (3)
"""

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation import intervals
from dalle2_jax.evaluation.distances import blocks
from dalle2_jax.evaluation.distances.moments import Statistics


def check_count(n: int, dim: int) -> None:
    """Checks that a set has more images than features, without which its covariance is singular.

    Args:
      n: number of images of the smaller set.
      dim: number of features D.

    Raises:
      DataError: it has not.
    """
    if n <= dim:
        raise DataError(
            f"{n} images are too few for a Fréchet distance of {dim} features, which needs more images than features. "
            "Use more images, or KID or CMMD, which are unbiased for any number."
        )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Fréchet distance of two Gaussians, eq. (1), which the literature calls FID.

    Takes one to two seconds on one core for D = 2048. See `check_count` for how many images it needs.

    Raises:
      DataError: the statistics are of different networks or preparations.
    """
    a.check_same(b)
    return _distance(a, b, _trace_of_root(a.covariance, b.covariance))


def frechet_interval(
    features: Float[np.ndarray, "N D"],
    reference: Statistics,
    reference_features: Float[np.ndarray, "M D"] | None = None,
) -> intervals.Interval:
    """Returns the 95 % interval of the Fréchet distance of images to a reference, by eq. (3).

    It has about the width that bootstrap resampling gives, for the price of one eigendecomposition a set. Percentiles
    of a bootstrap would be off centre, because resampled sets are further apart than the sets themselves. With few
    images per feature it is up to a third too wide.

    Args:
      features: of the generated images.
      reference: statistics of the real images.
      reference_features: the features that ``reference`` was computed from, if their sampling error is to count; None
        for a reference that is fixed, as a published one.

    Raises:
      DataError: the features are not finite, or of another network than ``reference``.
    """
    values = blocks.checked(features, at_least=2)
    statistics = Statistics.of(values, reference.origin)
    statistics.check_same(reference)
    distance, variance = _distance_and_variance(values, statistics, reference)
    if reference_features is not None:
        others = blocks.checked(reference_features, at_least=2)
        variance += _distance_and_variance(others, reference, statistics)[1]
    low, high = intervals.normal(distance, variance**0.5)
    return max(0.0, low), high


def _distance(a: Statistics, b: Statistics, trace_of_root: float) -> float:
    """Returns eq. (1)."""
    shift, traces = a.mean - b.mean, np.trace(a.covariance) + np.trace(b.covariance)
    return float(max(0.0, shift @ shift + traces - 2 * trace_of_root))


def _trace_of_root(a: Float64[np.ndarray, "D D"], b: Float64[np.ndarray, "D D"]) -> float:
    """Returns eq. (2) of two positive semidefinite matrices."""
    try:
        factor = np.linalg.cholesky(a)
        np.linalg.cholesky(b)
    except np.linalg.LinAlgError:  # singular: square roots of eigenvalues that are rounding errors would add up
        return float(np.linalg.svd(_root(a).T @ _root(b), compute_uv=False).sum())
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ b @ factor), 0.0)).sum())


def _root(matrix: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "D R"]:
    """Returns L with matrix = L L^T for a positive semidefinite matrix of rank R."""
    values, vectors = np.linalg.eigh(matrix)
    positive = values > 0
    return vectors[:, positive] * np.sqrt(values[positive])


def _distance_and_variance(
    features: Float[np.ndarray, "N D"], own: Statistics, other: Statistics
) -> tuple[float, float]:
    """Returns eq. (1), and its variance that is due to the sampling of ``features``, eq. (3)."""
    factor, inverse = _factors(own.covariance)
    values, vectors = np.linalg.eigh(factor.T @ other.covariance @ factor)
    roots = np.sqrt(np.maximum(values, 0.0))
    whiten = inverse @ (vectors * np.sqrt(roots))  # |(x - m) whiten|^2 = w^T (L^T C_b L)^(1/2) w
    shift, influence = own.mean - other.mean, np.empty(len(features))
    for where, block in blocks.rows(features):
        centred = block - own.mean
        spread = np.square(centred).sum(axis=1) - np.square(centred @ whiten).sum(axis=1)
        influence[where] = 2 * centred @ shift + spread
    return _distance(own, other, float(roots.sum())), float(influence.var(ddof=1) / len(features))


def _factors(matrix: Float64[np.ndarray, "D D"]) -> tuple[Float64[np.ndarray, "D R"], Float64[np.ndarray, "D R"]]:
    """Returns L and L^-T with matrix = L L^T; of the R dimensions in which it is not singular."""
    try:
        factor = np.linalg.cholesky(matrix)
        return factor, np.linalg.inv(factor).T
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        vectors, scales = vectors[:, kept], np.sqrt(values[kept])
        return vectors * scales, vectors / scales
