"""Torch checkpoints, and the TorchScript archives in which OpenAI publishes CLIP.

They are pickles. Those with nothing but tensors are read here, without torch; so are TorchScript archives. Others are
read by torch (the extra ``torch``) with ``weights_only=True``, which runs no code. All sizes that a file claims are
compared with the size of the file before memory is allocated.
"""

import itertools
import math
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights import array_pickles
from dalle2_jax.weights.config_files import named
from dalle2_jax.weights.tensor import Tensor, plain
from dalle2_jax.weights.torch_pickles import (
    MAX_DESCRIPTION,
    Module,
    Reader,
    Stored,
    UnknownName,
    is_older_format,
    read_archive,
    read_older_format,
)

MAX_TENSORS = 200_000
"""Largest number of modules and tensors in a TorchScript archive."""

_MAX_NAME = 4096  # characters of a module's name

_WRAPPERS = ("ema_model", "state_dict", "model", "module")
"""Keys under which trainers store a state dict; averaged weights come first."""

_STUBBED_CLASSES = {
    # module: class names. DALLE2-pytorch stores its version in a file, as an object
    "packaging.version": ("Version", "_Version"),
    "packaging._structures": ("InfinityType", "NegativeInfinityType"),
}
"""Classes of objects that known files hold besides weights. Classes without content and behaviour replace them."""

_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
"""Exceptions that pickle and zipfile raise for damaged or foreign files."""


def open_torch(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a torch file by key.

    Raises:
        WeightsError: the file is damaged, or a pickle that would run code.
    """
    records = _records(path)
    _check_records(path, records)
    if any(entry.filename.endswith("/constants.pkl") for entry in records):
        return _open_torchscript(path)
    try:
        return _open_state_dict(path, zipped=bool(records))
    except UnknownName:
        return _open_torch(path)


# --- torch ----------------------------------------------------------------------------------


def _records(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the records of a torch archive; [] for the older format of torch, which is not an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise _damaged(path, error) from error
        return []


def _check_records(path: Path, records: Iterable[zipfile.ZipInfo]) -> None:
    """Raises WeightsError for an archive whose records unpack to more bytes than the file has.

    Torch compresses only the source code of a TorchScript module, which is not read.
    """
    entries = [entry for entry in records if "/code/" not in f"/{entry.filename}"]
    size, total = path.stat().st_size, sum(entry.file_size for entry in entries)
    if total > size:
        what = f"its records unpack to {total:,} bytes, the file has {size:,}"
        raise WeightsError(f"{path} is not a torch checkpoint: {what}", path)
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_DESCRIPTION:
            limit = f"{entry.file_size:,} bytes, at most {MAX_DESCRIPTION:,} are read"
            raise WeightsError(f"{path}: record {named(entry.filename)} has {limit}", path)


def _open_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise WeightsError(
            f"{path} is a torch checkpoint with more than tensors: install torch to read it (pip install "
            "'dalle2_jax[torch]'), or give the same weights as .safetensors",
            path,
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_stubs()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    found = _tensors_in(content, torch.Tensor, path)
    for key, value in found:
        _check_size(path, key, value.numel())
    return {
        key: Tensor(
            tuple(value.shape), str(value.dtype).removeprefix("torch."), path, lambda value=value: _from_torch(value)
        )
        for key, value in found
    }


def _check_size(path: Path, key: str, count: int) -> None:
    """Raises WeightsError for a tensor with more elements than its file has bytes (its strides repeat them)."""
    size = path.stat().st_size
    if count > size:
        raise WeightsError(f"{path}: tensor {named(key)} claims {count:,} elements, the file has {size:,} bytes", path)


def _unsafe(path: Path, error: pickle.UnpicklingError) -> WeightsError:
    """Returns the error for a pickle that names a function or a class: unpickling it could run any code."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if name is None:
        return _damaged(path, error)
    return WeightsError(f"{path} is not read: it holds more than weights and could run code ({name[1]})", path)


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0].rstrip(": ")
    return WeightsError(f"{path} is damaged or cut short ({reason}): download it again", path)


def _stubs() -> list[type]:
    """Returns an empty class for each name in ``_STUBBED_CLASSES``."""

    def ignore(self: Any, *_: Any) -> None:
        """Accepts and ignores any arguments."""

    content = {"__init__": ignore, "__setstate__": ignore}
    names = [(module, name) for module, names in _STUBBED_CLASSES.items() for name in names]
    return [type(name, (), {"__module__": module, **content}) for module, name in names]


def _from_torch(value: Any) -> np.ndarray:
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy().copy()


def _tensors_in(content: Any, kind: type, path: Path) -> list[tuple[str, Any]]:
    """Returns the tensors of a state dict, of a trainer's dict around one, or of a list, whose keys are indices."""
    if isinstance(content, Mapping):
        for name in _WRAPPERS:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
    items = content.items() if isinstance(content, Mapping) else ()
    if isinstance(content, list | tuple):
        items = ((str(i), value) for i, value in enumerate(content))
    found = [(str(key), value) for key, value in items if isinstance(value, kind)]
    if not found:
        raise WeightsError(f"{path} holds no named tensors", path)
    return found


# --- without torch --------------------------------------------------------------------------


def _open_state_dict(path: Path, zipped: bool) -> dict[str, Tensor]:
    """Lists the tensors of a state dict; UnknownName if the file holds more than that."""
    try:
        if zipped or is_older_format(path):
            content, read = read_archive(path) if zipped else read_older_format(path)
            return _described(path, _tensors_in(content, Stored, path), read)
        return array_pickles.open_arrays(path)
    except UnknownName:
        raise
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _damaged(path, error) from error


def _open_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        module, read = read_archive(path)
        found = list(itertools.islice(_attributes(module, ""), MAX_TENSORS + 1))
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    if len(found) > MAX_TENSORS:
        raise WeightsError(f"{path} is not a checkpoint: it has more than {MAX_TENSORS:,} modules and tensors", path)
    return _described(path, [(key, value) for key, value in found if value is not None], read)


def _attributes(module: Any, prefix: str) -> Iterator[tuple[str, Stored | None]]:
    """Yields (name in the state dict, tensor) for every tensor below a module, and (prefix, None) for each module."""
    yield prefix, None
    if len(prefix) > _MAX_NAME:
        raise ValueError(f"a module's name has more than {_MAX_NAME} characters")
    for name, value in vars(module).items() if isinstance(module, Module) else ():
        if isinstance(value, Stored):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module):
            yield from _attributes(value, f"{prefix}{name}.")


def _described(path: Path, found: Iterable[tuple[str, Stored]], read: Reader) -> dict[str, Tensor]:
    """Returns the tensors of a file that ``read`` reads."""

    def reading(stored: Stored) -> np.ndarray:
        try:
            return plain(read(stored))
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    tensors = list(found)
    for key, stored in tensors:
        _check_size(path, key, math.prod(stored.shape))
    return {key: Tensor(each.shape, each.dtype, path, lambda each=each: reading(each)) for key, each in tensors}
