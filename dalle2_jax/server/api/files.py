"""Images that were answered as ``url``: files with unpredictable names, for a limited time."""

import contextlib
import os
import re
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import cast

from dalle2_jax.server.engine import Closing

MAX_BYTES = 2**30
"""Of all files; the oldest are removed first."""

_NAME = re.compile(r"[0-9a-f]{32}")


class FileStore:
    """Image files in a folder, after `open`. Its methods may be called from several threads.

    Args:
      folder: where the files are; None makes a temporary folder, which `close` removes.
      seconds: how long a file is kept.
      max_bytes: of all files.
    """

    def __init__(self, folder: Path | None, seconds: float, max_bytes: int = MAX_BYTES):
        self._folder, self._temporary = folder, None
        self._seconds, self._max_bytes = seconds, max_bytes
        self._writing, self._closed = threading.Lock(), False

    def open(self) -> None:
        """Makes the folder."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dalle2-files-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> str:
        """Stores a PNG file and returns its name; it appears under its name only when it is complete.

        Raises:
          Closing: the store was closed.
          OSError: the disk is full.
        """
        with self._writing:
            if self._closed:
                raise Closing("the server is shutting down: try another one")
            self.sweep()
            return self._write(content)

    def _write(self, content: bytes) -> str:
        name = secrets.token_hex(16)
        folder = cast(Path, self._folder)
        path, unfinished = folder / f"{name}.png", folder / f".{name}.part"
        try:
            with open(unfinished, "xb") as file:
                file.write(content)
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return name

    def get(self, name: str) -> bytes | None:
        """Returns the file of a name; None if there is none, or it has expired."""
        if not _NAME.fullmatch(name) or self._folder is None:
            return None
        path = self._folder / f"{name}.png"
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime <= self._seconds:
                return path.read_bytes()
        return None

    def sweep(self) -> None:
        """Removes files that have expired, and the oldest while there are too many bytes.

        Among them are the unfinished files of a server that was killed; those of a replica that is writing are young.
        """
        now, found, folder = time.time(), [], cast(Path, self._folder)
        for path in (*folder.glob("*.png"), *folder.glob(".*.part")):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            if now - changed > self._seconds or total > self._max_bytes:
                path.unlink(missing_ok=True)
                total -= size

    def close(self) -> None:
        """Removes the folder if it is a temporary one, after the file that is being written."""
        with self._writing:
            self._closed = True
            if self._temporary is not None:
                self._temporary.cleanup()
