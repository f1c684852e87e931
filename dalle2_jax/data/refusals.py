"""The records of a data set that were refused while it was read, by all processes that read it."""

import contextlib
import json
import os
import tempfile
import threading
import weakref
from typing import Any

_ONE_AT_A_TIME = threading.Lock()


class Refusals:
    """Places of refused records, and why each was.

    A pickled copy, in a worker process say, knows what the original knew, and reports to it through a small file that
    lives as long as the original. A place that several copies refuse counts once; ``len`` is of all that were told.
    """

    def __init__(self) -> None:
        self._causes: dict[int, str] = {}
        self._known: set[str] = set()
        self._path: str | None = None
        self._reports = False  # whether this is a copy
        self._told: dict[int, str] = {}  # here and in the copies
        self._heard_to = 0

    def __getstate__(self) -> dict[str, Any]:
        with _ONE_AT_A_TIME:  # workers are sent their copies by threads
            if self._path is None:
                handle, self._path = tempfile.mkstemp(prefix="dalle2_jax.", suffix=".refused")
                os.close(handle)
                weakref.finalize(self, _remove, self._path, os.getpid())
        return {"_causes": dict(self._causes), "_known": set(self._known), "_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        vars(self).update(state, _told=dict(state["_causes"]), _reports=True)

    def __len__(self) -> int:
        return len(self._listen())

    def __contains__(self, place: int) -> bool:
        return place in self._causes

    def add(self, place: int, cause: str) -> bool:
        """Notes a refused record; returns whether it is the first of its cause, of all that were told so far."""
        if cause not in self._known:
            self._known.update(self._listen().values())
        new = cause not in self._known
        self._known.add(cause)
        self._causes[place] = self._told[place] = cause
        if not self._reports:
            return new
        line = json.dumps([place, cause]) + "\n"
        with contextlib.suppress(OSError):  # a copy that outlives the original has nobody to tell
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, line.encode())  # one call, so that the lines of several processes stay whole
            finally:
                os.close(handle)
        return new

    def causes(self) -> dict[int, str]:
        """Returns the places that were refused here and in the copies, and why each was."""
        return {**self._listen(), **self._causes}

    def _listen(self) -> dict[int, str]:
        """Returns what was refused here, and what copies have reported so far."""
        if self._path is None:
            return self._told
        try:
            with open(self._path, "rb") as file:
                file.seek(self._heard_to)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return self._told
        if whole:
            self._heard_to += len(whole) + 1
            self._told.update(json.loads(line) for line in whole.splitlines())
        return self._told


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        with contextlib.suppress(OSError):
            os.unlink(path)
