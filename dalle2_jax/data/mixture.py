"""Mixtures: several data sets at once, each with a weight."""

import bisect
import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from dalle2_jax.data.sources import (
    Generators,
    Indices,
    Rejections,
    Source,
    checked_columns,
    checked_indices,
)
from dalle2_jax.errors import UserError
from dalle2_jax.types import Preprocessing


class MixtureSource(Source):
    """A `Source` of the examples of several sources.

    By index it is their union, with each example once: the sources take turns while they last, so that the first
    examples are of all of them. A stream reads it by weight instead (`order`): any stretch of it has the share of each
    source, so that a small source with a large weight is repeated more often.

    Args:
        parts: name to (source, weight).

    Raises:
        UserError: there are no parts, a source is empty, or a weight is not positive.
    """

    def __init__(self, parts: Mapping[str, tuple[Source, float]]) -> None:
        if not parts:
            raise UserError("a mixture has no parts: name data sets in config.data.parts")
        for name, (source, weight) in parts.items():
            if not len(source):
                raise UserError(f"part {name} of the mixture, {source}, has no examples")
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise UserError(f"the weight of part {name} must be a positive number, got {weight!r}")
        self.parts = {name: source for name, (source, _) in parts.items()}
        self.weights = {name: float(weight) for name, (_, weight) in parts.items()}
        self._names = sorted(self.parts, key=lambda name: len(self.parts[name]))
        shared = [{*part.columns} for part in self.parts.values()]
        self.columns = tuple(name for name in self.parts[self._names[0]].columns if all(name in one for one in shared))
        self._turns = _Turns(tuple(len(self.parts[name]) for name in self._names))

    def __len__(self) -> int:
        return sum(self._turns.counts)

    def __repr__(self) -> str:
        return f"MixtureSource({', '.join(f'{self.weights[name]:g} x {part}' for name, part in self.parts.items())})"

    @property
    def rejections(self) -> Rejections:
        """The records rejected so far, each name and cause after the name of its part."""
        found = {name: part.rejections for name, part in self.parts.items()}
        return Rejections(
            at_opening={f"{name}: {cause}": n for name, one in found.items() for cause, n in one.at_opening.items()},
            records=_prefixed({name: one.records for name, one in found.items()}),
            flawed=_prefixed({name: one.flawed for name, one in found.items()}),
        )

    def select(self, inputs: Sequence[str]) -> "MixtureSource":
        """Returns a mixture of these columns. MissingColumnsError if one of the parts does not have them."""
        selected = copy.copy(self)
        selected.columns = checked_columns(self, inputs)
        selected.parts = {name: part.select(inputs) for name, part in self.parts.items()}
        return selected

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch, each example from the part whose turn it is."""
        turns = [self._turns.find(index) for index in checked_indices(indices, len(self)).tolist()]
        ranks = np.array([rank for rank, _ in turns])
        columns: dict[str, np.ndarray] = {}
        for rank in np.unique(ranks).tolist():
            rows = np.flatnonzero(ranks == rank)
            own = [turns[row][1] for row in rows.tolist()]
            found = self.parts[self._names[rank]].fetch(own, rngs and [rngs[row] for row in rows.tolist()])
            for name in self.columns:
                shape = (len(turns), *found[name].shape[1:])
                columns.setdefault(name, np.empty(shape, found[name].dtype))[rows] = found[name]
        return columns

    def preprocessed(self, how: Preprocessing) -> "MixtureSource":
        """Returns the mixture with the images of its parts resized and cropped as a CLIP reads them."""
        source = copy.copy(self)
        source.parts = {name: part.preprocessed(how) for name, part in self.parts.items()}
        return source

    def captions(self, limit: int) -> Iterator[str]:
        """Yields captions of at most ``limit`` examples, from each source in proportion to its weight."""
        total = sum(self.weights.values())
        for name, part in self.parts.items():
            yield from part.captions(int(limit * self.weights[name] / total))

    def order(self, seed: int) -> grain.MapDataset:
        """Returns an endless data set of indices in which each source has the share of its weight.

        The weights alone determine the source of a position. Each pass over a source has its own order, which depends
        on ``seed`` and the name of the source.
        """
        orders = []
        for name, part in self.parts.items():
            own = grain.MapDataset.range(len(part)).seed(zlib.crc32(f"{seed} {name}".encode())).shuffle().repeat()
            orders.append(own.map(partial(self._turns.index_of, self._names.index(name))))
        return grain.MapDataset.mix(orders, list(self.weights.values())).seed(seed)


def _prefixed(found: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns the records of all parts, each name and cause after the name of its part."""
    return {f"{part}: {key}": f"{part}: {cause}" for part, one in found.items() for key, cause in one.items()}


@dataclass(frozen=True)
class _Turns:
    """Sets of examples, smallest first, that take turns in one numbering; a set that is used up is skipped."""

    counts: tuple[int, ...]

    def _before(self, used_up: int) -> tuple[int, int]:
        """Returns the rounds until ``used_up`` sets are used up, and the turns in these rounds."""
        rounds = self.counts[used_up - 1] if used_up else 0
        return rounds, sum(self.counts[:used_up]) + rounds * (len(self.counts) - used_up)

    def find(self, index: int) -> tuple[int, int]:
        """Returns the set whose turn ``index`` is, and the number of the example in it."""
        used_up = sum(self._before(k)[1] <= index for k in range(1, len(self.counts)))
        rounds, turns = self._before(used_up)
        more, place = divmod(index - turns, len(self.counts) - used_up)
        return used_up + place, rounds + more

    def index_of(self, rank: int, own: int) -> int:
        """Returns the turn of an example; the inverse of `find`."""
        used_up = bisect.bisect_right(self.counts, own)
        rounds, turns = self._before(used_up)
        return turns + (own - rounds) * (len(self.counts) - used_up) + rank - used_up
