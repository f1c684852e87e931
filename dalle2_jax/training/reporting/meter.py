"""Measures a run without waiting for the devices: metrics since the last logged step, rate, and time lost to data."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from dalle2_jax.types import Metrics

AHEAD = 2
"""Steps that are queued on the devices behind the one that they compute: enough that they never idle, and few enough
that the host does not use up the prefetched batches after each logged step."""

History = list[tuple[int, Metrics]]
"""(step, metrics on the devices), in order."""


def idle(history: History) -> bool:
    """Returns whether the devices have computed all steps that were dispatched."""
    newest: list[Any] = jax.tree.leaves(history[-1][1]) if history else []  # JAX's type stubs lack is_ready
    return all(value.is_ready() for value in newest)


class Meter:
    """Collects the metrics of dispatched steps and measures the time they take.

    The first step compiles, so that time is measured from its end.

    Args:
      batch_size: examples per step.
      step: the last finished step.

    Attributes:
      finished: the last step that the devices are known to have finished.
    """

    def __init__(self, batch_size: int, step: int):
        self.finished = step
        self._batch_size = batch_size
        self._history: History = []
        self._clock: float | None = None
        self._timed_from, self._waited = step, 0.0

    @property
    def started(self) -> bool:
        """Whether a step is finished."""
        return self._clock is not None

    def count_wait(self, seconds: float) -> None:
        """Counts time that the host waited for data, unless the devices had steps to compute meanwhile."""
        self._waited += seconds if idle(self._history) else 0.0

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds a dispatched step; waits until the devices are at most `AHEAD` steps behind."""
        self._history.append((step, metrics))
        if len(self._history) > AHEAD:
            done, values = self._history[-1 - AHEAD]
            jax.block_until_ready(values)
            self.finished = done
        if not self.started:
            jax.block_until_ready(metrics)
            self._restart(step)

    def unread(self) -> History:
        """Returns (step, metrics) of the steps since `rates`, on the host; waits for the devices."""
        return jax.device_get(self._history)

    def rates(self, step: int) -> dict[str, float]:
        """Returns the rate since the last call, and starts to measure again.

        Returns:
          "examples_per_second", and "data_wait": the share of the time in which the devices waited for data.
        """
        assert self._clock is not None
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        rate = (step - self._timed_from) * self._batch_size / seconds
        share = self._waited / seconds
        self._history = []
        self._restart(step)
        return {"examples_per_second": rate, "data_wait": share}

    @contextlib.contextmanager
    def paused(self, metrics: Metrics) -> Iterator[None]:
        """Excludes the time of a block, after the steps up to ``metrics`` are finished."""
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start

    def _restart(self, step: int) -> None:
        self._clock, self._timed_from, self._waited, self.finished = time.perf_counter(), step, 0.0, step
