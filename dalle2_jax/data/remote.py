"""Files behind a URL, of any file system that fsspec knows: every failure is an OSError, whatever library it is of."""

import contextlib
import glob
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64

from dalle2_jax.data.patience import persistently
from dalle2_jax.types import UserError

LIST_TIMEOUT = 120.0
"""Seconds that listing a folder may take."""

_STAMP_FIELDS = ("mtime", "LastModified", "Last-Modified", "updated", "last_modified", "created", "ETag", "etag")
_AT_ONCE = 32


class Remote:
    """One file system; picklable.

    Args:
        url: of anything there, such as ``gs://bucket/data``.

    Raises:
        UserError: no library for that kind of URL is installed.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._system = url_to_fs(url)[0]
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be read ({error}): install the extra, pip install -e '.[remote]'") from None

    def matching(self, url: str, suffix: str) -> list[str]:
        """Returns the path of a file, or those that a glob matches, or those in a folder that end with ``suffix``."""
        path = self._system._strip_protocol(url)
        if glob.has_magic(path):
            return sorted(self._asked(lambda: self._system.glob(path)))
        if path.endswith(suffix):
            return [path]
        return sorted(info["name"] for info in self._listed(path) if info["name"].endswith(suffix))

    def stamps(self, paths: Sequence[str]) -> Int64[np.ndarray, "files 2"]:
        """Returns the size of each file and what tells its version from others, -1 for those that are not there."""
        folders = sorted({path.rpartition("/")[0] for path in paths})
        told = {info["name"]: info for folder in folders for info in self._listed(folder) if info["size"] is not None}
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # a web server lists no sizes, or nothing
            infos = list(pool.map(lambda path: told.get(path) or self._info(path), paths))
        return np.array([(-1, -1) if info is None else _stamp(info) for info in infos], np.int64).reshape(-1, 2)

    def check_parts(self, path: str) -> None:
        """Raises UserError if the server hands out whole files alone."""
        if len(self._asked(lambda: self._part(path, 0, 1))) > 1:
            raise UserError(
                f"the server of {path} sends whole files and no parts of them: use one that knows range requests, or "
                "copy the shards to disk"
            )

    def read(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns parts of a file, each of (offset, size); shorter ones where the file ends. OSError if it cannot."""
        with _as_os_errors():
            return [self._part(path, offset, size) if size else b"" for offset, size in spans]

    def open(self, path: str) -> "Reader":
        """Opens a file for reading. OSError if it cannot."""
        with _as_os_errors():
            return Reader(self._system.open(path, "rb"))

    def content(self, path: str) -> bytes:
        """Returns a whole file. OSError if it cannot be read."""
        with _as_os_errors():
            return self._system.cat_file(path)

    def write(self, path: str, content: bytes) -> None:
        """Writes a whole file. OSError if it cannot be written."""
        with _as_os_errors():
            self._system.pipe_file(path, content)

    def _part(self, path: str, offset: int, size: int) -> bytes:
        return self._system.cat_file(path, start=offset, end=offset + size)  # by name: s3fs has a version before them

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        try:
            return self._asked(lambda: self._system.ls(folder, detail=True))
        except FileNotFoundError:
            return []

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            info = self._asked(lambda: self._system.info(path))
        except FileNotFoundError:
            return None
        return info if info.get("size") is not None else None

    def _asked(self, question: Callable[[], Any]) -> Any:
        """Returns an answer. UserError if there is none; FileNotFoundError if that is the answer."""

        def ask() -> Any:
            with _as_os_errors():
                return question()

        try:
            return persistently(ask, LIST_TIMEOUT, final=(FileNotFoundError, PermissionError))
        except FileNotFoundError:
            raise
        except OSError as error:
            protocol = self._system.protocol
            name = protocol if isinstance(protocol, str) else protocol[0]
            raise UserError(f"{name}:// gives no answer ({str(error).splitlines()[0]})") from None


class Reader:
    """An open remote file, as tarfile reads it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes. OSError if they cannot be had."""
        with _as_os_errors():
            return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Makes OSErrors of whatever the libraries of file systems raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _stamp(info: dict[str, Any]) -> tuple[int, int]:
    changes = repr([str(info.get(field)) for field in _STAMP_FIELDS])
    return info["size"], zlib.crc32(changes.encode())
