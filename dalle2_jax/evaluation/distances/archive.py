"""Named float64 arrays with a description in one file, an .npz without compression that ``numpy.load`` reads too.

Files may come from anywhere: nothing is unpickled, nothing is expanded, and the shape of an array is compared with the
bytes of the file before the array is made.
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from dalle2_jax.errors import DataError, printable
from dalle2_jax.files import written_atomically
from dalle2_jax.reading import open_regular, parse_json

DESCRIPTION = "description.json"

_MAX_DESCRIPTION, _MAX_OVERHEAD = 10_000, 100_000
_DAMAGE = (
    *(zipfile.BadZipFile, struct.error, EOFError, OSError, NotImplementedError),
    *(ValueError, KeyError, TypeError, SyntaxError, RuntimeError, OverflowError),
)
"""Exceptions that zipfile, json and NumPy raise for damaged or foreign files."""


def write_arrays(
    path: str | Path, arrays: Mapping[str, Float64[np.ndarray, "..."]], description: Mapping[str, Any]
) -> None:
    """Writes a file, complete or not at all. Equal content gives equal bytes.

    Raises:
      OSError: it cannot be written.
    """
    with written_atomically(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array, "<f8"), (1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getbuffer())  # ZipInfo alone has a constant date
        archive.writestr(zipfile.ZipInfo(DESCRIPTION), json.dumps(description, indent=1))


def read_arrays(
    path: str | Path, ndims: Mapping[str, int], max_size: int
) -> tuple[dict[str, Float64[np.ndarray, "..."]], dict[str, Any]]:
    """Returns the arrays and the description of a file that `write_arrays` wrote.

    Args:
      path: of the file.
      ndims: name of each array -> its number of dimensions.
      max_size: maximum length of each dimension.

    Raises:
      DataError: there is no such file, it is damaged, or it is not such a file.
    """
    limit = sum(8 * max_size**ndim for ndim in ndims.values()) + _MAX_OVERHEAD
    try:
        with open_regular(path, limit) as file, zipfile.ZipFile(file) as archive:
            if {member.filename for member in archive.infolist()} != {DESCRIPTION, *(f"{name}.npy" for name in ndims)}:
                raise ValueError("it has other members")
            description = parse_json(_content(archive, DESCRIPTION, _MAX_DESCRIPTION))
            if not isinstance(description, dict):
                raise ValueError(f"{DESCRIPTION} is no object")
            return {name: _array(archive, name, ndim, max_size) for name, ndim in ndims.items()}, description
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", path) from None
    except _DAMAGE as error:
        reason = printable(error)[:200] or type(error).__name__
        raise DataError(
            f"{path} holds no statistics that this package wrote, or is damaged ({reason})", path
        ) from error


def _array(archive: zipfile.ZipFile, name: str, ndim: int, max_size: int) -> Float64[np.ndarray, "..."]:
    """Returns an array of finite numbers."""
    content = _content(archive, f"{name}.npy", 8 * max_size**ndim + _MAX_OVERHEAD)
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.dtype("<f8") or fortran or len(shape) != ndim or not all(1 <= size <= max_size for size in shape):
        raise ValueError(f"{name} is {dtype}{list(shape)}")
    if len(content) - stream.tell() != 8 * math.prod(shape):
        raise ValueError(f"{name} has not the size of its shape")
    values = np.frombuffer(content, "<f8", offset=stream.tell()).reshape(shape).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinity")
    return values


def _content(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Returns the content of a member that is not compressed, so that no small file expands to a large one."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
        raise ValueError(f"{name} is compressed or too large")
    return archive.read(member)
