"""A log of rejected records that is shared by all processes that read a data set."""

import contextlib
import json
import os
import tempfile
import threading
import weakref
from typing import Any

from dalle2_jax import signals
from dalle2_jax.reading import parse_json

MAX_REJECTED = 0.1
"""Rejection rate above which a run ends. A small data set may have ten bad records, if they are under a third."""

_ONE_AT_A_TIME = threading.Lock()


class RejectionLog:
    """Indices of rejected records, and the cause of each.

    A pickled copy, as in a worker process, starts with the entries of the original and reports new ones to it through a
    small file, which is removed with the original. A record that several copies reject counts once. ``len`` counts the
    entries of all copies.
    """

    def __init__(self) -> None:
        self._causes: dict[int, str] = {}
        self._known: set[str] = set()
        self._path: str | None = None
        self._is_copy = False
        self._all: dict[int, str] = {}  # of this process and of the copies
        self._read_to = 0

    def __getstate__(self) -> dict[str, Any]:
        with _ONE_AT_A_TIME:  # workers are sent their copies by threads
            if self._path is None:
                handle, self._path = tempfile.mkstemp(prefix="dalle2_jax.", suffix=".rejections")
                os.close(handle)
                signals.at_end(weakref.finalize(self, _remove, self._path, os.getpid()))
        return {"_causes": dict(self._causes), "_known": set(self._known), "_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        vars(self).update(state, _all=dict(state["_causes"]), _is_copy=True)

    def __len__(self) -> int:
        return len(self._collect())

    def __contains__(self, place: int) -> bool:
        return place in self._causes

    def add(self, place: int, cause: str) -> bool:
        """Adds a rejected record. Returns whether it is the first of its cause in any process so far."""
        if cause not in self._known:
            self._known.update(self._collect().values())
        new = cause not in self._known
        self._known.add(cause)
        self._causes[place] = self._all[place] = cause
        if not self._is_copy or self._path is None:
            return new
        line = json.dumps([place, cause]) + "\n"
        with contextlib.suppress(OSError):  # the original is gone, and its file with it
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, line.encode())  # one call, so that the lines of several processes stay whole
            finally:
                os.close(handle)
        return new

    def causes(self) -> dict[int, str]:
        """Returns the cause of every record that was rejected by this process or by a copy, by index."""
        return {**self._collect(), **self._causes}

    def _collect(self) -> dict[int, str]:
        """Returns the entries of this process, and those that copies have reported so far."""
        if self._path is None:
            return self._all
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read_to)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._all
        if whole:
            self._read_to += len(whole) + 1
            self._all.update(parse_json(line) for line in whole.splitlines())
        return self._all


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        with contextlib.suppress(OSError):
            os.unlink(path)
