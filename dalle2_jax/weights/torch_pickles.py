"""Pickles of torch, read without torch: TorchScript modules, and state dicts in both of torch's formats.

The unpickler describes tensors instead of making them, and calls nothing but a few functions of this module. In the
older format a file is a sequence of pickles (a magic number, the protocol, sizes of types, the state dict, the names of
its storages), followed by the content of each storage: its number of elements as int64, then the elements. Tensors
are views of storages with any strides.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dalle2_jax.reading import open_regular

MAX_DESCRIPTION = 2**26
"""Largest pickle in a torch file, in bytes; of the older format, the largest position at which it may end."""

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number as torch pickles it: the first bytes of a file in the older format."""


class Stored(NamedTuple):
    """A tensor as a pickle describes it: a view of a storage, with strides in elements."""

    name: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, flat: np.ndarray) -> np.ndarray:
        """Returns a copy of the tensor, given its storage [size].

        Raises:
            ValueError: the storage is too small.
        """
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) and last >= flat.size:  # as_strided would read memory beyond the array
            raise ValueError(f"tensor {self.name} is cut short")
        strides = tuple(step * flat.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides).copy()


class UnknownName(pickle.UnpicklingError):
    """A pickle names a function or class that is not allowed. Calling it could run any code."""

    def __init__(self, module: str, name: str):
        super().__init__(f"GLOBAL {module}.{name}")


class Module:
    """Replaces any object of a TorchScript module: it has attributes and no behaviour."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


class _Dictionary(dict[str, Any]):
    """Replaces an OrderedDict; torch adds an attribute to that of a state dict."""


def _first(value: Any, *_: Any) -> Any:
    return value


def _stored(storage: tuple[str, str], offset: int, shape: Iterable[int], strides: Iterable[int], *_: Any) -> Stored:
    stored = Stored(*storage, offset, tuple(shape), tuple(strides))
    counts = (offset, *stored.shape, *stored.strides)
    if len(stored.shape) != len(stored.strides) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"a tensor cannot have offset, shape and strides {counts}")
    return stored


class Descriptions(pickle._Unpickler):
    """Reads the descriptions of tensors, and calls only the functions that `find_class` returns.

    It is based on the unpickler in Python: the faster one in C allocates the sizes that a few bytes of a hostile file
    claim (memo indices, lengths).
    """

    _STORAGES = {
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "FloatStorage": "float32",
        "DoubleStorage": "float64",
        "LongStorage": "int64",
        "IntStorage": "int32",
        "BoolStorage": "bool",
    }
    _LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _stored
        if (module == "torch._utils" and name == "_rebuild_parameter") or (
            module == "torch.jit._pickle" and name in self._LISTS
        ):
            return _first
        if module == "torch" and name in self._STORAGES:
            return self._STORAGES[name]
        if module == "collections" and name == "OrderedDict":
            return _Dictionary
        if module.split(".")[0] == "__torch__":
            return Module
        raise UnknownName(module, name)

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, name, *_ = pid
        return name, dtype


class _OlderDescriptions(Descriptions):
    """As `Descriptions`, for the older format, in which a storage may be a part of another."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.dtypes: dict[str, str] = {}

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, name, _, _, part = pid
        if part is not None:
            raise ValueError("a storage that is a part of another one")
        if self.dtypes.setdefault(name, dtype) != dtype:
            raise ValueError(f"storage {name} has two dtypes")
        return name, dtype


Reader = Callable[[Stored], np.ndarray]
"""Reads a tensor that a pickle describes."""


def read_archive(path: Path) -> tuple[Any, Reader]:
    """Reads the description of a torch archive: a zip file with a pickle, and a record for each storage.

    Returns:
        What was saved, with `Stored` in place of tensors; and the function that reads them.

    Raises:
        UnknownName: the file holds more than tensors.
        Exception: those that pickle and zipfile raise for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = description.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        with archive.open(description) as file:
            content = Descriptions(file).load()

    def read(stored: Stored) -> np.ndarray:
        with zipfile.ZipFile(path) as archive:
            return stored.view(np.frombuffer(archive.read(f"{root}data/{stored.name}"), _numpy_dtype(stored.dtype)))

    return content, read


def is_older_format(path: Path) -> bool:
    """Whether a file is in torch's older format."""
    with open_regular(path) as file:
        return file.read(len(_START)) == _START


def read_older_format(path: Path) -> tuple[Any, Reader]:
    """Reads the description of a file in torch's older format; returns and raises as `read_archive`."""
    with open_regular(path) as file:
        start = _Bounded(file, min(path.stat().st_size, MAX_DESCRIPTION))
        magic, protocol, sizes = (_Plain(start).load() for _ in range(3))
        if (magic, protocol) != (_MAGIC, _PROTOCOL) or sizes["little_endian"] is not True:
            raise ValueError("a magic number, protocol or byte order of another format")
        descriptions = _OlderDescriptions(start)
        content, names = descriptions.load(), _Plain(start).load()
        places = _places(file, names, descriptions.dtypes)

    def read(stored: Stored) -> np.ndarray:
        start, count = places[stored.name]
        with open_regular(path) as file:
            file.seek(start)
            dtype = _numpy_dtype(stored.dtype)
            return stored.view(np.frombuffer(file.read(count * dtype.itemsize), dtype))

    return content, read


class _Bounded:
    """The start of a file for an unpickler, whose claims of length do not allocate more than the file has."""

    def __init__(self, file: BinaryIO, end: int):
        self._file, self._end = file, end

    def read(self, size: int) -> bytes:
        """Returns ``size`` bytes, or what is left."""
        return self._file.read(min(size, self._left()))

    def readline(self) -> bytes:
        """Returns a line. EOFError if it has no end: names of classes are lines."""
        line = self._file.readline(self._left())
        if not line.endswith(b"\n"):
            raise EOFError("a line without an end")
        return line

    def _left(self) -> int:
        return max(0, self._end - self._file.tell())


class _Plain(pickle._Unpickler):
    """Reads numbers, strings, lists and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        raise UnknownName(module, name)


def _places(file: BinaryIO, names: Iterable[str], dtypes: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Returns the position in the file and the number of elements of each storage, whose content follows."""
    position, end = file.tell(), file.seek(0, io.SEEK_END)
    places: dict[str, tuple[int, int]] = {}
    for name in names:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        places[name] = (position + 8, count)
        position += 8 + count * _numpy_dtype(dtypes[name]).itemsize
        if count < 0 or position > end:
            raise ValueError(f"storage {name} is cut short")
    if missing := {*dtypes} - {*places}:
        raise ValueError(f"storage {min(missing)} is missing")
    return places


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
