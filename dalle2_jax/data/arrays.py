"""Arrays in a file, one after the other, mapped into memory: an index of any size opens at once and takes no memory.

What such a file says of other files is kept beside them, or, where their folder cannot be written, below
``~/.cache/dalle2_jax``.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from dalle2_jax.files import written_atomically

_ALIGNED, _IN_MEMORY = 64, 2**29


class Strings(NamedTuple):
    """Byte strings without an object for each: all letters one after the other, and where each string ends."""

    letters: UInt8[np.ndarray, "letters"]
    ends: Int64[np.ndarray, "N"]

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> "Strings":
        """Packs strings."""
        ends = np.cumsum([len(one) for one in strings], dtype=np.int64)
        return cls(np.frombuffer(b"".join(strings), np.uint8), ends)

    def at(self, place: int) -> bytes:
        """Returns a string, 0 <= place < N."""
        return bytes(self.letters[self.ends[place - 1] if place else 0 : self.ends[place]])


def write_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes arrays one after the other as .npy, for `map_arrays`. OSError where that cannot be."""
    with written_atomically(path) as file:
        for array in arrays:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            file.write(bytes(-file.tell() % _ALIGNED))


def map_arrays(path: Path, count: int) -> list[np.ndarray]:
    """Maps the arrays of a file into memory, read-only. OSError or ValueError if there are not so many."""
    arrays = []
    whole = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    with open(path, "rb") as file:
        for _ in range(count):
            np.lib.format.read_magic(file)
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), int(np.prod(shape)) * kind.itemsize
            arrays.append(whole[start : start + size].view(kind).reshape(shape))
            file.seek(-(-(start + size) // _ALIGNED) * _ALIGNED)
    return arrays


def kept(
    homes: Sequence[Path],
    count: int,
    holds: Callable[[list[np.ndarray]], bool],
    make: Callable[[], tuple[Sequence[np.ndarray], bool]],
) -> tuple[Sequence[np.ndarray], Path | None]:
    """Returns arrays from the first file that has them, or makes them and writes the first that can be written.

    Args:
        homes: the files.
        count: of arrays.
        holds: whether the arrays of a file are still true.
        make: makes the arrays, and tells whether they may be kept.

    Returns:
        The arrays, and the file that they are mapped from, None if none was written.
    """
    for home in homes:
        try:
            arrays = map_arrays(home, count)
        except (OSError, ValueError):
            continue
        if holds(arrays):
            return arrays, home
    made, lasting = make()
    for home in homes if lasting else ():
        try:
            write_arrays(home, made)
            return map_arrays(home, count), home
        except OSError:
            continue
    return made, None


def beside(home: Path | None, *causes: object) -> list[Path]:
    """Returns where to keep what follows from an index and from ``causes``: nowhere if the index is not kept."""
    if home is None:
        return []
    told = "".join(str(cause.tobytes() if isinstance(cause, np.ndarray) else cause) for cause in causes)
    return [home.with_name(f"{home.name}.{hashlib.sha256(told.encode()).hexdigest()[:16]}")]


def room(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Returns zeros: in memory, or, where they are many, in a file that goes with them."""
    if math.prod(shape) * np.dtype(kind).itemsize <= _IN_MEMORY:
        return np.zeros(shape, kind)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=shape)


def cache_folder(name: str) -> Path:
    """Returns the folder of a kind of index, for files that cannot lie beside what they are of."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax" / name
