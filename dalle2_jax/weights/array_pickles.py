"""Pickles of nested dicts of numpy arrays, as some JAX projects publish weights.

They are read with an unpickler that makes plain arrays of numbers and calls nothing else.
"""

import io
import itertools
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.reading import read_bytes
from dalle2_jax.weights.tensor import Tensor, plain
from dalle2_jax.weights.torch_pickles import UnknownName

MAX_BYTES = 2**30
"""Largest file that is read, in bytes."""

_MAX_NAMES, _MAX_LEVELS, _MAX_NAME = 10_000, 16, 256
"""Arrays and dicts of a file, levels of dicts, and characters of a name."""


class _Array:
    """Replaces a numpy array: its state is checked before an array is made of it."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, content = state
        if not isinstance(dtype, _Type) or not isinstance(content, bytes):
            raise ValueError("an array without a dtype or content")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array cannot have shape {shape}")
        flat = np.frombuffer(content, dtype.dtype)
        if flat.size != math.prod(shape):
            raise ValueError(f"an array of shape {shape} with {flat.size} elements")
        self.value = flat.reshape(shape, order="F" if column_major else "C")


class _Type:
    """Replaces a numpy dtype: plain numbers only."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f2", "f4", "f8", "i4", "i8"):
            raise ValueError("an array of another dtype than floats and integers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in "<|=":
            raise ValueError("an array of big-endian numbers")


class _Arrays(pickle._Unpickler):
    """Reads dicts of arrays. As `torch_pickles.Descriptions`, based on the unpickler in Python."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, which is not used
        if (module, name) == ("numpy", "dtype"):
            return _Type
        raise UnknownName(module, name)


def open_arrays(path: Path) -> dict[str, Tensor]:
    """Returns the arrays in a pickle, by the names on the way to them, joined by dots.

    Raises:
        UnknownName: the pickle holds more than arrays.
        WeightsError: it holds no arrays, or too many, or is too large.
        Exception: those that pickle raises for a damaged file.
    """
    if path.stat().st_size > MAX_BYTES:
        raise WeightsError(f"{path} has more than the {MAX_BYTES:,} bytes of a pickle that are read", path)
    content = _Arrays(io.BytesIO(read_bytes(path, MAX_BYTES))).load()
    found = list(itertools.islice(_named(content, ()), _MAX_NAMES + 1))
    arrays = {name: value for name, value in found if value is not None}
    if not arrays or len(found) > _MAX_NAMES:
        raise WeightsError(f"{path} holds no named arrays, or more than {_MAX_NAMES:,} of them", path)
    return {
        key: Tensor(value.shape, value.dtype.name, path, lambda value=value: plain(value))
        for key, value in arrays.items()
    }


def _named(content: Any, names: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields (names joined by dots, array) for each array in nested dicts, and (names, None) for each dict."""
    if isinstance(content, _Array):
        yield ".".join(names), content.value
    elif isinstance(content, Mapping) and len(names) < _MAX_LEVELS:
        yield ".".join(names), None
        for name, value in content.items():
            yield from _named(value, (*names, str(name)[:_MAX_NAME]))
