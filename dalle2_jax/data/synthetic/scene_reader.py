"""Reads an image back into a scene of `dalle2_jax.data.synthetic.shapes`, by classical image analysis.

Every claim of quality on ``shapes`` is measured with this reader, so it is measured itself.
Share of rendered ``val`` scenes, of one or two objects, of which every attribute is read right (2,000 scenes; at
256, 1,000; noise is Gaussian, its sigma a share of the range, clipped):

| side | clean   | sigma 0.05 | sigma 0.10 | blurred by 2/64 of the side |
| ---- | ------- | ---------- | ---------- | --------------------------- |
| 32   | 100.00% |    100.00% |    100.00% |                      92.70% |
| 64   | 100.00% |    100.00% |    100.00% |                      99.75% |
| 256  | 100.00% |    100.00% |    100.00% |                      99.60% |

The steps
    1. An image larger than 64x64 is averaged down to that. The background is the median colour of the image's
       border; its name is the nearest background.
    2. Pixels far from the background form connected components. A component's colour c is the median of its
       purest pixels, its name the nearest named colour. A pixel's coverage is its share of c on the line from
       background to c. Components are formed again from coverage above a half, which parts objects
       whose soft edges touch.
    3. The coverage is compared with the rendered coverage of every shape and size (and of 0.85 and 1.15 times the
       size) on the same centroid; the smallest squared difference names shape and size. A component that resembles
       none (overlap below `MIN_OVERLAP`) has the shape ``unknown``, so that a blob is not given the benefit of
       a guess; a colour further than `MAX_COLOUR_DISTANCE` from every name is ``unknown`` too.
    4. Components smaller than a quarter of the smallest shape are taken for specks and ignored.
"""

import itertools
from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.data.synthetic import grammar, polygons
from dalle2_jax.data.synthetic.scenes import Scene, SceneObject, relation_of
from dalle2_jax.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    radius_of,
    snap,
)

ATTRIBUTES = ("colour", "shape", "size", "count", "relation", "background", "all")
UNKNOWN = "unknown"
MIN_OVERLAP = 0.65
"""Least intersection over union of coverages for a shape to be named."""
MAX_COLOUR_DISTANCE = 90.0
"""Furthest a colour may be from its name, in levels of RGB; the closest two names are 112 apart."""

_SIDE = 64  # larger images are averaged down to this: enough for every attribute, and quicker
_FOREGROUND = 45.0  # levels of RGB from the background; noise of sigma 0.05 reaches 30 after smoothing
_SMOOTHING = 0.6  # sigma of the smoothing before components are formed, in pixels: less than objects are apart
_SCALES = (0.85, 1.0, 1.15)  # a size a little off is still that size, and must not spoil the shape
_SPECK = 0.25  # of the smallest shape's area
_SMALLEST_AREA = SIZES["small"] ** 2 * min(polygons.AREAS.values())


def read_scene(image: UInt8[np.ndarray, "H W 3"]) -> Scene:
    """Returns what a square image shows; objects come in order of their component's first pixel.

    There may be no objects, or more than two; shapes and colours may be `UNKNOWN`.
    """
    side = min(image.shape[0], _SIDE)
    levels = cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    background = np.median(border, axis=0)
    smooth = cv2.GaussianBlur(levels, (0, 0), _SMOOTHING)
    parts = []
    for found in _components(np.linalg.norm(smooth - background, axis=2) > _FOREGROUND, side):
        share = _share(smooth, background, _ink(smooth, background, found))
        parts.extend(_components((share > 0.5) & found, side))
    objects = tuple(_describe(levels, smooth, background, part, len(parts)) for part in parts)
    return Scene(objects, _nearest(background, BACKGROUNDS)[0])


def matches(reading: Scene, scene: Scene, caption: str | None = None) -> Mapping[str, bool]:
    """Returns, for each of `ATTRIBUTES`, whether a reading agrees with the requested scene.

    Objects of the reading are assigned to those of the scene, in any order, so that the most attributes agree.
    ``colour``, ``shape`` and ``size`` hold when they agree for every object of the
    scene; so an object too few fails all three. ``count`` holds when neither has more objects. ``relation``
    holds when the two assigned objects have the requested relation and the count is right; it always holds for one
    object. A colour without a name agrees with every colour.
    ``background`` holds when it agrees, or when there is a ``caption`` that does not name it. ``all`` is their
    conjunction.
    """
    expected = scene.objects
    count = len(reading.objects) == len(expected)
    agree, relation, best = np.zeros((len(expected), 3), bool), len(expected) == 1, -1.0
    for chosen in itertools.permutations(reading.objects, len(expected)):
        table = np.array([_agreement(seen, own) for seen, own in zip(chosen, expected, strict=True)])
        placed = len(expected) == 1 or (count and relation_of(*chosen) == scene.relation)
        if table.sum() + 0.5 * placed > best:
            agree, relation, best = table, placed, table.sum() + 0.5 * placed
    colour, shape, size = map(bool, np.all(agree, axis=0))
    named = caption is None or grammar.mentions_background(caption)
    background = not named or reading.background == scene.background
    everything = colour and shape and size and count and relation and background
    return dict(zip(ATTRIBUTES, (colour, shape, size, count, relation, background, everything), strict=True))


def _agreement(seen: SceneObject, expected: SceneObject) -> tuple[bool, bool, bool]:
    colour = seen.colour == expected.colour or not expected.has_named_colour
    return colour, seen.shape == expected.shape, seen.size == expected.size


def _components(mask: np.ndarray, side: int) -> list[np.ndarray]:
    """Returns the connected parts of a mask that are larger than a speck, each as a mask."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    least = _SPECK * _SMALLEST_AREA * side**2
    return [labels == label for label in range(1, len(stats)) if stats[label, cv2.CC_STAT_AREA] > least]


def _ink(levels: np.ndarray, background: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The colour of an object: the median over the half of its pixels that is furthest from the background."""
    pixels = levels[part]
    distance = np.linalg.norm(pixels - background, axis=1)
    return np.median(pixels[distance >= np.median(distance)], axis=0)


def _share(levels: np.ndarray, background: np.ndarray, ink: np.ndarray) -> Float[np.ndarray, "H W"]:
    """How far each pixel is on the line from background (0) to ink (1)."""
    line = ink - background
    return np.clip((levels - background) @ line / max(float(line @ line), 1.0), 0, 1)


def _nearest(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(colour - np.array(levels))) for name, levels in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _describe(
    levels: np.ndarray, smooth: np.ndarray, background: np.ndarray, part: np.ndarray, count: int
) -> SceneObject:
    """Names one of ``count`` objects, from its pixels and the ring about them, where its edge covers less than half."""
    side = levels.shape[0]
    ink = _ink(smooth, background, part)
    colour, distance = _nearest(ink, COLOURS)
    around = cv2.dilate(part.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    share = np.where(around, _share(levels, background, ink), 0)
    rows, columns = np.indices(share.shape)
    total = float(share.sum())
    x, y = (float((share * (axis + 0.5)).sum()) / total / side for axis in (columns, rows))
    fits = {
        (shape, size, radius): _fit(share, shape, radius, x, y)
        for shape in SHAPES
        for size in SIZES
        for radius in (radius_of(size, count) * scale for scale in _SCALES)
    }
    (shape, size, _), (_, overlap) = min(fits.items(), key=lambda item: item[1][0])
    return SceneObject(
        shape=shape if overlap >= MIN_OVERLAP else UNKNOWN,
        colour=colour if distance <= MAX_COLOUR_DISTANCE else UNKNOWN,
        size=size,
        x=x,
        y=y,
    )


def _fit(share: np.ndarray, shape: str, radius: float, x: float, y: float) -> tuple[float, float]:
    """Compares a coverage with that of a shape whose centroid is at (x, y), in sides.

    Returns:
        their squared difference, and their intersection over union.
    """
    dx, dy = polygons.CENTROIDS[shape]
    place = snap(x - dx * radius), snap(y - dy * radius)  # the lattice, for coverage's cache
    patch, top, left = polygons.coverage(shape, radius, *place, share.shape[0])
    height, width = share.shape
    rows, columns = slice(max(top, 0), top + patch.shape[0]), slice(max(left, 0), left + patch.shape[1])
    seen = share[rows, columns]
    patch = patch[rows.start - top : height - top, columns.start - left : width - left]
    outside = float(share.sum() - seen.sum())
    difference = float((share**2).sum() - (seen**2).sum() + ((seen - patch) ** 2).sum())
    overlap = float(np.minimum(seen, patch).sum()) / (float(np.maximum(seen, patch).sum()) + outside)
    return difference, overlap
