"""Files behind a URL, on any file system of fsspec. Failures of all its libraries are raised as OSError."""

import contextlib
import glob
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64

from dalle2_jax.data.storage.retry import with_retries
from dalle2_jax.errors import UserError

LIST_TIMEOUT = 120.0
"""Seconds allowed for listing a folder."""

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
            return sorted(self._request(lambda: self._system.glob(path)))
        if path.endswith(suffix):
            return [path]
        return sorted(info["name"] for info in self._listed(path) if info["name"].endswith(suffix))

    def stamps(self, paths: Sequence[str]) -> Int64[np.ndarray, "files 2"]:
        """Returns the size and a checksum of the version of each file, -1 for missing files."""
        folders = sorted({path.rpartition("/")[0] for path in paths})
        listed = {info["name"]: info for folder in folders for info in self._listed(folder) if info["size"] is not None}
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # web servers list no sizes, or nothing
            infos = list(pool.map(lambda path: listed.get(path) or self._info(path), paths))
        return np.array([(-1, -1) if info is None else _stamp(info) for info in infos], np.int64).reshape(-1, 2)

    def check_parts(self, path: str) -> None:
        """Raises UserError if the server does not support range requests."""
        if len(self._request(lambda: self._part(path, 0, 1))) > 1:
            raise UserError(
                f"the server of {path} does not support range requests: use one that does, or copy the shards to disk"
            )

    def read(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns parts of a file, each of (offset, size); shorter ones where the file ends. OSError if it cannot."""
        with _as_os_errors():
            return [self._part(path, offset, size) if size else b"" for offset, size in spans]

    def open(self, path: str) -> "Reader":
        """Opens a file for reading. OSError if it cannot."""
        with _as_os_errors():
            return Reader(self._system.open(path, "rb"))

    def content(self, path: str, limit: int) -> bytes:
        """Returns the content of a file. OSError if it cannot be read, or has more bytes than ``limit``."""
        with _as_os_errors():
            content = self._part(path, 0, limit + 1)
        if len(content) > limit:
            raise OSError(f"{path} has more than {limit} bytes")
        return content

    def write(self, path: str, content: bytes) -> None:
        """Writes a file. OSError if it cannot be written."""
        with _as_os_errors():
            self._system.pipe_file(path, content)

    def _part(self, path: str, offset: int, size: int) -> bytes:
        # by keyword: in s3fs another parameter comes first
        return self._system.cat_file(path, start=offset, end=offset + size)

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        try:
            return self._request(lambda: self._system.ls(folder, detail=True))
        except FileNotFoundError:
            return []

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            info = self._request(lambda: self._system.info(path))
        except FileNotFoundError:
            return None
        return info if info.get("size") is not None else None

    def _request(self, question: Callable[[], Any]) -> Any:
        """Returns the file system's answer. UserError if it gives none; FileNotFoundError if the file is missing."""

        def ask() -> Any:
            with _as_os_errors():
                return question()

        try:
            return with_retries(ask, LIST_TIMEOUT, final=(FileNotFoundError, PermissionError))
        except FileNotFoundError:
            raise
        except OSError as error:
            protocol = self._system.protocol
            name = protocol if isinstance(protocol, str) else protocol[0]
            raise UserError(
                f"{name}:// gives no answer ({str(error).splitlines()[0]}): check network and credentials"
            ) from None


class Reader:
    """An open remote file with the methods that tarfile uses."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes. OSError if they cannot be read."""
        with _as_os_errors():
            return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to an offset."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the offset."""
        return self._file.tell()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Raises the exceptions of file system libraries as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _stamp(info: dict[str, Any]) -> tuple[int, int]:
    changes = repr([str(info.get(field)) for field in _STAMP_FIELDS])
    return info["size"], zlib.crc32(changes.encode())
