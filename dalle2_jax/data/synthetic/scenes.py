"""What an image of shapes shows: the words that drawing, captions and reading share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SceneObject:
    """One object; (x, y) is its centre as a fraction of the side, y downwards.

    ``colour`` is a name, or "#rrggbb" for a colour that has none: captions leave it out.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def has_named_colour(self) -> bool:
        """Whether captions name the colour."""
        return not self.colour.startswith("#")

    @property
    def named_colour(self) -> str | None:
        """The colour, None if it has no name."""
        return self.colour if self.has_named_colour else None

    @property
    def look(self) -> tuple[str, str, str]:
        """Colour, shape and size: the object without its place."""
        return self.colour, self.shape, self.size


@dataclass(frozen=True)
class Scene:
    """One or two objects on a plain background (a reader may find none, or more than two)."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def relation(self) -> str | None:
        """Where the first object is relative to the second: left, right, above, below; None unless there are two."""
        return relation_of(*self.objects) if len(self.objects) == 2 else None

    @property
    def attributes(self) -> tuple:
        """Everything that a full caption names: the scene without the places. Equal for indistinguishable scenes."""
        objects = tuple((thing.size, thing.named_colour, thing.shape) for thing in self.objects)
        return (*objects, self.relation, self.background)


def relation_of(first: SceneObject, second: SceneObject) -> str:
    """Returns where ``first`` is relative to ``second``, along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"
