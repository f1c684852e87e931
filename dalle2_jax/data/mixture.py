"""Several data sets at once, each with its weight."""

import bisect
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np
from jaxtyping import UInt8

from dalle2_jax.types import UserError


class MixtureSource:
    """A `Source` of the examples of several sources.

    As a set it is their union, each example once: the sources take turns as long as they last, so that the first
    examples are of all of them. A stream does not read it so but by weight, as `order` says: in any stretch of it a
    source has its share, and a small one with a large weight is passed through more often.

    Args:
        parts: name to (source, weight).

    Raises:
        UserError: when there are no parts, a source is empty, or a weight is not positive.
    """

    def __init__(self, parts: Mapping[str, tuple]) -> None:
        if not parts:
            raise UserError("a mixture has no parts: name data sets in config.data.parts")
        for name, (source, weight) in parts.items():
            if not len(source):
                raise UserError(f"part {name} of the mixture, {source}, has no examples")
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise UserError(f"the weight of part {name} must be a positive number, not {weight!r}")
        self.parts = {name: source for name, (source, _) in parts.items()}
        self.weights = {name: float(weight) for name, (_, weight) in parts.items()}
        self._names = sorted(self.parts, key=lambda name: len(self.parts[name]))
        self._turns = _Turns(tuple(len(self.parts[name]) for name in self._names))

    def __len__(self) -> int:
        return sum(self._turns.counts)

    def __repr__(self) -> str:
        return f"MixtureSource({', '.join(f'{self.weights[name]:g} x {part}' for name, part in self.parts.items())})"

    @property
    def rejected(self) -> Counter[str]:
        """How many records were refused, by part and cause."""
        refused = {name: getattr(part, "rejected", {}) for name, part in self.parts.items()}
        counts = {(name, cause): count for name, causes in refused.items() for cause, count in causes.items()}
        return +Counter({f"{name}: {cause}": count for (name, cause), count in counts.items()})

    def refusals(self) -> dict[str, str]:
        """Returns why each record was refused since the opening, by part and name."""
        told = {name: getattr(part, "refusals", dict)() for name, part in self.parts.items()}
        return {f"{name}: {place}": f"{name}: {cause}" for name, one in told.items() for place, cause in one.items()}

    def __getitem__(self, index: int) -> dict:
        """Returns the example of the source whose turn it is."""
        source, own = self._find(index)
        return source[own]

    def draw(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Draws the example of the source whose turn it is."""
        source, own = self._find(index)
        return source.draw(own, rng)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields captions of at most ``limit`` examples, of each source by its weight as far as it has them."""
        total = sum(self.weights.values())
        for name, part in self.parts.items():
            yield from part.captions(int(limit * self.weights[name] / total))

    def order(self, seed: int) -> grain.MapDataset:
        """Returns an endless data set of indices in which each source has the share of its weight.

        Which source a position draws from follows from the weights alone; each is shuffled anew each time it is
        passed through, by ``seed`` and its name.
        """
        orders = []
        for name, part in self.parts.items():
            own = grain.MapDataset.range(len(part)).seed(zlib.crc32(f"{seed} {name}".encode())).shuffle().repeat()
            orders.append(own.map(partial(self._turns.index_of, self._names.index(name))))
        return grain.MapDataset.mix(orders, list(self.weights.values())).seed(seed)

    def _find(self, index: int) -> tuple:
        """The source whose turn ``index`` is, and the example's index in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        rank, own = self._turns.find(index % len(self))
        return self.parts[self._names[rank]], own


@dataclass(frozen=True)
class _Turns:
    """Sets of examples, smallest first, that take turns in one numbering; those used up are left out."""

    counts: tuple[int, ...]

    def _before(self, used_up: int) -> tuple[int, int]:
        """Rounds until so many sets are used up, and the turns in them."""
        rounds = self.counts[used_up - 1] if used_up else 0
        return rounds, sum(self.counts[:used_up]) + rounds * (len(self.counts) - used_up)

    def find(self, index: int) -> tuple[int, int]:
        """Returns whose turn it is, and the number in that set."""
        used_up = sum(self._before(k)[1] <= index for k in range(1, len(self.counts)))
        rounds, turns = self._before(used_up)
        more, place = divmod(index - turns, len(self.counts) - used_up)
        return used_up + place, rounds + more

    def index_of(self, rank: int, own: int) -> int:
        """Returns the turn of an example; the inverse of `find`."""
        used_up = bisect.bisect_right(self.counts, own)
        rounds, turns = self._before(used_up)
        return turns + (own - rounds) * (len(self.counts) - used_up) + rank - used_up
