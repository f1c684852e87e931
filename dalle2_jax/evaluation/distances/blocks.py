"""Features in blocks of rows, which bounds the memory of everything that compares all pairs."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.errors import DataError

BLOCK = 2048
"""Rows of a block: a matrix of all pairs of two blocks has 32 MiB."""

_ROUNDING = 1e-13
"""Squared distances below this part of the squared norms are rounding errors of equal rows."""


def checked(features: Float[np.ndarray, "N D"], what: str = "features", at_least: int = 1) -> Float[np.ndarray, "N D"]:
    """Returns features after checking their shape and values.

    Args:
      features: the features.
      what: their name in messages.
      at_least: minimum number of rows.

    Raises:
      DataError: they are no matrix, have fewer rows, or have NaN or infinity.
    """
    values = np.asarray(features)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating) or not values.shape[1]:
        raise DataError(f"{what} must be a matrix of floats [N, D], got {values.dtype}{list(values.shape)}")
    if len(values) < at_least:
        raise DataError(f"there are {len(values)} {what}: at least {at_least} are needed")
    for start in range(0, len(values), BLOCK):
        finite = np.isfinite(values[start : start + BLOCK]).all(axis=1)
        if not finite.all():
            raise DataError(f"{what} of image {start + int(np.argmin(finite))} are not finite (NaN or infinity)")
    return values


def checked_pair(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    what: tuple[str, str] = ("features", "features of the other set"),
    at_least: int = 1,
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "M D"]]:
    """Returns two sets of features after checking each, and that they have the same number of columns.

    Raises:
      DataError: as `checked`, or the numbers of columns differ.
    """
    first, second = checked(a, what[0], at_least), checked(b, what[1], at_least)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"{what[0]} have {first.shape[1]} dimensions, {what[1]} {second.shape[1]}: use one network for both"
        )
    return first, second


def rows(features: Float[np.ndarray, "N D"]) -> Iterator[tuple[slice, Float64[np.ndarray, "B D"]]]:
    """Yields (which rows, the rows in float64), `BLOCK` rows at a time."""
    for start in range(0, len(features), BLOCK):
        where = slice(start, min(start + BLOCK, len(features)))
        yield where, features[where].astype(np.float64)


def squared_distances(a: Float64[np.ndarray, "N D"], b: Float64[np.ndarray, "M D"]) -> Float64[np.ndarray, "N M"]:
    """Returns the squared Euclidean distances of all pairs of rows; those of equal rows are exactly 0."""
    norms = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("nd,nd->n", b, b)[None]
    squares = norms - 2 * (a @ b.T)
    squares[squares < _ROUNDING * norms] = 0.0
    return squares


def unit_rows(features: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, "N D"]:
    """Returns rows divided by their norms. Rows of zeros stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms > 0, norms, 1.0)
