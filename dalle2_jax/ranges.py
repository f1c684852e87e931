"""Numeric types of config fields and command-line options, each with the range it accepts. Imports nothing heavy."""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any

MAX_INT = 2**31 - 1
"""The largest integer of a config: counts and sizes of arrays are int32."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a config field accepts, given as metadata of its type: ``Annotated[int, Range(min=1)]``.

    NaN and infinity are outside every range. ``sections.expand`` enforces the ranges of every config.
    """

    min: float = -math.inf
    max: float = math.inf
    exclusive_min: bool = False
    exclusive_max: bool = False
    also: tuple[float, ...] = ()  # single numbers outside min and max, as -1 for "all that are left"

    def __contains__(self, number: float) -> bool:
        if number in self.also:
            return True
        above = number > self.min if self.exclusive_min else number >= self.min
        below = number < self.max if self.exclusive_max else number <= self.max
        return above and below and (isinstance(number, int) or math.isfinite(number))

    def __str__(self) -> str:
        """Returns the range in words, as in "at least 1" or "from 0 to 1"."""
        inclusive = not (self.exclusive_min or self.exclusive_max)
        if inclusive and math.isfinite(self.min) and math.isfinite(self.max) and self.max != MAX_INT:
            return ", or ".join([f"from {self.min} to {self.max}", *map(str, self.also)])
        low = f"{'above' if self.exclusive_min else 'at least'} {self.min}"
        high = f"{'below' if self.exclusive_max else 'at most'} {self.max}"
        bounds = [word for word, bound in ((low, self.min), (high, self.max)) if math.isfinite(bound)]
        return ", or ".join([" and ".join(bounds) or "a finite number", *map(str, self.also)])


PositiveInt = Annotated[int, Range(1, MAX_INT)]


NonNegativeInt = Annotated[int, Range(0, MAX_INT)]


AnyFloat = Annotated[float, Range()]


PositiveFloat = Annotated[float, Range(0, exclusive_min=True)]


NonNegativeFloat = Annotated[float, Range(0)]


Fraction = Annotated[float, Range(0, 1)]


BelowOne = Annotated[float, Range(0, 1, exclusive_max=True)]


# Sizes that decide an allocation are bounded by about ten times the largest published model's.

Width = Annotated[int, Range(1, 65_536)]
"""Features or channels of a layer, or of an embedding."""


Depth = Annotated[int, Range(1, 1_000)]
"""Layers, blocks or heads."""


MlpRatio = Annotated[float, Range(0, 100, exclusive_min=True)]
"""Hidden units of a transformer's MLP over its width."""


Length = Annotated[int, Range(1, 65_536)]
"""Tokens of a sequence, or codes."""


Side = Annotated[int, Range(1, 16_384)]
"""Height and width of a square image, in pixels."""


VocabSize = Annotated[int, Range(1, 4_000_000)]
"""Tokens of a vocabulary, or classes."""


BatchSize = Annotated[int, Range(1, 1_000_000)]
"""Examples that are computed, or read, at a time."""


Seed = Annotated[int, Range(0, 2**32 - 1)]
"""Seed of a random key."""


DiffusionSteps = Annotated[int, Range(1, 100_000)]
"""Timesteps of a noise schedule, or steps of a sampler."""


GuidanceScale = Annotated[float, Range(-1_000, 1_000)]
"""Scale of classifier-free guidance: 1 is none."""


EmbeddingScale = Annotated[float, Range(0, 1_000_000, exclusive_min=True)]
"""Factor on CLIP embeddings."""


CalibrationExamples = Annotated[int, Range(2, 100_000_000)]
"""Training examples that a stage's statistics are estimated from; their embeddings are held in memory."""


def alternatives(hint: Any, within: Range | None = None) -> list[tuple[Any, Range | None]]:
    """Returns the types that a type hint allows, each with the range that an ``Annotated`` around it states."""
    if typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        return alternatives(inner, next((item for item in metadata if isinstance(item, Range)), within))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [found for option in typing.get_args(hint) for found in alternatives(option, within)]
    return [(hint, within)]
