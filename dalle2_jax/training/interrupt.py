"""SIGINT and SIGTERM during training: the loop finishes its step, writes a checkpoint and ends."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dalle2_jax import signals
from dalle2_jax.errors import Interrupted

Item = TypeVar("Item")


class Stopped(Exception):
    """A signal arrived while the loop waited for a batch."""


class Interrupt:
    """Records SIGINT and SIGTERM in place of raising an exception. A context manager.

    Attributes:
      requested: the signal that arrived, 0 for none.
      patient: whether the loop may take as long as it needs to end, because a step is done that may need saving. Until
        then a signal ends the process within seconds, even while it compiles.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.patient = False
        self._waiting = False
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        self._installed.enter_context(signals.handled(self._record, lambda: self.patient))
        return self

    def __exit__(self, *_: Any) -> None:
        self._installed.close()

    def _record(self, number: int) -> None:
        self.requested = number
        if self._waiting and jax.process_count() == 1:
            raise Stopped

    def next(self, items: Iterator[Item]) -> Item:
        """Returns the next item. Raises `Stopped` as soon as a signal arrives: a batch may take long."""
        self._waiting = True
        try:
            if self.requested and jax.process_count() == 1:
                raise Stopped
            return next(items)
        finally:
            self._waiting = False


def agreed(requested: int, due: bool) -> int:
    """Returns the signal after whose arrival all hosts stop after this step, 0 for none.

    Args:
      requested: the signal that this host received, 0 for none.
      due: whether this is a step at which hosts compare; the same on all hosts. One host alone needs no comparison.
    """
    if jax.process_count() == 1:
        return requested
    return int(multihost_utils.process_allgather(np.array(requested)).max()) if due else 0


def interrupted(step: int, number: int) -> Interrupted:
    """Returns the exception that ends a run after a signal.

    Args:
      step: the last finished step, of which there is a checkpoint; 0 if there is none.
      number: the signal.
    """
    place = f"at step {step}, which is saved" if step else "before the first step"
    return Interrupted(f"interrupted {place}; the same command continues from there", number)
