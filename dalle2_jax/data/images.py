"""Encoded bytes to square ``uint8`` pictures: decode, fit, crop."""

import io
import warnings

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CROPS = ("center", "random")

_JPEG = b"\xff\xd8"
_JPEG_END, _JPEG_TAIL = b"\xff\xd9", 1024
_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


def reduction(height: int, width: int, side: int) -> int:
    """Returns by how much, 1, 2, 4 or 8, a picture may be scaled down and still have ``side`` pixels each way."""
    return next((factor for factor in _REDUCED if min(height, width) // factor >= side), 1)


def decode(content: bytes, factor: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture file to RGB, upright as its EXIF says; transparency is laid on white.

    Gray levels that are floats are taken to be of 0 to 1 if none lies outside, else of 0 to 255.

    Args:
        factor: a JPEG is decoded so many times smaller, 2, 4 or 8, sizes rounded up, which leaves out the fine
            frequencies of its blocks and the time they take. Other kinds come in full.

    Raises:
        ValueError: when the bytes are not a whole picture, or one with levels that are not finite.
    """
    # cv2 is quicker, but drops transparency, and before version 5 fills what is missing of a cut JPEG with
    # gray; so it gets whole JPEGs only. Pillow decodes the rest, and refuses a cut file.
    if content.startswith(_JPEG) and _JPEG_END in content[-_JPEG_TAIL:]:
        flag = cv2.IMREAD_COLOR_RGB if factor == 1 else _REDUCED[factor]
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
        if picture is not None:
            return picture if factor == 1 else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as file:
                upright = ImageOps.exif_transpose(file)
                gray = upright.mode.startswith(("I", "F"))
                return np.asarray(_eight_bits(upright, file.format) if gray else _on_white(upright))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Warning) as error:
        raise ValueError(f"not a readable picture ({type(error).__name__})") from None


def _eight_bits(picture: Image.Image, kind: str | None) -> Image.Image:
    """Scales gray levels of more bits to RGB of eight; Pillow's conversion would clip them."""
    levels = np.asarray(picture, np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("a level is not finite")
    if picture.mode == "F":
        top = 1 if 0 <= levels.min() and levels.max() <= 1 else 255
    elif picture.mode == "I" and kind == "TIFF":  # 32 bits, and nothing tells how many of them are used
        top = 65535 if levels.max() > 255 else 255
    else:  # of a PNG too, of which older versions of Pillow make 32 bits
        top = 65535
    return Image.fromarray(np.rint(levels * (255 / top)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit(picture: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Scales a picture so that its shorter side is ``side``: by area averages down, by cubic splines up."""
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    if scale == 1:
        return picture
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def crop(
    picture: UInt8[np.ndarray, "H W 3"], side: int, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "S S 3"]:
    """Cuts a square of ``side`` pixels from the centre, or from a place drawn with ``rng``."""
    spare = np.array(picture.shape[:2]) - side
    top, left = spare // 2 if rng is None else rng.integers(0, spare + 1)
    return np.ascontiguousarray(picture[top : top + side, left : left + side])
