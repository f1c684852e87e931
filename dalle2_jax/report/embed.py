"""Images of a report, as data URIs: PNG files only, decoded within limits and encoded again."""

import base64
import io
import pathlib
import warnings

from PIL import Image

from dalle2_jax.reading import open_regular
from dalle2_jax.report.model import EmbeddedImage

MAX_BYTES, MAX_PIXELS, MAX_SIDE = 2**25, 40_000_000, 1200
"""Limits on a file and its pixels, and the larger side of an embedded image, in pixels."""


class Budget:
    """Embeds images until they fill the page.

    Args:
      size: bytes of all images.

    Attributes:
      omitted: number of images that were not embedded any more.
    """

    def __init__(self, size: int):
        self._left, self.omitted = size, 0

    def embed(self, path: pathlib.Path, caption: str) -> EmbeddedImage | None:
        """Returns the image of a PNG file; None if the page is full.

        Raises:
          OSError: the file cannot be read, is a link, is too large, or is no PNG file.
        """
        with open_regular(path, MAX_BYTES, follow=False) as file:
            content = file.read()
        image = _decoded(content)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=90, method=4)
        size = len(encoded.getvalue())
        if size > self._left:
            self.omitted += 1
            return None
        self._left -= size
        uri = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        return EmbeddedImage(caption, uri, *image.size)


def _decoded(content: bytes) -> Image.Image:
    """Returns the pixels of a PNG file. OSError if it is none, damaged or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are too many")
            return image.convert("RGB")
    except OSError:
        raise
    except Exception as error:  # a decoder raises any exception for a damaged file
        raise OSError(f"not a readable image ({type(error).__name__})") from None
