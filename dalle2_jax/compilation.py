"""The cache of compiled programs on disk."""

import os
import pathlib

import jax

from dalle2_jax.files import cache_folder


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
