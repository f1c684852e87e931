"""The generated data set: captioned scenes of plain shapes, rendered from an index, without files.

A scene has one or two objects on a plain background. An object has a shape, one of eight named
colours, a size and a place; the first of two objects has a relation to the second (left, right,
above, below). Places lie on a lattice of 1/512 of the side. All randomness of scene ``i`` of a
split comes from (seed, split, i), so the data set is random access and the same everywhere.

Splits
    ``compositional`` shows only the pairs of colour and shape in `HELD_OUT_PAIRS`, the other splits never. ``val``
    shows only the looks (colour, shape and size) in `HELD_OUT_LOOKS`, which ``train`` never does, and its captions
    follow templates that are not those of ``train``; so none of its scenes and captions occur in ``train``. Each
    colour, shape and size is held out at least once, and occurs in ``train``. A colour without a name
    (``unnamed_colours``) may be close to a named one, so that images of ``train`` can resemble held-out ones.

Images are rendered with `dalle2_jax.data.synthetic.polygons`, anti-aliased: an image at 64x64 averaged over 2x2 is the
image at 32x32, to the rounding of a byte.

Captions are made by `dalle2_jax.data.synthetic.grammar`; they always name shape and size, the colour if it has a name,
and the relation where there is one, and half of them name the background.
"""

import operator
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

import grain
import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.sources import DESCRIPTIVE, Generators, Indices, Source, checked_indices, objects
from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.polygons import EXTENT, SHAPES, coverage
from dalle2_jax.data.synthetic.scenes import Scene, SceneObject
from dalle2_jax.errors import UserError

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
SIZES: dict[str, float] = {"small": 0.13, "large": 0.215}
"""Radius of one of two objects, as a fraction of the image's side. A single object is larger: see `radius_of`."""
HELD_OUT_PAIRS = frozenset(
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
"""Colour and shape of the objects of ``compositional``."""
HELD_OUT_LOOKS = frozenset(
    {
        ("red", "square", "small"),
        ("orange", "circle", "large"),
        ("yellow", "star", "small"),
        ("green", "triangle", "large"),
        ("cyan", "square", "large"),
        ("blue", "cross", "small"),
        ("purple", "star", "large"),
        ("pink", "circle", "small"),
    }
)
"""Colour, shape and size of the objects of ``val``."""
SPLITS = ("train", "val", "compositional")

_LATTICE = 512  # places are multiples of 1/512 of the side, so that coverage patches can be cached
_MARGIN, _GAP, _JITTER = 0.02, 0.05, 0.2  # to the edge, between two objects, about the centre; in sides
_CLEAR = 100.0  # levels of RGB between a colour without a name and the background
_SINGLE = 1.4  # a small star of 2 * 0.13 * 32 pixels would be little more than a blot


def radius_of(size: str, count: int) -> float:
    """Returns the radius of an object in a scene of ``count`` objects, as a fraction of the side."""
    return SIZES[size] * (_SINGLE if count == 1 else 1.0)


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a scene as ``uint8[resolution, resolution, 3]``, anti-aliased."""
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        radius = radius_of(thing.size, len(scene.objects))
        patch, top, left = coverage(thing.shape, radius, thing.x, thing.y, resolution)
        below, right = top + patch.shape[0], left + patch.shape[1]
        rows, columns = slice(max(top, 0), below), slice(max(left, 0), right)
        seen = patch[rows.start - top : resolution - top, columns.start - left : resolution - left, None]
        under = image[rows, columns].astype(np.float32)
        ink = np.array(_rgb(thing), np.float32)
        image[rows, columns] = np.rint(under + seen * (ink - under)).astype(np.uint8)
    return image


def _rgb(thing: SceneObject) -> tuple[int, ...]:
    return COLOURS[thing.colour] if thing.has_named_colour else tuple(bytes.fromhex(thing.colour[1:]))


class ShapesSource(Source):
    """Random access to a split of the data set; example i is the same at every resolution but for its pixels.

    Args:
        split: ``train``, ``val`` or ``compositional``.
        resolution: side of the images, at least 8.
        seed: another seed is another data set.
        max_objects: 2 for scenes with one or two objects, half of each, or 1.
        jitter: how far objects stand from the places that they have at jitter 0, at most, in sides; 0 to 0.2. At 0 a
            single object is in the centre, and two are level, a third of the free space apart. Objects stay clear of
            the edge and of each other.
        num_examples: how many scenes the split has; scene i does not depend on it.
        unnamed_colours: fraction of the scenes of ``train`` whose objects have any colours of RGB, which captions leave
            out. With few named colours an image encoder learns each shape in each of them, and does not recognise
            pairs of colour and shape that it has not seen; with these it learns shapes.
        hard_negatives: whether the scenes of two objects of ``train`` come in fours: a scene, its mirror image, and
            both again with colours exchanged (or shapes, where a colour would be held out or the colours are equal).
            `order` keeps the four together. Captions of the four have nearly the same words, so that a contrastive
            loss must learn which word belongs to which object; without them CLIP learns a bag of words (Yuksekgonul et
            al. 2023, arXiv 2210.01936, section 4). Needs max_objects=2, and num_examples a multiple of 4.

    Raises:
        UserError: on any other value.
    """

    def __init__(
        self,
        split: str,
        resolution: int,
        seed: int = 0,
        max_objects: int = 2,
        num_examples: int = 50_000,
        jitter: float = _JITTER,
        unnamed_colours: float = 0.0,
        hard_negatives: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"shapes has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if max_objects not in (1, 2):
            raise UserError(f"shapes draws 1 or 2 objects, got max_objects={max_objects}")
        if not 0 <= jitter <= _JITTER:
            raise UserError(f"shapes moves objects by 0 to {_JITTER} of the side, got jitter={jitter}")
        if resolution < 8:
            raise UserError(f"shapes cannot be distinguished at resolution {resolution}: use 8 or more")
        if not 0 <= seed < 2**64:
            raise UserError(f"the seed of shapes must be from 0 to 2**64 - 1, got {seed}")
        if not 0 <= unnamed_colours <= 1:
            raise UserError(f"unnamed_colours of shapes is a fraction from 0 to 1, got {unnamed_colours}")
        if num_examples < 1:
            raise UserError(f"num_examples of shapes must be at least 1, got {num_examples}")
        if hard_negatives and (max_objects == 1 or num_examples % 4):
            got = f"max_objects={max_objects}, num_examples={num_examples}"
            raise UserError(f"hard_negatives of shapes need two objects, and a multiple of 4 examples: got {got}")
        self.columns = ("image", *DESCRIPTIVE)
        self.split, self.resolution, self.seed = split, resolution, seed
        self.max_objects, self.num_examples, self.jitter = max_objects, num_examples, jitter
        self.unnamed_colours = unnamed_colours if split == "train" else 0.0
        self.hard_negatives = hard_negatives and split == "train"

    def __len__(self) -> int:
        return self.num_examples

    def __repr__(self) -> str:
        return (
            f"ShapesSource({self.split!r}, {self.resolution}, seed={self.seed}, "
            f"max_objects={self.max_objects}, num_examples={self.num_examples}, jitter={self.jitter}, "
            f"unnamed_colours={self.unnamed_colours}, hard_negatives={self.hard_negatives})"
        )

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch. With ``rngs`` an example's caption is a random paraphrase, else the fixed one."""
        places = checked_indices(indices, len(self)).tolist()
        scenes = [self.scene(place) for place in places]
        if rngs is None:
            captions = [self.caption(place) for place in places]
        else:  # even if not selected, so that a generator's next numbers do not depend on the columns
            captions = [grammar.caption(scene, rng, self.held_out) for scene, rng in zip(scenes, rngs, strict=True)]
        columns = {
            "image": lambda: np.stack([render(scene, self.resolution) for scene in scenes]),
            "caption": lambda: objects(captions),
            "captions": lambda: objects([grammar.captions(scene, self.held_out) for scene in scenes]),
            "key": lambda: objects([str(place) for place in places]),
            "substitute": lambda: np.zeros(len(places), bool),
        }
        return {name: columns[name]() for name in self.columns}

    def captions(self, limit: int) -> Iterator[str]:
        """Yields one caption of each of the first ``limit`` scenes."""
        for index in range(min(limit, len(self))):
            yield self.caption(index)

    def caption(self, index: int) -> str:
        """Returns the one caption by which a scene is known in evaluations, always the same."""
        return self._fixed_caption(self.scene(index), index)

    def contrasts(self, index: int) -> dict[str, str]:
        """Returns captions that are false of scene ``index`` and have the words of its `caption`, by what is exchanged.

        Of two objects the "colour", "shape" or "size" is exchanged, where they differ in it, or the "place", so that
        the relation is reversed. There are none for a single object, and for two that look alike.
        """
        scene = self.scene(index)
        if len({thing.look for thing in scene.objects}) == 1:
            return {}
        others = {field: _with_exchanged(scene, field) for field in ("colour", "shape", "size")}
        others["place"] = _mirrored(scene)
        own = self._fixed_caption(scene, index)
        found = {name: self._fixed_caption(other, index) for name, other in others.items()}
        return {name: text for name, text in found.items() if text != own}

    @property
    def held_out(self) -> bool:
        """Whether captions follow the templates of ``val``."""
        return self.split == "val"

    def scene(self, index: int) -> Scene:
        """Returns scene ``index``; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        index = int(index) % len(self)
        rng = self._rng(index, 0)
        scene = self._scene(rng)
        if self.hard_negatives:
            member = index % 4
            scene = _hard_negative(self._scene(self._rng(index - member, 0)), member, _LOOKS[self.split]) or scene
        return _recoloured(scene, rng) if rng.random() < self.unnamed_colours else scene

    def order(self, seed: int) -> grain.MapDataset:
        """Returns an endless data set of indices; with ``hard_negatives`` the four that belong together follow one
        another."""
        if not self.hard_negatives:
            return super().order(seed)
        firsts = grain.MapDataset.range(0, len(self), 4).seed(seed).shuffle().repeat()
        return grain.MapDataset.mix([firsts.map(partial(operator.add, member)) for member in range(4)])

    def _fixed_caption(self, scene: Scene, index: int) -> str:
        """Returns the caption of a scene by the template and the words that are always those of scene ``index``."""
        return grammar.caption(scene, self._rng(index % len(self), 1), self.held_out)

    def _scene(self, rng: np.random.Generator) -> Scene:
        return _random_scene(rng, _LOOKS[self.split], self.max_objects, self.jitter)

    def _rng(self, index: int, use: int) -> np.random.Generator:
        # A Philox key takes two words and a counter four: no hashing, so it is quick to make.
        return np.random.Generator(
            np.random.Philox(key=[self.seed, SPLITS.index(self.split)], counter=[0, 0, use, index])
        )


def _split_of(colour: str, shape: str, size: str) -> str:
    if (colour, shape) in HELD_OUT_PAIRS:
        return "compositional"
    return "val" if (colour, shape, size) in HELD_OUT_LOOKS else "train"


_EVERY_LOOK = tuple((colour, shape, size) for colour in COLOURS for shape in SHAPES for size in SIZES)
_LOOKS = {split: tuple(look for look in _EVERY_LOOK if _split_of(*look) == split) for split in SPLITS}


def _random_scene(
    rng: np.random.Generator, looks: tuple[tuple[str, str, str], ...], max_objects: int, jitter: float
) -> Scene:
    count = int(rng.integers(1, max_objects + 1))
    chosen = [looks[rng.integers(len(looks))] for _ in range(count)]
    backgrounds = tuple(BACKGROUNDS)
    background = backgrounds[rng.integers(len(backgrounds))]
    insets = [EXTENT * radius_of(size, count) + _MARGIN for _, _, size in chosen]
    places = (_place_one if count == 1 else _place_two)(rng, jitter, *insets)
    objects = tuple(
        SceneObject(shape, colour, size, x, y) for (colour, shape, size), (x, y) in zip(chosen, places, strict=True)
    )
    return Scene(objects, background)


def _hard_negative(scene: Scene, member: int, looks: Collection[tuple[str, str, str]]) -> Scene | None:
    """Returns a scene of two objects as member 0 to 3 of its four, mirrored if odd, else exchanged from 2; None where
    there is none."""
    if len(scene.objects) == 1:
        return None
    exchanged = _exchanged(scene, looks) if member >= 2 else scene
    return _mirrored(exchanged) if exchanged and member % 2 else exchanged


def _exchanged(scene: Scene, looks: Collection[tuple[str, str, str]]) -> Scene | None:
    """Returns the scene with the colours of its two objects exchanged, or their shapes; None if neither makes another
    scene of these looks."""
    for other in (_with_exchanged(scene, field) for field in ("colour", "shape")):
        if other != scene and all(thing.look in looks for thing in other.objects):
            return other
    return None


def _with_exchanged(scene: Scene, field: str) -> Scene:
    """Returns the scene in which each of two objects has the other's value of a field."""
    first, second = scene.objects
    own, other = getattr(first, field), getattr(second, field)
    return replace(scene, objects=(replace(first, **{field: other}), replace(second, **{field: own})))


def _mirrored(scene: Scene) -> Scene:
    """Returns the mirror image along the axis on which the two objects are further apart."""
    axis = "x" if scene.relation in ("left", "right") else "y"
    return replace(scene, objects=tuple(replace(thing, **{axis: 1 - getattr(thing, axis)}) for thing in scene.objects))


def _recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with objects in random colours that are clear of the background."""

    def colour() -> str:
        while True:
            rgb = rng.integers(0, 256, 3)
            if np.linalg.norm(rgb - np.array(BACKGROUNDS[scene.background])) > _CLEAR:
                return "#" + bytes(rgb.tolist()).hex()

    return Scene(tuple(replace(thing, colour=colour()) for thing in scene.objects), scene.background)


def snap(place: float) -> float:
    """Returns the place on the lattice that is nearest, in sides."""
    return round(place * _LATTICE) / _LATTICE


def _place_one(rng: np.random.Generator, jitter: float, inset: float) -> list[tuple[float, float]]:
    """Puts one object about the centre. An inset is how far a centre stays from the edge, in sides."""
    reach = min(jitter, 0.5 - inset)
    x, y = 0.5 + rng.uniform(-reach, reach, 2)
    return [(snap(x), snap(y))]


def _place_two(rng: np.random.Generator, jitter: float, near: float, far: float) -> list[tuple[float, float]]:
    """Puts two objects apart along one axis, and at most half as far along the other, in random order."""
    slack = max(0.0, 1 - 2 * near - 2 * far + 2 * _MARGIN - _GAP)
    spread = jitter / _JITTER
    mean = np.array([slack / 3, 2 * slack / 3])
    start, end = mean + spread * (np.sort(rng.uniform(0, slack, 2)) - mean)
    along = (near + start, 1 - far - (slack - end))
    first = 0.5 + rng.uniform(-jitter, jitter)
    tilt = spread * rng.uniform(-0.5, 0.5) * (along[1] - along[0])
    across = (first, np.clip(first + tilt, 0.5 - jitter, 0.5 + jitter))
    if rng.integers(2):  # the first object is as often right of or below the second
        along = (1 - along[0], 1 - along[1])
    places = zip(along, across, strict=True) if rng.integers(2) else zip(across, along, strict=True)
    return [(snap(x), snap(y)) for x, y in places]
