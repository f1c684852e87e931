"""The embedded data set: captioned scenes of plain shapes, drawn from an index, without files.

A scene has one or two objects on a plain background. An object has a shape, one of eight named
colours, a size and a place; the first of two objects has a relation to the second (left, right,
above, below). Places lie on a lattice of 1/512 of the side. All randomness of scene ``i`` of a
split comes from (seed, split, i), so the data set is random access and the same everywhere.

Splits
    ``train`` and ``val`` never show a colour-shape pair of `HELD_OUT`; ``compositional`` shows no
    other. Each colour and each shape is in `HELD_OUT` at least once, and in ``train`` too.

Drawing
    A shape is a polygon (the circle has 96 corners) filled on a grid of about 1,024 cells a side and
    averaged over each pixel, so a picture at 64x64 averaged over 2x2 is the picture at 32x32, to the
    rounding of a byte. The coverage patch of (shape, size, resolution, sub-pixel phase) is cached.

Captions are made by `dalle2_jax.data.grammar`; they always name colour, shape and size, name the
relation where there is one, and name the background in half of them.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.data import grammar
from dalle2_jax.types import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 35),
    "orange": (250, 125, 0),
    "yellow": (250, 230, 40),
    "green": (20, 150, 50),
    "cyan": (20, 205, 220),
    "blue": (30, 60, 225),
    "purple": (125, 30, 185),
    "pink": (255, 130, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 0.13, "large": 0.215}
"""Radius as a fraction of the picture's side; a shape's corners lie within `EXTENT` radii on each axis."""
EXTENT = 1.05
HELD_OUT = frozenset(
    {
        ("red", "circle"),
        ("orange", "square"),
        ("yellow", "triangle"),
        ("green", "star"),
        ("cyan", "cross"),
        ("blue", "circle"),
        ("purple", "square"),
        ("pink", "triangle"),
    }
)
SPLITS = ("train", "val", "compositional")

_LATTICE = 512  # places are multiples of 1/512 of the side, so that coverage patches can be cached
_FINE = 1024  # cells a side on which polygons are filled before averaging
_SHIFT = 6  # fractional bits of a corner's coordinate
_MARGIN, _GAP, _JITTER = 0.02, 0.05, 0.2  # to the edge, between two objects, about the centre; in sides


@dataclass(frozen=True)
class SceneObject:
    """One object; (x, y) is its centre as a fraction of the side, y downwards."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One or two objects on a plain background (a reader may find none, or more than two)."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def relation(self) -> str | None:
        """Where the first object lies from the second: left, right, above, below; None unless there are two."""
        return relation_of(*self.objects) if len(self.objects) == 2 else None

    @property
    def attributes(self) -> tuple:
        """Everything a full caption says: the scene without its places. Equal for indistinguishable scenes."""
        objects = tuple((thing.size, thing.colour, thing.shape) for thing in self.objects)
        return (*objects, self.relation, self.background)


def relation_of(first: SceneObject, second: SceneObject) -> str:
    """Returns where ``first`` lies from ``second``, along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


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


AREAS = {shape: _moments(corners)[0] for shape, corners in _POLYGONS.items()}
"""Area of each shape at radius 1."""
CENTROIDS = {shape: _moments(corners)[1] for shape, corners in _POLYGONS.items()}
"""Centroid (x, y) of each shape at radius 1, from its centre."""


def coverage(
    shape: str, radius: float, x: float, y: float, resolution: int
) -> tuple[Float[np.ndarray, "n n"], int, int]:
    """Returns the share of each pixel that a shape covers, as a patch, and the patch's top and left pixel.

    ``radius`` and the centre (x, y) are fractions of the side. The patch may reach past the picture's edge; it
    is read-only, and cached, which is of use for places on the lattice (`snap`).
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


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a scene as ``uint8[resolution, resolution, 3]``, anti-aliased."""
    picture = np.empty((resolution, resolution, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        patch, top, left = coverage(thing.shape, SIZES[thing.size], thing.x, thing.y, resolution)
        below, right = top + patch.shape[0], left + patch.shape[1]
        rows, columns = slice(max(top, 0), below), slice(max(left, 0), right)
        seen = patch[rows.start - top : resolution - top, columns.start - left : resolution - left, None]
        under = picture[rows, columns].astype(np.float32)
        ink = np.array(COLOURS[thing.colour], np.float32)
        picture[rows, columns] = np.rint(under + seen * (ink - under)).astype(np.uint8)
    return picture


class ShapesSource:
    """Random access to a split of the data set; ``source[i]`` is the same at every resolution but for its pixels.

    Args:
        split: ``train``, ``val`` or ``compositional``.
        resolution: side of the pictures, at least 8.
        seed: another seed is another data set.
        max_objects: 1, or 2 for scenes with one or two objects, half of each.
        num_examples: how many scenes the split has; scene i does not depend on it.

    Raises:
        UserError: on any other value.
    """

    def __init__(
        self, split: str, resolution: int, seed: int = 0, max_objects: int = 1, num_examples: int = 50_000
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"shapes has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if max_objects not in (1, 2):
            raise UserError(f"shapes draws 1 or 2 objects, not max_objects={max_objects}")
        if resolution < 8:
            raise UserError(f"shapes cannot be told apart at resolution {resolution}: use 8 or more")
        if num_examples < 1:
            raise UserError(f"shapes needs num_examples of at least 1, not {num_examples}")
        self.split, self.resolution, self.seed = split, resolution, seed
        self.max_objects, self.num_examples = max_objects, num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __repr__(self) -> str:
        return (
            f"ShapesSource({self.split!r}, {self.resolution}, seed={self.seed}, "
            f"max_objects={self.max_objects}, num_examples={self.num_examples})"
        )

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image": uint8[H, W, 3], "captions": every paraphrase, "caption": the fixed one}``."""
        scene = self.scene(index)
        return {
            "image": render(scene, self.resolution),
            "captions": grammar.captions(scene),
            "caption": self.caption(index),
        }

    def draw(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Returns the picture and one caption drawn with ``rng``."""
        scene = self.scene(index)
        return render(scene, self.resolution), grammar.caption(scene, rng)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields one drawn caption of each of the first ``limit`` scenes."""
        for index in range(min(limit, len(self))):
            yield self.caption(index)

    def caption(self, index: int) -> str:
        """Returns the one caption by which a scene is known in evaluations, always the same."""
        return grammar.caption(self.scene(index), self._rng(index % len(self), 1))

    def scene(self, index: int) -> Scene:
        """Returns scene ``index``; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        index = int(index) % len(self)
        return _random_scene(self._rng(index, 0), self.split == "compositional", self.max_objects)

    def _rng(self, index: int, use: int) -> np.random.Generator:
        # A Philox key takes two words and a counter four: no hashing, so it is quick to make.
        return np.random.Generator(
            np.random.Philox(key=[self.seed, SPLITS.index(self.split)], counter=[0, 0, use, index])
        )


_PAIRS = {
    held_out: tuple((colour, shape) for colour in COLOURS for shape in SHAPES if ((colour, shape) in HELD_OUT) == held_out)
    for held_out in (False, True)
}


def _random_scene(rng: np.random.Generator, held_out: bool, max_objects: int) -> Scene:
    pairs, sizes, backgrounds = _PAIRS[held_out], tuple(SIZES), tuple(BACKGROUNDS)
    count = int(rng.integers(1, max_objects + 1))
    looks = [pairs[rng.integers(len(pairs))] for _ in range(count)]
    chosen = [sizes[rng.integers(len(sizes))] for _ in range(count)]
    background = backgrounds[rng.integers(len(backgrounds))]
    places = _place_one(rng, chosen[0]) if count == 1 else _place_two(rng, chosen)
    objects = tuple(
        SceneObject(shape, colour, size, x, y)
        for (colour, shape), size, (x, y) in zip(looks, chosen, places, strict=True)
    )
    return Scene(objects, background)


def _inset(size: str) -> float:
    """How far a centre must stay from the edge, in sides."""
    return EXTENT * SIZES[size] + _MARGIN


def snap(place: float) -> float:
    """Returns the place on the lattice that is nearest, in sides."""
    return round(place * _LATTICE) / _LATTICE


def _place_one(rng: np.random.Generator, size: str) -> list[tuple[float, float]]:
    x, y = 0.5 + rng.uniform(-_JITTER, _JITTER, 2)
    return [(snap(x), snap(y))]


def _place_two(rng: np.random.Generator, sizes: list[str]) -> list[tuple[float, float]]:
    """Puts two objects apart along one axis, and at most half as far along the other, in random order."""
    near, far = (_inset(size) for size in sizes)
    slack = max(0.0, 1 - 2 * near - 2 * far + 2 * _MARGIN - _GAP)
    start, end = np.sort(rng.uniform(0, slack, 2))
    along = (near + start, 1 - far - (slack - end))
    first = 0.5 + rng.uniform(-_JITTER, _JITTER)
    second = np.clip(first + rng.uniform(-0.5, 0.5) * (along[1] - along[0]), 0.5 - _JITTER, 0.5 + _JITTER)
    across = (first, second)
    if rng.integers(2):  # the first object is as often right of or below the second
        along = (1 - along[0], 1 - along[1])
    places = zip(along, across, strict=True) if rng.integers(2) else zip(across, along, strict=True)
    return [(snap(x), snap(y)) for x, y in places]
