"""`Images`: generated images, with what is needed to generate each of them again."""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dalle2_jax.errors import UsageError
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.ranges import Range

_GAP, _BACKGROUND, _CELL = 2, 235, 144
"""Of grids without captions: space between images in pixels, grey level; and the least width of an animated image."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Images(Sequence[Image.Image]):
    """Generated images: a sequence of Pillow images.

    Attributes:
      numpy: the images as one array.
      captions: what the grid shows below each image.
      provenance: what was called, the checkpoints, the seed, the sampling config of each stage, and the
        file name, caption, index and sample of each image: enough to generate every image again. It is what
        ``samples.json`` holds.
      columns: images per row of the grid, by default.
    """

    numpy: UInt8[np.ndarray, "N H W 3"]
    captions: tuple[str, ...]
    provenance: Mapping[str, Any]
    columns: int = 4

    def __len__(self) -> int:
        return len(self.numpy)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> "Images": ...

    def __getitem__(self, index: int | slice) -> "Image.Image | Images":
        """Returns an image, or a part of the images with their part of the provenance."""
        if not isinstance(index, slice):
            return Image.fromarray(self.numpy[index])
        provenance = {**self.provenance, "pictures": self.provenance["pictures"][index]}
        return Images(self.numpy[index], self.captions[index], provenance, self.columns)

    def __repr__(self) -> str:
        count, height, width, _ = self.numpy.shape
        call, seed = self.provenance["command"], self.provenance["seed"]
        return f"Images({count} of {width}x{height} by {call}, seed {seed})"

    def grid(self, columns: int | None = None, captions: bool = True) -> Image.Image:
        """Returns all images side by side.

        Args:
          columns: images per row.
          captions: whether each image's caption is written below it.
        """
        columns = columns or self.columns
        if captions:
            return Image.fromarray(captioned_grid(list(self.numpy), self.captions, columns))
        return Image.fromarray(_plain_grid(self.numpy, columns))

    def animate(self, path: str | os.PathLike[str], *, fps: float = 8.0, boomerang: bool = True) -> Path:
        """Writes the images as an animation; of several sequences, all side by side.

        Args:
          path: a file that ends in .webp or .gif.
          fps: frames per second, from 0.1 to 100.
          boomerang: whether the frames are shown backwards after the last one.

        Returns:
          The path.

        Raises:
          UsageError: the name has another ending, or ``fps`` is out of range.
        """
        target = Path(path).expanduser()
        kind = {".webp": "WEBP", ".gif": "GIF"}.get(target.suffix.lower())
        if kind is None:
            raise UsageError(f"{target} is no animation: give a file that ends in .webp or .gif")
        if fps not in Range(0.1, 100):
            raise UsageError(f"fps must be {Range(0.1, 100)}, got {fps}")
        columns = min(self.columns, len(self))
        frames = [_plain_grid(_enlarged(self.numpy[frame::columns]), len(self)) for frame in range(columns)]
        if boomerang:
            frames += frames[-2:0:-1]
        first, *others = (Image.fromarray(frame) for frame in frames)
        content = io.BytesIO()
        first.save(
            content, kind, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, lossless=True
        )
        write_atomically(target, content.getvalue())
        return target

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``<index>_<sample>.png`` for each image, ``grid.png`` and ``samples.json``; returns the folder.

        Every file appears under its name only when it is complete.
        """
        folder = Path(folder).expanduser()
        for about, pixels in zip(self.provenance["pictures"], self.numpy, strict=True):
            write_png(folder / about["file"], pixels)
        self.save_summary(folder)
        return folder

    def save_summary(self, folder: Path) -> None:
        """Writes ``grid.png`` and ``samples.json`` alone."""
        write_png(folder / "grid.png", np.asarray(self.grid()))
        write_atomically(folder / "samples.json", json.dumps(self.provenance, indent=2))

    def _repr_png_(self) -> bytes:
        """Returns the grid as a PNG file, which notebooks display."""
        content = io.BytesIO()
        self.grid().save(content, "PNG")
        return content.getvalue()


def _enlarged(images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H2 W2 3"]:
    """Returns images of fewer than `_CELL` pixels enlarged by an integer factor."""
    factor = max(1, round(_CELL / images.shape[2]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _plain_grid(images: UInt8[np.ndarray, "N H W 3"], columns: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
    sheet = np.full(shape, _BACKGROUND, np.uint8)
    for place, image in enumerate(images):
        top, left = (place // columns) * (height + _GAP), (place % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet
