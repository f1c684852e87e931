"""Which rows run next: start-time fair queueing between owners, and batches of rows that wait for the same step.

Goyal, Vin and Cheng 1996, "Start-time Fair Queuing", with a row as the unit of service. Row i of an owner's requests
has the start tag

    S_i = max(V, S_{i-1} + 1)                                                                 (1)

where V, the virtual time, is the tag of the row that was started last. Rows run in the order of their tags: an owner
who submits a hundred rows at once is served between the rows of all others, and idle time is not saved up. A row keeps
its tag through all of its steps.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

MIN_FILL = 0.75
"""Share of a batch's size that must be rows and no padding, where a smaller size can be filled instead."""

MAX_PASSES = 4
"""Batches of other steps that run while the row with the smallest tag waits; then its step is next.

Of steps of single items, as many as a batch has rows count as one: when a batch ends, its clients' next requests arrive
together, and a row that waits for them is in a full batch after that."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What an item waits for.

    Attributes:
      group: items whose groups are equal may be in one batch.
      rank: position among the steps of an item: 0 is its first.
      batched: whether several items may run at once.
    """

    group: Hashable
    rank: int
    batched: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """An image on its way, between two steps; or a request before it is split into images.

    Attributes:
      step: what it waits for.
      state: the runner's own.
      position: of the image among those of its request.
    """

    step: Step
    state: Any
    position: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """An item that has passed all steps: the result at a position of its request."""

    value: Any
    position: int = 0


@dataclasses.dataclass(eq=False)
class Entry:
    """An item in the queue, with its request ``ticket`` and its start tag, eq. (1)."""

    ticket: Any
    item: Item
    tag: float
    serial: int
    passes: float = 0.0

    @property
    def order(self) -> tuple[float, int]:
        """What entries are sorted by."""
        return self.tag, self.serial


def _count(waiting: int, sizes: Sequence[int]) -> int:
    """Returns how many of the waiting rows the next batch takes."""
    padded = min((size for size in sizes if size >= waiting), default=max(sizes))
    filled = max((size for size in sizes if size <= waiting), default=waiting)
    return min(waiting, padded) if waiting >= MIN_FILL * padded else filled


class FairQueue:
    """Items that wait, by step. Not safe for threads: the engine locks it."""

    def __init__(self) -> None:
        self._waiting: dict[Step, list[Entry]] = {}
        self._last: dict[str, float] = {}
        self._virtual = 0.0
        self._serial = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def admit(self, owner: str, rows: int) -> float:
        """Returns the tag of the first of an owner's ``rows`` new rows; those of the others follow by one each."""
        first = max(self._virtual, self._last.get(owner, 0.0) + 1)
        self._last = {name: tag for name, tag in self._last.items() if tag >= self._virtual}
        self._last[owner] = first + rows - 1
        return first

    def add(self, ticket: Any, items: Iterable[Item], first_tag: float) -> None:
        """Adds items of a request whose first row has the tag ``first_tag``."""
        for item in items:
            self._serial += 1
            entry = Entry(ticket, item, first_tag + item.position, self._serial)
            self._waiting.setdefault(item.step, []).append(entry)

    def discard(self, unwanted: Any) -> list[Entry]:
        """Removes and returns the entries for which ``unwanted(entry)``."""
        removed = [entry for entries in self._waiting.values() for entry in entries if unwanted(entry)]
        gone = set(map(id, removed))
        kept = {step: [e for e in entries if id(e) not in gone] for step, entries in self._waiting.items()}
        self._waiting = {step: entries for step, entries in kept.items() if entries}
        return removed

    def take(self, sizes: Sequence[int]) -> list[Entry]:
        """Removes and returns the entries of the next batch; none of an empty queue.

        A batch is padded to the next of ``sizes``, and is not larger than the largest. Rows that would fill less than
        `MIN_FILL` of one fill a smaller one, and the rest wait.

        Of the steps that can fill a batch, the latest is run: it finishes images and frees memory. If none can, the
        earliest is: its rows then join those that wait for the next step, so that batches are as full as possible.
        A row with the smallest tag of all waits for at most `MAX_PASSES` batches.
        """
        if not self._waiting:
            return []
        oldest = min((entry for entries in self._waiting.values() for entry in entries), key=lambda e: e.order)
        step = oldest.item.step if oldest.passes >= MAX_PASSES else self._choose(max(sizes))
        entries = sorted(self._waiting.pop(step), key=lambda entry: entry.order)
        count = _count(len(entries), sizes) if step.batched else 1
        batch, rest = entries[:count], entries[count:]
        if rest:
            self._waiting[step] = rest
        if oldest not in batch:
            oldest.passes += 1 if step.batched else 1 / max(sizes)
        self._virtual = max(self._virtual, batch[-1].tag)
        return batch

    def _choose(self, limit: int) -> Step:
        first = {step: min(entry.order for entry in entries) for step, entries in self._waiting.items()}
        full = [step for step, entries in self._waiting.items() if len(entries) >= (limit if step.batched else 1)]
        if full:
            return min(full, key=lambda step: (-step.rank, first[step]))
        return min(first, key=lambda step: (step.rank, first[step]))
