"""What a process need not compute again, on disk: compiled programs, and the shapes of networks.

Both are in one folder, and any of its files may be deleted. JAX looks compiled programs up by the traced program, so
networks are traced in every process. `load_or_build_shapes` saves one of the two traces that sampling needs: the one
that finds the shapes of the weights.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from dalle2_jax.files import cache_folder, write_atomically
from dalle2_jax.reading import parse_json, read_bytes

Shapes = Mapping[str, Any]
"""Nested mappings from names to ``jax.ShapeDtypeStruct``."""

MAX_FILES, MAX_BYTES = 256, 2**24
"""Number of files with shapes, of which the oldest are removed, and the size of the largest one that is read."""

_SOURCES = ("types.py", "rng.py", "ranges.py", "diffusion", "models", "stages")
"""The modules of this package that determine the shapes of a network."""


def enable_compilation_cache() -> None:
    """Stores compiled programs on disk, so that only a program's first run on a machine compiles it.

    The cache is in ``$JAX_COMPILATION_CACHE_DIR``, else in the user's cache folder (``~/.cache/dalle2_jax/jax``). If
    that folder cannot be written, every run compiles.
    """
    folder = jax.config.values["jax_compilation_cache_dir"] or str(cache_folder("jax"))
    jax.config.update("jax_compilation_cache_dir", folder if "://" in folder or _writable(folder) else None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _writable(folder: str) -> bool:
    """Whether a folder, which may not exist yet, can be written."""
    path = pathlib.Path(folder).absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def compile_ahead(function: Callable[..., Any], *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, which are not donated: the next call with such arguments runs the
    program. The memory that the compiler freed is returned to the operating system.

    glibc keeps freed memory for later allocations, which do not reuse it: large arrays have mappings of their own. For
    the train step of a decoder of 108 M parameters that is 0.75 GB.
    """
    cast(jax.stages.Wrapped, function).lower(*arguments).compile()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def load_or_build_shapes(description: str, build: Callable[[], Shapes]) -> Shapes:
    """Returns shapes from the cache of compiled programs; builds and stores them if they are not there.

    A file that is damaged is replaced. Without a cache, or if it cannot be written, shapes are built every time.

    Args:
      description: all that determines the shapes, except this package's code and the versions of JAX and Flax.
      build: returns the shapes.
    """
    cache = jax.config.values["jax_compilation_cache_dir"]
    if not cache or "://" in cache or " at 0x" in description:  # an address: not the same in the next process
        return build()
    path = pathlib.Path(cache, "shapes", f"{_key(description)}.json")
    stored = _read(path)
    if stored is not None:
        return stored
    shapes = build()
    with contextlib.suppress(OSError):
        content = _to_json(shapes)
        write_atomically(path, json.dumps({"shapes": content, "digest": _digest(content)}))
        _remove_oldest(path.parent)
    return shapes


def _key(description: str) -> str:
    values = description, _code(), str(jax.dtypes.canonicalize_dtype(float))
    return hashlib.sha256("\0".join(values).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Returns a digest of the code that determines shapes, with the versions of its libraries."""
    total = hashlib.sha256(f"jax {jax.__version__}, flax {importlib.metadata.version('flax')}".encode())
    package = pathlib.Path(__file__).parent
    for source in _SOURCES:
        path = package / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(f"\0{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return total.hexdigest()


def _read(path: pathlib.Path) -> Shapes | None:
    """Returns the shapes of a file; None if there is none, or if it is damaged."""
    try:
        stored = parse_json(read_bytes(path, MAX_BYTES))
        return _from_json(stored["shapes"]) if stored["digest"] == _digest(stored["shapes"]) else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _to_json(shapes: Any) -> Any:
    """Returns shapes as JSON: an array is the list of its dtype and its sizes."""
    if isinstance(shapes, Mapping):
        return {name: _to_json(part) for name, part in shapes.items()}
    return [str(shapes.dtype), *shapes.shape]


def _from_json(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _from_json(part) for name, part in content.items()}
    dtype, *shape = content
    return jax.ShapeDtypeStruct(tuple(map(int, shape)), jnp.dtype(dtype))


def _remove_oldest(folder: pathlib.Path) -> None:
    """Removes the oldest files of a folder that has more than `MAX_FILES`."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[MAX_FILES:]:
        path.unlink(missing_ok=True)
