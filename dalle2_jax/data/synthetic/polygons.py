"""The five shapes as polygons, and how much of each pixel they cover.

A polygon (the circle has 96 corners) is filled on a grid of about 1,024 cells a side and averaged over each pixel.
The grid is the same at every resolution that divides 1,024, so coverage at 64x64 averaged over 2x2 is
coverage at 32x32. The patch of (shape, radius, resolution, sub-pixel phase) is cached.
"""

import functools
import math

import cv2
import numpy as np
from jaxtyping import Float

EXTENT = 1.05
"""A shape's corners lie within this many radii of its centre on each axis."""
_FINE = 1024  # cells a side on which polygons are filled before averaging
_SHIFT = 6  # fractional bits of a corner's coordinate


def _ring(corners: int, radii: tuple[float, ...]) -> np.ndarray:
    angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross(arm: float, half_width: float) -> np.ndarray:
    """Corners of an upright cross; ``corner`` is turned about the centre three times."""
    corner = np.array([(-half_width, -arm), (half_width, -arm), (half_width, -half_width)])
    turn = np.array([(0, 1), (-1, 0)])  # (x, y) @ turn = (-y, x)
    return np.concatenate([corner @ np.linalg.matrix_power(turn, quarter) for quarter in range(4)])


_POLYGONS: dict[str, np.ndarray] = {  # corners in radii, y downwards
    "circle": _ring(96, (1.0,)),
    "square": 0.86 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "star": _ring(10, (EXTENT, 0.45 * EXTENT)),
    "cross": _cross(0.95, 0.33),
}


def _moments(corners: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Area and centroid of a polygon whose corners go clockwise on the screen (the shoelace formula)."""
    following = np.roll(corners, -1, axis=0)
    doubled = corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]
    x, y = ((corners + following) * doubled[:, None]).sum(axis=0) / (3 * doubled.sum())
    return float(doubled.sum() / 2), (float(x), float(y))


SHAPES = tuple(_POLYGONS)
AREAS = {shape: _moments(corners)[0] for shape, corners in _POLYGONS.items()}
"""Area of each shape at radius 1."""
CENTROIDS = {shape: _moments(corners)[1] for shape, corners in _POLYGONS.items()}
"""Centroid (x, y) of each shape at radius 1, from its centre."""


def coverage(
    shape: str, radius: float, x: float, y: float, resolution: int
) -> tuple[Float[np.ndarray, "n n"], int, int]:
    """Returns the share of each pixel that a shape covers, as a patch, and the patch's top and left pixel.

    ``radius`` and the centre (x, y) are fractions of the side. The patch may reach past the image's edge; it
    is read-only, and cached, which is of use for places on a lattice.
    """
    left, top = math.floor(x * resolution), math.floor(y * resolution)
    phase_x, phase_y = x * resolution - left, y * resolution - top
    patch = _patch(shape, radius * resolution, resolution, phase_x, phase_y)
    half = patch.shape[0] // 2
    return patch, top - half, left - half


@functools.lru_cache(maxsize=8192)
def _patch(shape: str, radius: float, resolution: int, phase_x: float, phase_y: float) -> np.ndarray:
    """Coverage of a shape of ``radius`` pixels whose centre is at (half + phase) of a (2 half + 1)-pixel patch."""
    half = math.ceil(EXTENT * radius) + 1
    side, fine = 2 * half + 1, max(1, _FINE // resolution)
    corners = _POLYGONS[shape] * radius + (half + phase_x, half + phase_y)
    # cv2 puts integer coordinates at cell centres, this module at cell corners: hence the half cell.
    fixed_point = np.rint((corners * fine - 0.5) * 2**_SHIFT).astype(np.int32)
    cells = np.zeros((side * fine, side * fine), np.uint8)
    cv2.fillPoly(cells, [fixed_point], 1, shift=_SHIFT)
    patch = cv2.resize(cells.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    patch.setflags(write=False)
    return patch
