"""Sheets of images for the pages of docs: rows of one size below the headers of their columns, as a small PNG file.

The file is in a folder of the page's name, and the page shows it between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

import argparse
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import measured
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dalle2_jax.cli import args
from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically

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


def add_options(parser: argparse.ArgumentParser, page: str, figures: Mapping[str, Any]) -> None:
    """Adds the options of a program that makes the figures of a page."""
    parser.add_argument("--system", type=args.system, required=True, help=args.SYSTEM)
    parser.add_argument("--page", type=args.path, required=True, help=f"the page, such as {page}")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"of {', '.join(figures)}; may be repeated")
    parser.add_argument("--seed", type=args.seed, default=0, help="random seed (default %(default)s)")


def write(page: pathlib.Path, name: str, sheet: Sheet, description: str) -> None:
    """Writes a figure of a page, shows it there, and prints its path.

    Args:
      page: the page.
      name: of the figure.
      sheet: what it shows.
      description: a sentence, for those who do not see it.
    """
    path = page.with_suffix("") / f"{name}.png"
    write_atomically(path, compressed(rendered(sheet)))
    measured.put(page, name, f"![{description.rstrip('.')}]({path.parent.name}/{path.name})")
    print(path)
