"""Files of tensors: safetensors, torch's own files, and the TorchScript archives that OpenAI ships CLIP in.

What a file holds is listed without reading it; each tensor is read when it is asked for, so that a checkpoint never
lies in memory whole. Torch's files are pickles: they are read with ``weights_only=True``, which runs no code, and
torch itself is needed for them alone (the extra ``torch``).
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.types import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"

_WRAPPERS = ("ema_model", "state_dict", "model", "module")
"""Under which trainers keep a state dict in a torch file, averaged weights before those being trained."""

_REMARKS = {
    # module: names; DALLE2-pytorch notes its version in a file, as an object
    "packaging.version": ("Version", "_Version"),
    "packaging._structures": ("InfinityType", "NegativeInfinityType"),
}
"""Objects that stand beside the weights of known files: what is read in their place holds and does nothing."""

_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, OSError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
"""What readers of pickles and archives raise at one that is cut short or no such thing at all."""

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_NUMPY_DTYPES = {theirs: ours for ours, theirs in _SAFETENSORS_DTYPES.items()}


class Tensor(NamedTuple):
    """One tensor of a file, not read yet; ``read`` returns it, floats of any width as float32."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a file by key.

    ``path`` is a safetensors file, one of several with their ``.index.json``, or one of torch's files.

    Raises:
        UserError: no such file, cut short, not of these kinds, or a pickle that would run code.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_parts(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torchscript(path) if _is_torchscript(path) else _open_torch(path)
    known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
    raise UserError(f"{path} is not a file of weights: their names end in {known}")


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with a prefix to each key."""
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


# --- safetensors ----------------------------------------------------------------------------


def _open_parts(path: Path) -> dict[str, Tensor]:
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an index of weights ({type(error).__name__}: {error})") from error
    parts = {name: open_tensors(path.parent / name) for name in sorted(set(places.values()))}
    missing = [key for key, name in places.items() if key not in parts[name]]
    if missing:
        raise UserError(f"{path.parent / places[missing[0]]} lacks tensor {missing[0]}, which {path.name} promises")
    return {key: parts[name][key] for key, name in places.items()}


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    def tensor(file: Any, key: str) -> Tensor:
        view = file.get_slice(key)
        # Opened anew for each tensor: the pages of those read before are given back.
        dtype = _NUMPY_DTYPES.get(view.get_dtype(), view.get_dtype())
        return Tensor(tuple(view.get_shape()), dtype, path, lambda: _plain(_safetensor(path, key)))

    try:
        with safe_open(path, "np") as file:
            return {key: tensor(file, key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}): get it again") from error


def _safetensor(path: Path, key: str) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_tensor(key)


def _plain(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype in (np.float16, np.float64, ml_dtypes.bfloat16) else value


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: Any = np.float32,
) -> None:
    """Writes a safetensors file, a tensor at a time.

    Args:
        path: the file; the caller sees to it that a half-written one is not left.
        shapes: of all that ``tensors`` will yield.
        tensors: (key, value), in any order.
        dtype: of all of them.
    """
    dtype, begin, header = np.dtype(dtype), 0, {"__metadata__": {"format": "pt"}}
    for key, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, begin + size]}
        header[key] = entry
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = dict(shapes)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for key, value in tensors:
            if left.pop(key) != value.shape:
                raise ValueError(f"{key} is {value.shape}, not {shapes[key]}")
            file.seek(start + header[key]["data_offsets"][0])
            file.write(np.ascontiguousarray(value, dtype).tobytes())
        if left:
            raise ValueError(f"no tensors for {', '.join(left)}")
        file.truncate(start + begin)


# --- torch ----------------------------------------------------------------------------------


def _open_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a file of torch's: install torch to read it (pip install 'dalle2_jax[torch]'), "
            "or give the same weights as .safetensors"
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_blanks()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return {
        key: Tensor(
            tuple(value.shape), str(value.dtype).removeprefix("torch."), path, lambda value=value: _from_torch(value)
        )
        for key, value in _tensors_in(content, torch.Tensor, path)
    }


def _refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    """Of a pickle that asks for a function or a class: either is code, which could do anything."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is None:
        return _damaged(path, error)
    return UserError(f"{path} holds more than weights and is not read, as it could run code ({asked[1]})")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0].rstrip(": ")
    return UserError(f"{path} is damaged or cut short ({reason}): get it again")


def _blanks() -> list[type]:
    """A class of no content for each name of ``_REMARKS``, under that name."""

    def ignore(self: Any, *_: Any) -> None:
        """Takes whatever the object was made of."""

    content = {"__init__": ignore, "__setstate__": ignore}
    return [
        type(name, (), {"__module__": module, **content}) for module, names in _REMARKS.items() for name in names
    ]


def _from_torch(value: Any) -> np.ndarray:
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy().copy()


def _tensors_in(content: Any, kind: type, path: Path) -> list[tuple[str, Any]]:
    """The tensors of a state dict, of the dict that a trainer wraps it in, or of a list, whose keys are numbers."""
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
        raise UserError(f"{path} holds no tensors that can be told by name")
    return found


# --- TorchScript ----------------------------------------------------------------------------


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise _damaged(path, error) from error
        return False  # an older file of torch's


class _Bag:
    """Stands in for any object of a TorchScript module: it has attributes and does nothing."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def _first(value: Any, *_: Any) -> Any:
    return value


class _Stored(NamedTuple):
    """A tensor as TorchScript's pickle describes it."""

    name: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _stored(storage: tuple[str, str], offset: int, shape: Iterable[int], strides: Iterable[int], *_: Any) -> _Stored:
    stored = _Stored(*storage, offset, tuple(shape), tuple(strides))
    counts = (offset, *stored.shape, *stored.strides)
    if len(stored.shape) != len(stored.strides) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"no tensor lies like {counts}")
    return stored


class _Descriptions(pickle.Unpickler):
    """Reads the descriptions of a module's tensors. It knows the names below and calls nothing else."""

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
            return dict
        if module.split(".")[0] == "__torch__":
            return _Bag
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, name, *_ = pid
        return name, dtype


def _open_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            (description,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = description.removesuffix("data.pkl")
            with archive.open(description) as file:
                tensors = list(_attributes(_Descriptions(file).load(), ""))
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return {
        key: Tensor(stored.shape, stored.dtype, path, lambda stored=stored: _read_stored(path, root, stored))
        for key, stored in tensors
    }


def _attributes(module: Any, prefix: str) -> Iterable[tuple[str, _Stored]]:
    """Every tensor below a module, by its name in the state dict."""
    for name, value in vars(module).items() if isinstance(module, _Bag) else ():
        if isinstance(value, _Stored):
            yield f"{prefix}{name}", value
        yield from _attributes(value, f"{prefix}{name}.")


def _read_stored(path: Path, root: str, stored: _Stored) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            flat = np.frombuffer(archive.read(f"{root}data/{stored.name}"), stored.dtype)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
    if last >= flat.size:  # a stride past the end would read whatever lies in memory there
        raise UserError(f"{path} is damaged: its tensor {stored.name} is cut short")
    strides = tuple(step * flat.itemsize for step in stored.strides)
    return _plain(np.lib.stride_tricks.as_strided(flat[stored.offset :], stored.shape, strides).copy())
