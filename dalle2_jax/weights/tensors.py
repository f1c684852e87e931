"""Tensor files: safetensors, torch checkpoints, and the TorchScript archives in which OpenAI publishes CLIP.

Opening a file lists its tensors without reading them. Each tensor is read on demand, so that a checkpoint is never in
memory as a whole. ``torch_files`` reads the formats of torch.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dalle2_jax.errors import WeightsError, printable, shown
from dalle2_jax.weights.config_files import json_object, named
from dalle2_jax.weights.tensor import Tensor, plain
from dalle2_jax.weights.torch_files import open_torch

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"

MAX_HEADER = 2**25
"""Largest header of a safetensors file that is read, in bytes."""

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_NUMPY_DTYPES = {theirs: ours for ours, theirs in _SAFETENSORS_DTYPES.items()}


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Lists the tensors of a file by key.

    Args:
        path: a safetensors file, the ``.index.json`` of several, or a torch checkpoint.

    Raises:
        WeightsError: the file is missing, damaged or of another kind, or a pickle that would run code.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}", path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_parts(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
    raise WeightsError(f"{path} is not a weights file: its name must end in {known}", path)


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with a prefix to each key."""
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


# --- safetensors ----------------------------------------------------------------------------


def _open_parts(path: Path) -> dict[str, Tensor]:
    places = json_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        what = f"weight_map must map tensor names to files, got {shown(places)}"
        raise WeightsError(f"{path} is not an index of weights: {what}", path)
    for key, name in places.items():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & {*name}
        if not plain or not name.endswith((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
            what = "is not the name of a weights file in the same folder"
            raise WeightsError(f"{path}: weight_map[{shown(key)}] {shown(name)} {what}", path)
    parts = {name: open_tensors(path.parent / name) for name in sorted(set(places.values()))}
    missing = [key for key, name in places.items() if key not in parts[name]]
    if missing:
        file = path.parent / places[missing[0]]
        raise WeightsError(f"{file} lacks tensor {named(missing[0])}, which {path.name} lists", file, missing)
    return {key: parts[name][key] for key, name in places.items()}


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        claims = f"its header claims {length:,} bytes, the file has {size:,}, at most {MAX_HEADER:,} are read"
        raise WeightsError(f"{path} is damaged or cut short ({claims}): download it again", path)

    def tensor(file: Any, key: str) -> Tensor:
        view = file.get_slice(key)
        # The file is opened again for each tensor, which releases the memory pages of those read before.
        dtype = str(view.get_dtype())
        dtype = _NUMPY_DTYPES.get(dtype, dtype)
        return Tensor(tuple(view.get_shape()), dtype, path, lambda: plain(_safetensor(path, key)))

    try:
        with safe_open(path, "np") as file:
            return {key: tensor(file, key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = printable(error)[:200]
        raise WeightsError(f"{path} is damaged or cut short ({reason}): download it again", path) from error


def _safetensor(path: Path, key: str) -> np.ndarray:
    try:
        with safe_open(path, "np") as file:
            return file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:200]
        raise WeightsError(f"{path}: tensor {named(key)} cannot be read ({reason})", path) from error


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: Any = np.float32,
) -> None:
    """Writes a safetensors file, one tensor at a time.

    Args:
        path: the file. An error leaves it incomplete: write into a temporary folder.
        shapes: shapes of all tensors, by key.
        tensors: (key, value) pairs, in any order.
        dtype: dtype of all tensors in the file.

    Raises:
        ValueError: ``tensors`` and ``shapes`` differ.
    """
    dtype, begin = np.dtype(dtype), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, begin + size]}
        header[key] = entry
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    remaining = dict(shapes)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for key, value in tensors:
            if remaining.pop(key) != value.shape:
                raise ValueError(f"{key} is {value.shape}, not {shapes[key]}")
            file.seek(start + header[key]["data_offsets"][0])
            file.write(np.ascontiguousarray(value, dtype).tobytes())
        if remaining:
            raise ValueError(f"no tensors for {', '.join(remaining)}")
        file.truncate(start + begin)
