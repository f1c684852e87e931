"""Images as clients send and get them: checked before they are decoded, encoded with their provenance."""

import base64
import binascii
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, PngImagePlugin

from dalle2_jax.data.images import decoding
from dalle2_jax.server.api.errors import invalid

MAX_BYTES = 4 * 2**20
"""Of an image file."""

MAX_SIDE = 4096
"""Of an image, in pixels."""

FORMATS = ("PNG", "JPEG", "WEBP")

TEXT_CHUNK = "dalle2"
"""The PNG text chunk that has an image's provenance, as JSON."""


class Upload(NamedTuple):
    """An image that a client sent.

    Attributes:
      pixels: its colours.
      transparent: where alpha is below one half; None for an image without alpha.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    transparent: Bool[np.ndarray, "H W"] | None


def read_image(content: bytes, param: str) -> Upload:
    """Reads an image file.

    Args:
      content: of the file.
      param: the name of the parameter, for errors.

    Raises:
      ApiError: 400, it is no PNG, JPEG or WebP image, is not square, or is damaged; 413, it is too large.
    """
    if len(content) > MAX_BYTES:
        raise invalid(f"{param} has {len(content)} bytes: at most {MAX_BYTES}", param, "image_too_large", 413)
    try:
        kind, height, width = decoding.header(content)
    except decoding.ImageError as error:
        raise invalid(f"{param} is {error}", param, "invalid_image") from None
    if kind not in FORMATS:
        raise invalid(f"{param} is a {kind} image: use {', '.join(FORMATS)}", param, "invalid_image_format")
    if max(height, width) > MAX_SIDE:
        raise invalid(f"{param} is {width}x{height}: at most {MAX_SIDE} pixels a side", param, "image_too_large", 413)
    if height != width:
        raise invalid(f"{param} is {width}x{height}: it must be square", param, "image_not_square")
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            rgba = np.asarray(image.convert("RGBA"))
    except Exception:  # a decoder raises any exception for a damaged file
        raise invalid(f"{param} is a damaged {kind} image", param, "invalid_image") from None
    return Upload(np.ascontiguousarray(rgba[..., :3]), rgba[..., 3] < 128 if has_alpha else None)


def read_base64(text: str, param: str) -> Upload:
    """Reads an image file that is encoded in base64, with or without a ``data:image/...;base64,`` before it.

    Raises:
      ApiError: as `read_image`; 400, it is no base64. An address is never fetched.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.startswith("data:image/") or not head.endswith(";base64"):
            raise invalid(f"{param} must be a data URL of an image in base64", param, "invalid_base64")
    if "://" in text[:64]:
        raise invalid(f"{param} is an address, which is not fetched: send the image in base64", param, "invalid_base64")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise invalid(f"{param} has more than {MAX_BYTES} bytes", param, "image_too_large", 413)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{param} is not valid base64", param, "invalid_base64") from None
    return read_image(content, param)


def edit_mask(image: Upload, mask: Upload | None) -> Bool[np.ndarray, "H W"]:
    """Returns where an image is regenerated: the transparent part of the mask, or of the image without one.

    Raises:
      ApiError: 400, there is no transparent part, or the mask is of another size.
    """
    chosen, param = (image, "image") if mask is None else (mask, "mask")
    if chosen.pixels.shape != image.pixels.shape:
        sizes = [f"{given.pixels.shape[1]}x{given.pixels.shape[0]}" for given in (image, chosen)]
        raise invalid(
            f"image is {sizes[0]} and mask {sizes[1]}: they must be of one size", "mask", "mask_size_mismatch"
        )
    if chosen.transparent is None or not chosen.transparent.any():
        where = "" if mask is not None else ", and no mask is given"
        raise invalid(f"{param} has no transparent part to regenerate{where}", param, "mask_missing")
    return chosen.transparent


def resized(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "S S 3"]:
    """Returns an image resampled to another size (Lanczos)."""
    if pixels.shape[0] == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def encode_png(pixels: UInt8[np.ndarray, "H W 3"], provenance: Mapping[str, Any] | None = None) -> bytes:
    """Returns a PNG file, with the provenance as the text chunk `TEXT_CHUNK`."""
    text = PngImagePlugin.PngInfo()
    if provenance is not None:
        text.add_itxt(TEXT_CHUNK, json.dumps(provenance))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", pnginfo=text)
    return content.getvalue()


def to_base64(content: bytes) -> str:
    """Returns bytes in base64."""
    return base64.b64encode(content).decode("ascii")
