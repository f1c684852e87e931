"""Filters: which records of a data set are used, by their size and their fields."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard

from dalle2_jax.errors import UserError, shown
from dalle2_jax.ranges import NonNegativeInt, Range


def as_pairs(name: str, fields: Mapping[str, Any] | tuple) -> tuple[tuple[str, Any], ...]:
    """Returns the pairs of a mapping, or of pairs, in the order of their names. UserError for anything else."""
    try:
        return tuple(sorted(dict(fields).items(), key=lambda pair: str(pair[0])))
    except (TypeError, ValueError):
        raise UserError(f"{name} must map names to values, got {shown(fields)}") from None


@dataclass(frozen=True)
class Filters:
    """Conditions on images and on their fields; a record that lacks a field named here is excluded.

    Attributes:
        min_width, min_height: minimum size of the stored image, in pixels.
        max_aspect: maximum ratio of the longer side to the shorter.
        ranges: field to (min, max), either of which may be None: ``{"pwatermark": (None, 0.8)}``.
        equals: field to its value, or to a tuple of accepted values: ``{"LANGUAGE": ("en", "de")}``.

    Raises:
        UserError: a bound that no image can meet, or a range that is not a pair of numbers.
    """

    min_width: NonNegativeInt = 0
    min_height: NonNegativeInt = 0
    max_aspect: Annotated[float, Range(1)] | None = None
    ranges: Mapping[str, Any] | tuple = ()
    equals: Mapping[str, Any] | tuple = ()

    def __post_init__(self) -> None:
        for name in ("ranges", "equals"):  # as pairs, so that a configuration can be hashed
            pairs = as_pairs(name, getattr(self, name))
            pairs = tuple((field, tuple(value) if isinstance(value, list) else value) for field, value in pairs)
            object.__setattr__(self, name, pairs)
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(f"max_aspect is the longer side over the shorter, so at least 1, got {self.max_aspect}")
        for field, bounds in dict(self.ranges).items():
            pair = isinstance(bounds, tuple) and len(bounds) == 2
            if not pair or not all(bound is None or _is_number(bound) for bound in bounds):
                raise UserError(f"ranges: {field} must be a pair (min, max) of numbers or None, got {bounds!r}")

    def accept_fields(self, fields: Mapping[str, Any]) -> bool:
        """Returns whether the fields of a record are accepted; ``width`` and ``height`` are its size, if present."""
        for field, (low, high) in dict(self.ranges).items():
            value = _number(fields.get(field))
            if value is None:
                return False
            if not (low is None or value >= low) or not (high is None or value <= high):
                return False
        for field, value in dict(self.equals).items():
            if field not in fields or fields[field] not in (value if isinstance(value, tuple) else (value,)):
                return False
        height, width = fields.get("height"), fields.get("width")
        return not (_is_number(height) and _is_number(width)) or self.accept_size(height, width)

    def accept_size(self, height: float, width: float) -> bool:
        """Returns whether the size of an image is accepted."""
        if width < self.min_width or height < self.min_height:
            return False
        return self.max_aspect is None or max(height, width) <= self.max_aspect * min(height, width)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def _number(value: object) -> float | None:
    """Returns a field as a number, None if it is none; the fields of a table are strings."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if _is_number(value) else None
