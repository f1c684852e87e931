"""Paths, means and differences of CLIP embeddings, taken as directions."""

import numpy as np
from jaxtyping import Float, Float32

from dalle2_jax.errors import UsageError, UserError

_PARALLEL = 1e-6
"""Angle in radians, from 0 or from pi, at which two directions count as parallel."""

_CANCELLED = 1e-3
"""Norm of a mean of unit vectors, relative to the sum of the weights, below which they cancel each other out."""


def slerp(
    start: Float[np.ndarray, "..."], end: Float[np.ndarray, "..."], theta: Float[np.ndarray, "F"]
) -> Float32[np.ndarray, "F ..."]:
    """Returns spherical interpolations of two arrays, which are taken as vectors (Shoemake 1985).

    With omega the angle between the unit vectors u and v of both,

        slerp(theta) = (sin((1 - theta) omega) u + sin(theta omega) v) / sin(omega),

    scaled to the norm that is interpolated linearly between both. Parallel vectors are interpolated linearly.

    Raises:
      UserError: the vectors are opposite: every rotation from one to the other is as good.
    """
    a, b = start.astype(np.float64).ravel(), end.astype(np.float64).ravel()
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    u, v = a / lengths[0], b / lengths[1]
    omega = np.arccos(np.clip(u @ v, -1.0, 1.0))
    theta = theta[:, None]
    if omega < _PARALLEL:
        direction = (1.0 - theta) * u[None] + theta * v[None]
    elif omega > np.pi - _PARALLEL:
        raise UserError("the embeddings are opposite: there is no shortest path to interpolate along")
    else:
        direction = (np.sin((1.0 - theta) * omega) * u[None] + np.sin(theta * omega) * v[None]) / np.sin(omega)
    norms = (1.0 - theta) * lengths[0] + theta * lengths[1]
    return (norms * direction).astype(np.float32).reshape(len(theta), *start.shape)


def positions(points: int, frames: int) -> Float[np.ndarray, "F"]:
    """Returns equal steps from 0 to ``points`` - 1, with ``frames`` from each point to the next, both included."""
    return np.linspace(0.0, points - 1.0, (points - 1) * (frames - 1) + 1)


def path(points: Float[np.ndarray, "N ..."], frames: int) -> Float32[np.ndarray, "F ..."]:
    """Returns the arrays at `positions` on the path that joins N points by spherical interpolation.

    Raises:
      UserError: neighbouring points are opposite.
    """
    theta = np.linspace(0.0, 1.0, frames)
    legs = [slerp(start, end, theta)[:-1] for start, end in zip(points[:-1], points[1:], strict=True)]
    return np.concatenate([*legs, points[-1:].astype(np.float32)])


def weighted_mean(emb: Float[np.ndarray, "N E"], weights: Float[np.ndarray, "N"]) -> Float32[np.ndarray, "E"]:
    """Returns the weighted mean of the directions of embeddings, at the weighted mean of their norms.

    Negative weights move it away from an embedding; norms are weighted by the weights' absolute values.

    Raises:
      UsageError: the weighted directions cancel each other out.
    """
    norms = np.linalg.norm(emb.astype(np.float64), axis=1)
    direction = weights @ (emb / norms[:, None])
    length, total = np.linalg.norm(direction), np.abs(weights).sum()
    if length <= _CANCELLED * total:
        raise UsageError("the weighted embeddings cancel each other out: give other weights")
    return (direction / length * (np.abs(weights) @ norms / total)).astype(np.float32)


def text_direction(
    after: Float[np.ndarray, "E"], before: Float[np.ndarray, "M E"] | None, norm: float
) -> Float32[np.ndarray, "E"]:
    """Returns z_d, the direction from one text embedding to another (Ramesh et al. 2022, section 3.3).

    Args:
      after: the text embedding z_t of what an image becomes.
      before: text embeddings of which z_t0 is the mean; None for z_t0 = 0.
      norm: of the result.

    Raises:
      UserError: both have the same direction.
    """
    difference = after.astype(np.float64) - (0.0 if before is None else before.astype(np.float64).mean(axis=0))
    length = np.linalg.norm(difference)
    if length <= _PARALLEL * np.linalg.norm(after):
        raise UserError("both texts have the same CLIP embedding: there is no difference to apply")
    return (difference * (norm / length)).astype(np.float32)
