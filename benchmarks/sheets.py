"""Sheets of images for the pages of docs: rows of one size below the headers of their columns, as a small PNG file."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dalle2_jax.errors import UserError

MAX_BYTES = 60_000
"""Largest size of a file: 256 colours, then as few as it takes."""

GAP, HEADER = 2, 14
BACKGROUND, INK = (235, 235, 235), (20, 20, 20)


class Sheet(NamedTuple):
    """Rows of images of one size, and a header of each column."""

    rows: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]]
    headers: Sequence[str]


def rendered(sheet: Sheet) -> Image.Image:
    """Returns the rows of a sheet below the headers of their columns."""
    height, width, _ = sheet.rows[0][0].shape
    top = HEADER if any(sheet.headers) else 0
    size = (len(sheet.headers) * (width + GAP) - GAP, top + len(sheet.rows) * (height + GAP) - GAP)
    image = Image.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for column, header in enumerate(sheet.headers):
        pen.text((column * (width + GAP) + width // 2, HEADER // 2), header, fill=INK, font=font, anchor="mm")
    for number, row in enumerate(sheet.rows):
        for column, pixels in enumerate(row):
            place = (column * (width + GAP), top + number * (height + GAP))
            image.paste(Image.fromarray(np.asarray(pixels)), place)
    return image


def compressed(image: Image.Image) -> bytes:
    """Returns a PNG file of at most `MAX_BYTES`, with 256 colours or fewer.

    Raises:
      UserError: 16 colours take more.
    """
    for colours in (256, 128, 64, 32, 16):
        content = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
        if len(content.getvalue()) <= MAX_BYTES:
            return content.getvalue()
    raise UserError(f"a figure of {image.width} x {image.height} pixels takes more than {MAX_BYTES} bytes")
