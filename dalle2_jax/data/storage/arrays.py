"""Arrays in one file, mapped into memory, so that an index of any size opens at once and takes no memory.

An index of other files is stored next to them, or under ``~/.cache/dalle2_jax`` if their folder cannot be written.
"""

import hashlib
import io
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from dalle2_jax.files import written_atomically
from dalle2_jax.reading import open_regular

_ALIGNED, _IN_MEMORY = 64, 2**29


class Kind(NamedTuple):
    """The expected dtype of an array, and its shape, with None for any size."""

    type: type
    shape: tuple[int | None, ...]


BYTES, NUMBERS, DIGESTS = Kind(np.uint8, (None,)), Kind(np.int64, (None,)), Kind(np.uint64, (None,))


class Strings(NamedTuple):
    """Byte strings without an object for each: all bytes one after the other, and where each string ends."""

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
    """Writes arrays one after the other as .npy, for `map_arrays`. OSError if the file cannot be written."""
    with written_atomically(path) as file:
        for array in arrays:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
            file.write(bytes(-file.tell() % _ALIGNED))


def map_arrays(path: Path, kinds: Sequence[Kind]) -> list[np.ndarray]:
    """Maps the arrays of a file into memory, read-only. OSError or ValueError if they are not of these kinds."""
    arrays = []
    with open_regular(path) as file:
        total = os.fstat(file.fileno()).st_size
        content = np.memmap(file, np.uint8, "r") if total else np.zeros(0, np.uint8)
        file.seek(0)  # memmap leaves it at the end
        for expected_kind in kinds:
            shape, kind, size = _header(file, expected_kind)
            start = file.tell()
            if start + size > total:
                raise ValueError("it is cut short")
            arrays.append(content[start : start + size].view(kind).reshape(shape))
            file.seek(-(-(start + size) // _ALIGNED) * _ALIGNED)
    return arrays


def unpack_arrays(content: bytes, kinds: Mapping[str, Kind], limit: int) -> dict[str, np.ndarray]:
    """Returns arrays of a .npz file. ValueError if they are not of these kinds, or take over ``limit`` bytes."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name, expected_kind in kinds.items():
                info = archive.getinfo(f"{name}.npy")
                limit -= info.file_size
                if limit < 0:
                    raise ValueError("it is too large")
                with archive.open(info) as file:
                    shape, kind, size = _header(file, expected_kind)
                    if size > info.file_size:
                        raise ValueError("it is cut short")
                    arrays[name] = np.frombuffer(file.read(size), kind).reshape(shape)
    except (KeyError, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"not a .npz archive ({type(error).__name__})") from None
    return arrays


def map_array(path: Path) -> np.memmap:
    """Maps a .npy file into memory, read-only. OSError or ValueError if it is damaged, or holds Python objects."""
    with open_regular(path) as file:
        shape, columnwise, kind = _read_header(file)
        start, total = file.tell(), os.fstat(file.fileno()).st_size
    if start + math.prod(shape) * kind.itemsize > total:
        raise ValueError("it is cut short")
    return np.memmap(path, kind, "r", start, shape, "F" if columnwise else "C")


def _header(file: IO[bytes], expected_kind: Kind) -> tuple[tuple[int, ...], np.dtype, int]:
    """Reads the header of a .npy file: shape, type and bytes of its array. ValueError if it is not of that kind."""
    shape, columnwise, kind = _read_header(file)
    fits = len(shape) == len(expected_kind.shape) and all(
        expected in (None, size) for size, expected in zip(shape, expected_kind.shape, strict=True)
    )
    if not fits or columnwise or kind != np.dtype(expected_kind.type):
        raise ValueError(f"an array of {kind}{list(shape)} where one of {expected_kind} is expected")
    return shape, kind, math.prod(shape) * kind.itemsize


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether columns come first, and type of a .npy file. ValueError if damaged, or of objects."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, columnwise, kind = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # the header is the text of a Python dict, whose parser raises any exception
        raise ValueError(f"it has no header of an array ({type(error).__name__})") from None
    if kind.hasobject or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array of {kind}{list(shape)}")
    return shape, columnwise, kind


def load_or_build(
    paths: Sequence[Path],
    kinds: Sequence[Kind],
    is_current: Callable[[list[np.ndarray]], bool],
    build: Callable[[], tuple[Sequence[np.ndarray], bool]],
) -> tuple[Sequence[np.ndarray], Path | None]:
    """Returns arrays from the first file that has them, or builds them and writes the first file that can be written.

    Args:
        paths: of the files.
        kinds: of the arrays. A file with arrays of other kinds is ignored: it may come from an untrusted source.
        is_current: whether the arrays of a file are up to date.
        build: returns the arrays, and whether they may be written.

    Returns:
        The arrays, and the file that they are mapped from, None if none was written.
    """
    for path in paths:
        try:
            arrays = map_arrays(path, kinds)
        except (OSError, ValueError):
            continue
        if is_current(arrays):
            return arrays, path
    built, lasting = build()
    for path in paths if lasting else ():
        try:
            write_arrays(path, built)
            return map_arrays(path, kinds), path
        except OSError:
            continue
    return built, None


def cache_path(index: Path | None, *causes: object) -> list[Path]:
    """Returns the path of arrays that follow from a stored index and from ``causes``; none if it is not stored."""
    if index is None:
        return []
    parts = "".join(str(cause.tobytes() if isinstance(cause, np.ndarray) else cause) for cause in causes)
    return [index.with_name(f"{index.name}.{hashlib.sha256(parts.encode()).hexdigest()[:16]}")]


def allocate(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Returns zeros: in memory, or, above 512 MiB, in a temporary file that is removed with them."""
    if math.prod(shape) * np.dtype(kind).itemsize <= _IN_MEMORY:
        return np.zeros(shape, kind)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=shape)
