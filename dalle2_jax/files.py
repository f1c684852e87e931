"""Writing to disk: whole or not at all. Files, and pictures as PNG and as captioned grids."""

import contextlib
import errno
import io
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_CELL, _LETTERS, _LINE, _LINES, _PAD = 144, 23, 13, 4, 6
"""A grid cell's least width and its caption's letters a line, line height and lines, and the gap, in pixels."""

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
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from colleagues
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        reason = disk_full(error)
        if reason:
            raise OSError(f"{path} cannot be written ({reason})") from error
        raise


def disk_full(error: BaseException) -> str | None:
    """Returns what the system says of a disk or quota that holds no more, where an error tells of it; else None."""
    return next((reason for reason in _FULL if reason in str(error)), None)


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a .npy file, as `write_atomically` does."""
    with written_atomically(path) as file:
        # to a file of the system numpy writes by itself, and has no cause to tell when that fails
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def write_png(path: str | Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes one picture, atomically."""
    content = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(content, "PNG")
    write_atomically(path, content.getvalue())


def captioned_grid(
    pictures: Sequence[UInt8[np.ndarray, "H W 3"]], captions: Sequence[str], columns: int = 6
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Draws pictures side by side, each over its caption. Small ones are enlarged by a whole factor."""
    scale = max(1, round(_CELL / pictures[0].shape[1]))
    width, tall = pictures[0].shape[1] * scale, pictures[0].shape[0] * scale
    columns = min(len(pictures), columns)
    rows = -(-len(pictures) // columns)
    height = tall + _LINES * _LINE
    sheet = Image.new("RGB", (columns * (width + _PAD) + _PAD, rows * (height + _PAD) + _PAD), (235, 235, 235))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (place % columns) * (width + _PAD) + _PAD, (place // columns) * (height + _PAD) + _PAD
        enlarged = Image.fromarray(np.asarray(picture)).resize((width, tall), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        letters = _LETTERS * width // _CELL
        lines = textwrap.wrap(caption or "(no caption)", letters, max_lines=_LINES, placeholder=" ...")
        pen.text((left, top + tall + 2), "\n".join(lines), fill=(20, 20, 20), font=font, spacing=1)
    return np.asarray(sheet)
