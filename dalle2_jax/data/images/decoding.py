"""Encoded bytes to square ``uint8`` images: decode, fit, crop.

Image files come from anywhere, so that a file's first bytes decide what reads it: a decoder of one of the six formats
in ``FORMATS``, or none. Width and height are read from the header, and checked, before memory is allocated for pixels.
"""

import io
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dalle2_jax.types import Preprocessing

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CROPS = ("center", "random", "shift")

FORMATS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "WEBP": (b"RIFF",),
}
"""The formats that are decoded, as Pillow names them, and the bytes that a file of each begins with."""

MAX_PIXELS, MAX_ASPECT = 90_000_000, 50
"""Limits on width * height and on longer side / shorter side. Decoding or scaling a larger image exhausts memory."""

_MAX_SCANNED = 30 * MAX_PIXELS
"""Limit on pixels * scans of a JPEG: every scan of a progressive JPEG passes over all pixels."""

_JPEG_END, _JPEG_TAIL, _JPEG_SCAN = b"\xff\xd9", 1024, b"\xff\xda"
_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


class ImageError(ValueError):
    """An image file that is not decoded.

    Attributes:
        cause: ``empty``, ``not an image``, ``far too large`` or ``far too long``.
    """

    def __init__(self, cause: str, details: str) -> None:
        super().__init__(f"not a readable image ({cause}: {details})")
        self.cause = cause


class Header(NamedTuple):
    """The header of an image file: the format, by Pillow's name, and height and width in pixels."""

    format: str
    height: int
    width: int


def reduction(height: int, width: int, side: int) -> int:
    """Returns by how much, 1, 2, 4 or 8, an image may be scaled down and still have ``side`` pixels each way."""
    return next((factor for factor in _REDUCED if min(height, width) // factor >= side), 1)


def header(content: bytes) -> Header:
    """Reads format, height and width of an image file; no pixel is decoded.

    Raises:
        ImageError: the file is of none of ``FORMATS``, its header is damaged, or its image exceeds ``MAX_PIXELS``.
    """
    kind = _format(content)
    try:
        if kind == "WEBP":  # Pillow allocates all pixels when it opens one
            width, height = _webp_size(content)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(content), formats=(kind,)) as file:
                    kind, (width, height) = file.format or kind, file.size
    except Image.DecompressionBombError:
        raise ImageError("far too large", f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # a parser raises any exception for a damaged file
        raise ImageError("not an image", type(error).__name__) from None
    if width < 1 or height < 1:
        raise ImageError("not an image", f"{width} x {height} pixels")
    scans = content.count(_JPEG_SCAN) if kind in ("JPEG", "MPO") else 1
    if width * height > MAX_PIXELS or width * height * scans > _MAX_SCANNED:
        raise ImageError("far too large", f"{width} x {height} pixels")
    return Header(kind, height, width)


def decode(content: bytes, factor: int = 1, found: Header | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image file to RGB, upright by its EXIF, with transparency on white.

    Float gray levels are in 0 to 1 if none is outside, else in 0 to 255. Of an animation the
    first frame is decoded.

    Args:
        content: the file's bytes, of one of ``FORMATS``.
        factor: a JPEG is decoded so many times smaller, 2, 4 or 8, sizes rounded up, which leaves out the fine
            frequencies of its blocks and the time they take. Other kinds come in full.
        found: what `header` returned of the file, so that it is not read again.

    Raises:
        ImageError: the file is of another format, damaged or cut short, larger than ``MAX_PIXELS``, longer for its
            width than ``MAX_ASPECT``, or has levels that are not finite.
    """
    kind, height, width = found or header(content)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError("far too long", f"{width} x {height} pixels")
    try:
        image = _decoded(content, "JPEG" if kind == "MPO" else kind, factor)
    except Exception as error:  # a decoder raises any exception for a damaged file
        raise ImageError("not an image", type(error).__name__) from None
    if max(image.shape[:2]) not in (max(height, width), -(-max(height, width) // factor)):
        raise ImageError("not an image", "the header gives another size than the pixels have")
    return image


def _format(content: bytes) -> str:
    """Returns the format of a file by its first bytes. ImageError if it is none of ``FORMATS``."""
    if not content:
        raise ImageError("empty", "no bytes")
    kind = next((kind for kind, starts in FORMATS.items() if content.startswith(starts)), None)
    if kind is None or (kind == "WEBP" and content[8:12] != b"WEBP"):
        raise ImageError("not an image", f"none of {', '.join(FORMATS)}")
    return kind


def _webp_size(content: bytes) -> tuple[int, int]:
    """Returns width and height of a WebP file (RFC 9649, sections 2.5 to 2.7). An exception if it is damaged."""
    chunk, data = content[12:16], content[20:30]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if chunk == b"VP8L":
        [bits] = struct.unpack_from("<I", data, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"unknown chunk {chunk!r}")


def _decoded(content: bytes, kind: str, factor: int) -> UInt8[np.ndarray, "H W 3"]:
    # cv2 is quicker, but drops transparency, and before version 5 fills what is missing of a cut JPEG with
    # gray; so it decodes complete JPEGs only. Pillow decodes the rest, and rejects cut files.
    if kind == "JPEG" and _JPEG_END in content[-_JPEG_TAIL:]:
        flag = cv2.IMREAD_COLOR_RGB if factor == 1 else _REDUCED[factor]
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
        if image is not None:
            return image if factor == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=(kind,)) as file:
            return to_rgb(file)


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Converts a Pillow image of any mode to RGB, upright by its EXIF, with transparency on white.

    Raises:
        ValueError: a gray level is not finite.
    """
    upright = ImageOps.exif_transpose(image)
    gray = upright.mode.startswith(("I", "F"))
    return np.array(_eight_bits(upright, image.format) if gray else _on_white(upright))


def check_size(height: int, width: int) -> None:
    """Raises ImageError for an image that is too large or too long to be resized."""
    if height < 1 or width < 1:
        raise ImageError("empty", f"{width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise ImageError("far too large", f"{width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError("far too long", f"{width} x {height} pixels")


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Scales gray levels of more bits to RGB of eight; Pillow's conversion would clip them."""
    levels = np.asarray(image, np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("a level is not finite")
    if image.mode == "F":
        top = 1 if 0 <= levels.min() and levels.max() <= 1 else 255
    elif image.mode == "I" and kind in ("TIFF", None):  # 32 bits, of which an unknown number is used
        top = 65535 if levels.max() > 255 else 255
    else:  # of a PNG too, of which older versions of Pillow make 32 bits
        top = 65535
    return Image.fromarray(np.rint(levels * (255 / top)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Scales an image so that its shorter side is ``side``: by area averages down, by cubic splines up."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale == 1:
        return image
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def crop(
    image: UInt8[np.ndarray, "H W 3"], side: int, rng: np.random.Generator | None = None, rounding: str = "floor"
) -> UInt8[np.ndarray, "S S 3"]:
    """Returns a square of ``side`` pixels from the centre, or from a random place with ``rng``.

    ``rounding`` is that of half an odd margin, "floor" or "even" (see `Preprocessing`).
    """
    spare = np.array(image.shape[:2]) - side
    centre = spare // 2 if rounding == "floor" else np.rint(spare / 2).astype(int)
    top, left = centre if rng is None else rng.integers(0, spare + 1)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def padded(image: UInt8[np.ndarray, "H W 3"], margin: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Returns an image with ``margin`` pixels more on every side, which repeat its edge."""
    return np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "edge")


_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def resized(image: UInt8[np.ndarray, "H W 3"], how: Preprocessing, clip_side: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Resizes an image for CLIP; `preprocess` crops it too.

    With Pillow's filters and ``resize`` "shortest" the longer side is int(size * longer / shorter), as in OpenAI's
    code (torchvision's Resize), OpenCLIP and transformers' CLIPImageProcessor: the same uint8 values come out.

    Args:
        image: the image.
        how: the preprocessing.
        clip_side: side of CLIP's input, where ``how`` names no size.
    """
    size = how.size or clip_side
    if how.resample == "area" and how.resize == "shortest":
        return fit(image, size)
    height, width = image.shape[:2]
    shorter = min(height, width)
    new = (int(size * width / shorter), int(size * height / shorter)) if how.resize == "shortest" else (size, size)
    if how.resample == "area":
        down = size * size < height * width
        return cv2.resize(image, new, interpolation=cv2.INTER_AREA if down else cv2.INTER_CUBIC)
    return np.asarray(Image.fromarray(image).resize(new, _PILLOW[how.resample]))


def preprocess(image: UInt8[np.ndarray, "H W 3"], how: Preprocessing, clip_side: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes an image of any size and cuts its centre, as CLIP's input is made. CLIP itself rescales and normalises.

    Args:
        image: the image.
        how: the preprocessing.
        clip_side: side of CLIP's input, where ``how`` names no size.
    """
    return crop(resized(image, how, clip_side), how.side(clip_side), rounding=how.crop_rounding)
