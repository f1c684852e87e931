"""Reads parts of large files from disk or over the network, from any number of threads, within a time limit.

A path with ``://`` is a URL: see `remote`. All other paths are local, and read with ``pread``.
"""

import functools
import glob
import itertools
import math
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from dalle2_jax.data.storage.remote import Reader, Remote
from dalle2_jax.data.storage.retry import with_retries
from dalle2_jax.errors import UserError, shown
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import open_regular, read_bytes

TIMEOUT = 60.0
"""Seconds allowed for reading parts of a file."""

MAX_FILES = 10_000_000
"""Maximum number of files that a pattern may name."""

_AT_ONCE = getattr(os, "RWF_NOWAIT", None)  # only on Linux
_OPEN_FILES = 128
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


class ChangedError(Exception):
    """A file has changed since it was listed."""


def expand_braces(pattern: str) -> list[str]:
    """Returns ``a{00..02}b`` as a00b, a01b, a02b, and ``{x,y}`` as x, y; several braces in every combination.

    Raises:
        UserError: a range that is not of two numbers, the first no greater; or more than `MAX_FILES` names.
    """
    parts = _BRACES.split(pattern)
    count = math.prod(_count(part, pattern) for part in parts[1::2])
    if count > MAX_FILES:
        raise UserError(f"{shown(pattern)} names more files than the {MAX_FILES:,} that a data set may have")
    options = [[part] if number % 2 == 0 else _options(part, pattern) for number, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*options)]


def _options(inside: str, pattern: str) -> list[str]:
    if ".." not in inside:
        return inside.split(",")
    first = inside.partition("..")[0]
    return [str(number).zfill(len(first)) for number in _range(inside, pattern)]


def _count(inside: str, pattern: str) -> int:
    """Returns how many options a pair of braces has."""
    return len(_range(inside, pattern)) if ".." in inside else inside.count(",") + 1


def _range(inside: str, pattern: str) -> range:
    first, _, last = inside.partition("..")
    digits = all(word.isdecimal() and len(word) < 19 for word in (first, last))
    if not (digits and int(first) <= int(last)):
        raise UserError(f"{shown(pattern)}: {shown(inside)} is not a range of numbers like 000..123")
    return range(int(first), int(last) + 1)


def literal_part(path: str) -> str:
    """Returns the longest beginning of a local path that is there as it is written, and so is no pattern; "" of a URL.

    So a folder may be named ``a{b,c}`` or ``a[b]``.
    """
    if "://" in path:
        return ""
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


class Files:
    """A list of files on one file system, in which parts are read; picklable, open files are not.

    Args:
        pattern: a file, a folder (its files that end with ``suffix``), a glob, or a pattern with braces; what of it
            is there as it is written is no pattern.

    Raises:
        UserError: no file is there, or the file system is not known or gives no answer.
    """

    def __init__(self, pattern: str, suffix: str) -> None:
        self._remote = Remote(pattern) if "://" in pattern else None
        base = literal_part(pattern)
        matching = functools.partial(_matching, base) if self._remote is None else self._remote.matching
        self.paths = [path for one in expand_braces(pattern[len(base) :]) for path in matching(one, suffix)]
        self.stamps = _stamps(self.paths) if self._remote is None else self._remote.stamps(self.paths)
        if not (self.stamps[:, 0] >= 0).any():
            raise UserError(f"there are no {suffix} files at {pattern}")
        filled = np.flatnonzero(self.stamps[:, 0] > 0)
        if self._remote is not None and len(filled):
            self._remote.check_parts(self.paths[filled[0]])
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
        """Whether the files are on the file system of this machine."""
        return self._remote is None

    def scan(self, number: int) -> BinaryIO | Reader:
        """Opens a file to read it from its beginning. OSError if it cannot be read."""
        return open_regular(self.paths[number]) if self._remote is None else self._remote.open(self.paths[number])

    def read_companion(self, number: int, ending: str, limit: int) -> bytes:
        """Returns the content of the file with a suffix appended. OSError if it is unreadable or exceeds ``limit``."""
        path = _with_ending(self.paths[number], ending)
        return read_bytes(path, limit) if self._remote is None else self._remote.content(path, limit)

    def write_companion(self, number: int, ending: str, content: bytes) -> None:
        """Writes the file with a suffix appended to its name. OSError if it cannot be written."""
        path = _with_ending(self.paths[number], ending)
        write_atomically(path, content) if self._remote is None else self._remote.write(path, content)

    def read(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns parts of a file, each of (offset, size); shorter ones where the file ends.

        Raises:
            OSError: every attempt failed or took too long.
            ChangedError: the file has another size or time than when it was listed.
        """
        at_once = self._cached(number, spans)
        if at_once is not None:
            return at_once
        return with_retries(lambda: self._read(number, spans), TIMEOUT, lambda: self._forget(number))

    def _cached(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Returns parts of an open file if all are in the page cache, so that no thread is needed; else None."""
        file = self._held(number)
        if file is None or _AT_ONCE is None:
            return None
        contents = []
        for offset, size in spans:
            content = bytearray(size)
            try:
                if os.preadv(file.handle, [content], offset, _AT_ONCE) < size:
                    return None
            except OSError:  # not in the cache, or not supported by the file system
                return None
            contents.append(bytes(content))
        return contents

    def _read(self, number: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        if self._remote is not None:
            return self._remote.read(self.paths[number], spans)
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


class _LocalFile:
    """An open file that is closed with its last reference, so never while a thread reads it."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if _stamp(os.fstat(self.handle)) != stamp:
            raise ChangedError(path)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def _matching(base: str, pattern: str, suffix: str) -> list[str]:
    """Returns the files at ``base`` + ``pattern``; ``base`` is taken literally."""
    path = base + pattern
    if os.path.isdir(path):
        return sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(suffix))
    if glob.has_magic(pattern) and not os.path.lexists(path):
        return sorted(glob.glob(glob.escape(base) + pattern))
    return [path]


def _with_ending(path: str, ending: str) -> str:
    """Returns a path with a suffix appended to its name, before the query of a URL."""
    name, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{name}{ending}{mark}{query}"


def _stamps(paths: Sequence[str]) -> Int64[np.ndarray, "files 2"]:
    """Returns size and time of each file, -1 for missing files and what is no file, such as a pipe."""
    stamps = np.full((len(paths), 2), -1, np.int64)
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            stamps[number] = _stamp(status)
    return stamps


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
