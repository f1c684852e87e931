"""Batches on their way from the data to the devices."""

import collections
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from dalle2_jax.training.sharding import shard_batch
from dalle2_jax.types import Batch

PREFETCH = 2
"""Batches on the devices in addition to the one in use."""


class Stream(Protocol):
    """An infinite iterator over this process's rows of global batches, with a small state."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Prefetched(NamedTuple):
    """A batch on the devices.

    Attributes:
      batch: its arrays.
      state: the stream's state after this batch.
      waited: seconds that the host waited for the stream.
    """

    batch: Batch
    state: dict[str, Any]
    waited: float


def prefetched(stream: Stream, mesh: Mesh) -> Iterator[Prefetched]:
    """Yields the stream's batches, `PREFETCH` of them ahead of their use."""
    queue: collections.deque[tuple[Batch, dict[str, Any]]] = collections.deque()
    while True:
        waited = 0.0
        while len(queue) <= PREFETCH:
            start = time.perf_counter()
            rows = next(stream)
            waited += time.perf_counter() - start
            queue.append((shard_batch(rows, mesh), stream.get_state()))
        batch, state = queue.popleft()
        yield Prefetched(batch, state, waited)
