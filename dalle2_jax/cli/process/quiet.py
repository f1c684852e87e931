"""Filters the log output of libraries. Commands call `silence_libraries`; importing the package changes nothing."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

LEVELS = {
    "absl": logging.CRITICAL,  # Orbax logs every array, and the traceback of every exception it raises
    "asyncio": logging.CRITICAL,  # Orbax leaves one failed task per array of a damaged checkpoint
    "tensorboardX": logging.ERROR,
}
"""Logger -> the lowest level that is printed."""


def silence_libraries() -> None:
    """Hides log messages of Orbax, tensorboardX and XLA that repeat, or contradict, this package's own messages.

    Changes the process: logging levels, ``TF_CPP_MIN_LOG_LEVEL`` (unless it is set) and ``sys.unraisablehook``.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import absl.logging  # noqa: F401  (replaces the class of the logger "absl", so it must exist first)

    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if not isinstance(sys.unraisablehook, _ClosedLoopFilter):
        sys.unraisablehook = _ClosedLoopFilter(sys.unraisablehook)


class _ClosedLoopFilter:
    """A ``sys.unraisablehook`` that ignores writes of arrays that end after the first failure.

    When an array cannot be written, Orbax raises the error and closes its event loop. Every array that is still being
    written then fails in a thread of tensorstore, at any later time.
    """

    def __init__(self, hook: Callable[[Any], None]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._hook(unraisable)
