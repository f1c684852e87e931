"""Reading untrusted files: regular files only, of a bounded size, and JSON of a bounded depth."""

import errno
import io
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from dalle2_jax.errors import UserError, shown

MAX_TEXT = 100_000_000
"""Maximum bytes of a text file that a user gives."""

MAX_DEPTH = 64
"""Maximum levels of lists and objects in a JSON document."""


def open_regular(path: str | Path, limit: int | None = None, follow: bool = True) -> BinaryIO:
    """Opens a regular file for reading; does not wait for the writer of a named pipe.

    Args:
      path: of the file.
      limit: maximum size in bytes; None for any size.
      follow: whether ``path`` may be a symbolic link.

    Raises:
      OSError: the file cannot be opened, is not a regular file, or has more bytes than ``limit`` (errno EFBIG).
    """
    extra = os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra))
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    raise OSError(errno.EFBIG, f"More than the expected {limit} bytes", str(path))


def check_regular(path: str | Path) -> None:
    """Raises OSError unless there is a regular file at ``path``. Call it before a library opens the file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Returns the content of a regular file. OSError if it cannot be read, or has more bytes than ``limit``."""
    with open_regular(path, limit) as file:
        return file.read()


def read_text(path: str | Path) -> str:
    """Returns the content of a regular file of UTF-8. OSError if it cannot be read, UnicodeDecodeError if it is not."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8").read()


def read_users_text(path: str | Path) -> str:
    """Returns the content of a text file of UTF-8, with or without a byte order mark.

    Raises:
      UserError: it is of another encoding, in which case the message names the line, or larger than `MAX_TEXT`.
      OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise UserError(f"{path} has more than {MAX_TEXT} bytes of text: split it")
    start = content.find(b"\0")  # as in UTF-16
    if start < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            start = error.start
    line = content.count(b"\n", 0, start) + 1
    raise UserError(f"{path} is not UTF-8 text (byte 0x{content[start]:02x} in line {line}): save it as UTF-8")


def parse_json(content: bytes | str, finite: bool = False) -> Any:
    """Returns the value of a JSON document.

    Args:
      content: the text of the document.
      finite: whether numbers must be finite: Python reads NaN and Infinity, which are not JSON, and 1e999 as infinity.

    Raises:
      json.JSONDecodeError: it is not JSON, or nested deeper than `MAX_DEPTH` levels.
      ValueError: a number is not finite although ``finite`` is set.
    """
    deep = "is nested too deeply"
    number = _finite if finite else None
    try:
        value = json.loads(content, parse_constant=number, parse_float=number)
    except RecursionError:
        raise json.JSONDecodeError(deep, "", 0) from None
    if isinstance(content, bytes):
        opened = content.count(b"[") + content.count(b"{")
    else:
        opened = content.count("[") + content.count("{")
    nested = [value] if opened > MAX_DEPTH else []
    for _ in range(MAX_DEPTH):
        outer = [inner for inner in nested if isinstance(inner, dict | list)]
        nested = [inner for each in outer for inner in (each.values() if isinstance(each, dict) else each)]
    if any(isinstance(inner, dict | list) for inner in nested):
        raise json.JSONDecodeError(deep, "", 0)
    return value


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(word)} is not finite")
    return number
