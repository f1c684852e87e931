"""Atomic writes: a file appears under its name only when complete. Also PNG images and captioned grids."""

import contextlib
import errno
import io
import os
import secrets
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_CELL, _LETTERS, _LINE, _LINES, _PAD = 144, 23, 13, 4, 6
"""Minimum width of a grid cell, letters per line of its caption, line height, lines, and gap; in pixels."""

UNFINISHED = ".part"
"""Suffix of the hidden file that is renamed when it is complete."""

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that it appears under its name only when complete; makes its folder if needed."""
    with written_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a file to write, as `write_atomically` does. OSError names the file when the disk is full."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _temporary_file(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        reason = disk_full(error)
        if reason:
            raise OSError(f"{path} cannot be written ({reason})") from error
        raise


def _temporary_file(target: Path) -> tuple[int, Path]:
    """Makes a hidden file in the folder of ``target`` and returns it, opened for writing.

    The operating system applies the umask to its mode, unlike to that of ``tempfile.mkstemp``, which is 0600.
    """
    path = target.with_name(_unpredictable(target.name))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), path


def _unpredictable(name: str) -> str:
    """Returns an unpredictable hidden name, so that no link can be put there first."""
    return f".{name}.{secrets.token_hex(8)}{UNFINISHED}"


def disk_full(error: BaseException) -> str | None:
    """Returns the system's message if an error is due to a full disk or quota, else None."""
    return next((reason for reason in _FULL if reason in str(error)), None)


def cache_folder(name: str) -> Path:
    """Returns the folder of one kind of cached file, in the user's cache.

    A user without a home folder, as in many containers, has no cache: reading and writing there raises OSError, as in
    a folder without permissions.
    """
    configured = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(configured) if configured else Path.home() / ".cache"
    except RuntimeError:
        base = Path(os.devnull)
    return base / "dalle2_jax" / name


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a .npy file, as `write_atomically` does."""
    with written_atomically(path) as file:
        # without a file descriptor numpy calls write, whose error has a cause; its own error for a full disk has none
        writer: Any = SimpleNamespace(write=file.write)
        np.save(writer, array, allow_pickle=False)


def write_png(path: str | Path, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes an image as PNG, as `write_atomically` does."""
    content = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(content, "PNG")
    write_atomically(path, content.getvalue())


def captioned_grid(
    images: Sequence[UInt8[np.ndarray, "H W 3"]], captions: Sequence[str], columns: int = 6
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Returns images side by side, each above its caption. Small ones are enlarged by an integer factor."""
    scale = max(1, round(_CELL / images[0].shape[1]))
    width, image_height = images[0].shape[1] * scale, images[0].shape[0] * scale
    columns = min(len(images), columns)
    rows = -(-len(images) // columns)
    height = image_height + _LINES * _LINE
    sheet = Image.new("RGB", (columns * (width + _PAD) + _PAD, rows * (height + _PAD) + _PAD), (235, 235, 235))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = (place % columns) * (width + _PAD) + _PAD, (place // columns) * (height + _PAD) + _PAD
        enlarged = Image.fromarray(np.asarray(image)).resize((width, image_height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        letters = _LETTERS * width // _CELL
        lines = textwrap.wrap(caption or "(no caption)", letters, max_lines=_LINES, placeholder=" ...")
        pen.text((left, top + image_height + 2), "\n".join(lines), fill=(20, 20, 20), font=font, spacing=1)
    return np.asarray(sheet)
