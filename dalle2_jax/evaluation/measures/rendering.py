"""How cleanly shapes are rendered: flatness of the background and sharpness of edges.

Both are read from each image, without its caption. With b the median colour of the border, the background is what is
further than `_MARGIN` from every pixel whose smoothed colour differs from b.

    background_std = sqrt(mean over background and channels of (image - mean)^2), levels of 255              (1)

An object's coverage a is its share of the ink colour c on the line from b to c. An ideal edge, smoothed by a box of w
pixels, has 0.1 < a < 0.9 on a band of 0.8 w pixels around the contour a = 0.5, so that

    edge_width = area(0.1 < a < 0.9) / length(a = 0.5), pixels                                               (2)
"""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.evaluation import intervals
from dalle2_jax.evaluation.figures import Figure, Figures

_FOREGROUND = 45.0
"""Levels of RGB by which an object differs from the background after smoothing."""

_SMOOTHING = 0.6
"""Standard deviation of the smoothing, in pixels."""

_MARGIN = 3
"""Pixels around objects that belong to neither object nor background."""

_MIN_AREA = 9
"""Pixels of the smallest component that counts as an object."""


def figures(images: UInt8[np.ndarray, "N H W 3"], real: UInt8[np.ndarray, "N H W 3"], seed: int) -> Figures:
    """Returns the median background_std and edge_width of images, with those of real images as baselines.

    Images of which a figure cannot be read, such as those without an object, are omitted from it and from its n.
    """
    found: Figures = {}
    for name, read in (("background_std", background_std), ("edge_width", edge_width)):
        ours, theirs = (_median([read(image) for image in each], seed) for each in (images, real))
        if ours is not None:
            found[name] = ours if theirs is None else ours.compared(theirs, "real images")
    return found


def _median(values: list[float | None], seed: int) -> Figure | None:
    read = np.asarray([value for value in values if value is not None], np.float64)
    if not len(read):
        return None
    interval = intervals.bootstrap(np.median, read, seed=seed) if len(read) > 1 else None
    return Figure(float(np.median(read)), len(read), interval)


def background_std(image: UInt8[np.ndarray, "H W 3"]) -> float | None:
    """Returns the standard deviation of the background, eq. (1); None if there is no background."""
    foreground, _ = _foreground(image)
    near = cv2.dilate(foreground.astype(np.uint8), np.ones((2 * _MARGIN + 1,) * 2, np.uint8)) > 0
    levels = image[~near].astype(np.float64)
    return float(np.sqrt(levels.var(axis=0).mean())) if len(levels) >= _MIN_AREA else None


def edge_width(image: UInt8[np.ndarray, "H W 3"]) -> float | None:
    """Returns the mean width of the edges of all objects, eq. (2); None if there is no object."""
    foreground, background = _foreground(image)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(foreground.astype(np.uint8), connectivity=4)
    area = length = 0.0
    for part in range(1, count):
        if stats[part, cv2.CC_STAT_AREA] < _MIN_AREA:
            continue
        inside = (parts == part).astype(np.uint8)
        coverage = _coverage(image, background, inside)
        near = cv2.dilate(inside, np.ones((2 * _MARGIN + 1,) * 2, np.uint8)) > 0
        contours, _ = cv2.findContours(
            ((coverage > 0.5) & near).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        length += sum(cv2.arcLength(contour, closed=True) for contour in contours)
        area += float(((coverage > 0.1) & (coverage < 0.9) & near).sum())
    return area / length if length else None


def _foreground(image: np.ndarray) -> tuple[np.ndarray, Float[np.ndarray, "3"]]:
    """Returns where an image differs from the colour of its border, and that colour."""
    levels = image.astype(np.float32)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    background = np.median(border, axis=0)
    smooth = cv2.GaussianBlur(levels, (0, 0), _SMOOTHING)
    return np.linalg.norm(smooth - background, axis=2) > _FOREGROUND, background


def _coverage(image: np.ndarray, background: np.ndarray, inside: np.ndarray) -> Float[np.ndarray, "H W"]:
    """Returns the share of an object's colour in each pixel; its colour is the median of its inner pixels."""
    inner = cv2.erode(inside, np.ones((3, 3), np.uint8)) > 0
    ink = np.median(image[inner if inner.any() else inside > 0].astype(np.float32), axis=0)
    line = ink - background
    return (image.astype(np.float32) - background) @ line / max(float(line @ line), 1.0)
