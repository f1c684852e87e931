"""Confidence intervals of measured figures.

For a fraction p of n independent examples (Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1), with the normal
quantile z of the confidence:

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)                      (1)

It lies in [0, 1] and has a positive length even for p = 0 and p = 1. For a mean of n values with standard deviation s,
by the central limit theorem,

    mean +- z s / sqrt(n)                                                                     (2)

For any other figure of n independent examples: the percentiles of the figure over sets of n examples sampled from them
with replacement (Efron 1979; Efron & Tibshirani 1993, chapter 13).
"""

import statistics
from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE = 0.95

Interval = tuple[float, float]
"""The lower and the upper end."""


def _quantile(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(share: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Returns the interval of a fraction of n examples, eq. (1).

    Raises:
        ValueError: n is below 1, or the fraction outside [0, 1].
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"{share} is no fraction of {n} examples")
    z = _quantile(confidence)
    centre = share + z**2 / (2 * n)
    reach = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1 + z**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def of_mean(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> Interval | None:
    """Returns the interval of a mean, eq. (2); None for fewer than two values, whose spread is unknown."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return None
    reach = _quantile(confidence) * values.std(ddof=1) / values.size**0.5
    return float(values.mean() - reach), float(values.mean() + reach)


def normal(value: float, standard_error: float, confidence: float = CONFIDENCE) -> Interval:
    """Returns the interval of an estimate that is normally distributed."""
    reach = _quantile(confidence) * standard_error
    return value - reach, value + reach


def bootstrap(
    function: Callable[..., float],
    *arrays: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Returns the percentile interval of a figure, by the bootstrap.

    Args:
      function: the figure, of arrays like ``arrays``.
      *arrays: arrays [N, ...] of one length N. Row i of all belongs to example i: rows are resampled together.
      resamples: number of resampled data sets, each of N examples.
      seed: of the resampling.
      confidence: probability that an interval contains the true figure.

    Raises:
      ValueError: there are no arrays, or their lengths differ or are 0.
    """
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"arrays of one length above 0 are needed, got lengths {sorted(lengths)}")
    (n,), random = lengths, np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        chosen = random.integers(0, n, n)
        values.append(function(*(array[chosen] for array in arrays)))
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def in_percent(share: float, interval: Interval) -> str:
    """Returns a fraction and its interval, as in "94.9% [91.5, 97.0]"."""
    return f"{100 * share:.1f}% [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
