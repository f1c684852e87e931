"""Which records of a data set are wanted, by what they say of themselves."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dalle2_jax.types import UserError


@dataclass(frozen=True)
class Filters:
    """Conditions on pictures and on their fields; a record that lacks a field named here is not wanted.

    Attributes:
        min_width, min_height: least size of the stored picture, in pixels.
        max_aspect: the longer side over the shorter at most.
        ranges: field to (least, greatest), either of which may be None: ``{"pwatermark": (None, 0.8)}``.
        equals: field to its value, or to a tuple of those that will do: ``{"LANGUAGE": ("en", "de")}``.

    Raises:
        UserError: a bound that no picture can meet, or a range that is not a pair of numbers.
    """

    min_width: int = 0
    min_height: int = 0
    max_aspect: float | None = None
    ranges: Mapping[str, Any] | tuple = ()
    equals: Mapping[str, Any] | tuple = ()

    def __post_init__(self) -> None:
        for name in ("ranges", "equals"):  # as pairs, so that a configuration can be hashed
            pairs = sorted(dict(getattr(self, name)).items())
            pairs = tuple((field, tuple(value) if isinstance(value, list) else value) for field, value in pairs)
            object.__setattr__(self, name, pairs)
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(f"max_aspect is the longer side over the shorter, so at least 1, not {self.max_aspect}")
        for field, bounds in self.ranges:
            pair = isinstance(bounds, tuple) and len(bounds) == 2
            if not pair or not all(bound is None or _is_number(bound) for bound in bounds):
                raise UserError(f"ranges: {field} must be a pair (least, greatest) of numbers or None, not {bounds!r}")

    def want_fields(self, fields: Mapping[str, Any]) -> bool:
        """Whether a record is wanted by its fields; ``width`` and ``height``, where they are, count as its size."""
        for field, (least, greatest) in self.ranges:
            value = _number(fields.get(field))
            if value is None:
                return False
            if not (least is None or value >= least) or not (greatest is None or value <= greatest):
                return False
        for field, wanted in self.equals:
            if field not in fields or fields[field] not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                return False
        height, width = fields.get("height"), fields.get("width")
        return not (_is_number(height) and _is_number(width)) or self.want_size(height, width)

    def want_size(self, height: int, width: int) -> bool:
        """Whether a picture of that size is wanted."""
        if width < self.min_width or height < self.min_height:
            return False
        return self.max_aspect is None or max(height, width) <= self.max_aspect * min(height, width)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def _number(value: object) -> numbers.Real | None:
    """The number that a field is; a table's fields are strings."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if _is_number(value) else None
