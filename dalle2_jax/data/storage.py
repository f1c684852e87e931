"""Parts of large files, read from disk or over the network by any number of threads, within a time limit.

A path with ``://`` is a URL of any file system that fsspec knows; the extra ``remote`` installs it with those for gs://
and s3://. All other paths are local, and read with ``pread``.
"""

import glob
import itertools
import os
import queue
import re
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from dalle2_jax.types import UserError

TIMEOUT, SCAN_TIMEOUT = 60.0, 600.0
"""Seconds that reading a part of a file may take, and reading a whole one."""

PAUSES = (0.2, 2.0, 10.0)
"""Seconds to wait before each new attempt at a read that failed."""

_AT_ONCE = getattr(os, "RWF_NOWAIT", None)  # Linux alone has it
_OPEN_FILES = 128
_STAMP_FIELDS = ("mtime", "LastModified", "updated", "last_modified", "created", "ETag", "etag")
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


class ChangedError(Exception):
    """A file is not any more the one that was listed."""


def expand_braces(pattern: str) -> list[str]:
    """Returns ``a{00..02}b`` as a00b, a01b, a02b, and ``{x,y}`` as x, y; several braces in every combination.

    Raises:
        UserError: a range that is not of two numbers, the first no greater.
    """
    parts = _BRACES.split(pattern)
    options = [[part] if number % 2 == 0 else _options(part, pattern) for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def _options(inside: str, pattern: str) -> list[str]:
    if ".." not in inside:
        return inside.split(",")
    first, _, last = inside.partition("..")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise UserError(f"{pattern}: {{{inside}}} is not a range of numbers like {{000..123}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


class Files:
    """A list of files on one file system, in which parts are read; picklable, open files are not.

    Args:
        pattern: a file, a folder (its files that end with ``suffix``), a glob, or a pattern with braces.

    Raises:
        UserError: no file is there, or the file system is not known.
    """

    def __init__(self, pattern: str, suffix: str) -> None:
        self._system = _file_system(pattern) if "://" in pattern else None
        self.paths = [path for one in expand_braces(pattern) for path in self._matching(one, suffix)]
        self.stamps = self._stamps()
        if not (self.stamps[:, 0] >= 0).any():
            raise UserError(f"there are no {suffix} files at {pattern}")
        self._open_none()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_none()

    def _open_none(self) -> None:
        self._open: OrderedDict[int, _LocalFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the files lie on this machine's file system."""
        return self._system is None

    def scan(self, number: int) -> BinaryIO:
        """Opens a file to read it from its beginning."""
        path = self.paths[number]
        return open(path, "rb") if self.local else self._system.open(path, "rb")

    def read(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns parts of a file, each of (offset, size); shorter ones where the file ends.

        Raises:
            OSError: every attempt failed or took too long.
            ChangedError: the file has another size or time than when it was listed.
        """
        at_once = self._cached(number, spans)
        if at_once is not None:
            return at_once
        return persistently(lambda: self._read(number, spans), TIMEOUT, lambda: self._forget(number))

    def _cached(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Returns parts of an open file that lie in memory, and so take no time; None if one does not."""
        file = self._held(number)
        if file is None or _AT_ONCE is None:
            return None
        contents = []
        for offset, size in spans:
            content = bytearray(size)
            try:
                if os.preadv(file.handle, [content], offset, _AT_ONCE) < size:
                    return None
            except OSError:  # it would take time, or this file system does not say
                return None
            contents.append(bytes(content))
        return contents

    def _read(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        if not self.local:
            path = self.paths[number]
            return [self._system.cat_file(path, offset, offset + size) if size else b"" for offset, size in spans]
        file = self._opened(number)
        return [os.pread(file.handle, size, offset) for offset, size in spans]

    def _held(self, number: int) -> "_LocalFile | None":
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
            return self._open.get(number)

    def _opened(self, number: int) -> "_LocalFile":
        file = self._held(number)
        if file is not None:
            return file
        file = _LocalFile(self.paths[number], tuple(self.stamps[number]))  # may hang, so not under the lock
        with self._lock:
            self._open[number] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return file

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)

    def _matching(self, pattern: str, suffix: str) -> list[str]:
        if self.local:
            if os.path.isdir(pattern):
                return sorted(entry.path for entry in os.scandir(pattern) if entry.name.endswith(suffix))
            return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        path = self._system._strip_protocol(pattern)
        if glob.has_magic(path):
            return sorted(self._system.glob(path))
        if path.endswith(suffix):
            return [path]
        return sorted(found for found in self._system.ls(path, detail=False) if found.endswith(suffix))

    def _stamps(self) -> Int64[np.ndarray, "files 2"]:
        """Size and time of each file, -1 for those that are not there."""
        stamps = np.full((len(self.paths), 2), -1, np.int64)
        if self.local:
            for number, path in enumerate(self.paths):
                try:
                    stamps[number] = _stamp(os.stat(path))
                except OSError:
                    continue
            return stamps
        told = {}
        for parent in {path.rpartition("/")[0] for path in self.paths}:
            try:
                told.update((info["name"], info) for info in self._system.ls(parent, detail=True))
            except FileNotFoundError:
                continue
        for number, path in enumerate(self.paths):
            if path in told:
                info = told[path]
                changes = repr([str(info.get(field)) for field in _STAMP_FIELDS])
                stamps[number] = info["size"], zlib.crc32(changes.encode())
        return stamps


class _LocalFile:
    """An open file, closed when nobody uses it any more: never under a thread that is reading."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        if _stamp(os.fstat(self.handle)) != stamp:
            raise ChangedError(path)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _file_system(url: str) -> Any:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read ({error}): install the extra, pip install -e '.[remote]'") from None


def persistently(attempt: Callable[[], Any], seconds: float, between: Callable[[], None] = lambda: None) -> Any:
    """Returns what ``attempt`` does, tried again after `PAUSES` while it fails with OSError or takes too long.

    Args:
        seconds: for each attempt.
        between: called before each new one.

    Raises:
        OSError: that of the last attempt.
    """
    for pause in (*PAUSES, None):
        try:
            return within(seconds, attempt)
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)
            between()


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """Returns what ``action`` does, in a thread of its own, which is left behind when it takes too long.

    The thread waits for the next action of the same caller: to start one for every read takes longer than the read.

    Raises:
        TimeoutError: it took longer.
    """
    helper = getattr(_helpers, "helper", None)
    if helper is None or helper.process != os.getpid():  # threads do not live on in a process that was forked
        helper = _helpers.helper = _Helper()
    helper.actions.put(action)
    try:
        answer, error = helper.answers.get(timeout=seconds)
    except BaseException as raised:
        _helpers.helper = None  # its late answer is nobody's
        if isinstance(raised, queue.Empty):
            raise TimeoutError(f"no answer within {seconds} s") from None
        raise
    if error is not None:
        raise error
    return answer


class _Helper:
    """A thread that acts for another, and ends when that has left or forgotten it."""

    def __init__(self) -> None:
        self.actions: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.process = os.getpid()
        threading.Thread(target=_serve, args=(self.actions, self.answers), daemon=True).start()

    def __del__(self) -> None:
        self.actions.put(None)


def _serve(actions: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (action := actions.get()) is not None:
        try:
            answers.put((action(), None))
        except BaseException as error:  # raised again by the caller
            answers.put((None, error))
        del action  # and what it holds open


_helpers = threading.local()
