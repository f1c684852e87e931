"""Packed systems at a URL: downloaded once into the user's cache, and compared with their digests.

A packed system's ``digests.json`` lists its files with sizes. The digests detect damage; they are no signature, so what
they show is that the files are those of the server.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dalle2_jax import lock
from dalle2_jax.data.storage.remote import Remote
from dalle2_jax.data.storage.retry import with_retries
from dalle2_jax.errors import UserError
from dalle2_jax.files import cache_folder, write_atomically, written_atomically
from dalle2_jax.workdir import digests

TIMEOUT = 60.0
"""Seconds allowed for each request."""

_PART = 2**24
"""Bytes per request."""

_Answer = TypeVar("_Answer")


def fetch_system(url: str) -> Path:
    """Returns the folder in the cache with the packed system at a URL; downloads it if it is not there yet.

    Its list of files is read from the server each time, so that a changed system is downloaded again.

    Args:
      url: of the folder, ``https://``, ``gs://`` or any other kind that fsspec reads (extra ``remote``).

    Raises:
      UserError: there is no packed system, it is damaged, or the cache has too little space.
    """
    base, remote = url.rstrip("/"), Remote(url)
    manifest = _request(url, lambda: remote.content(f"{base}/{digests.NAME}", digests.LARGEST_MANIFEST))
    identity = hashlib.sha256(base.encode() + b"\n" + manifest).hexdigest()[:32]
    folder = cache_folder("systems") / identity
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock.unfinished(folder.parent, f".{identity}.") as temporary:
        remote.check_parts(f"{base}/{digests.NAME}")
        write_atomically(temporary / digests.NAME, manifest)
        try:
            sizes = digests.sizes(temporary)
            _check_space(url, sum(sizes.values()), folder.parent)
            for name, size in sizes.items():
                _download(remote, f"{base}/{name}", temporary / name, size)
            digests.check(temporary)
        except digests.Damaged as error:
            raise UserError(f"the system at {url} is damaged ({error}): upload it again") from error
        if not folder.is_dir():  # by another process meanwhile
            os.rename(temporary, folder)
    return folder


def _download(remote: Remote, url: str, path: Path, size: int) -> None:
    """Writes the first ``size`` bytes of a file."""
    with written_atomically(path) as file:
        for start in range(0, size, _PART):
            span = (start, min(_PART, size - start))
            file.write(_request(url, lambda span=span: remote.read(url, [span]))[0])


def _request(url: str, attempt: Callable[[], _Answer]) -> _Answer:
    try:
        return with_retries(attempt, TIMEOUT, final=(FileNotFoundError, PermissionError))
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{url} cannot be read ({reason}): it must be a folder that `dalle2 weights pack` wrote"
        ) from error


def _check_space(url: str, size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"the system at {url} has {size:,} bytes, {folder} has space for {free:,}: free some space")
