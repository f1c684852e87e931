"""Images, masks and captions as users give them, checked and converted to what the stages read.

An image is a Pillow image, a path, an open file, the bytes of an image file, or a uint8 array: [H, W] and [H, W, 1]
(grey), [H, W, 3] (RGB), [H, W, 4] (RGBA, laid on white). Several are a list or tuple of any of these, or one uint8
array [N, H, W, C]. Arrays of other types are rejected: their range is unknown.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from dalle2_jax.data.images import decoding
from dalle2_jax.errors import DataError, UsageError, shown
from dalle2_jax.reading import read_bytes

ImageLike = Image.Image | str | os.PathLike[str] | BinaryIO | bytes | np.ndarray
"""One image. A jax array, or any object with ``__array__``, is accepted in place of a NumPy array."""

ImagesLike = ImageLike | list[ImageLike] | tuple[ImageLike, ...]
"""One or several images."""

MAX_CAPTION = 10_000
"""Characters of a caption; no text encoder reads as many."""

MAX_FILE = 2**30
"""Bytes of an image file that is read from an open file."""

_CHANNELS = (1, 3, 4)


class InputImage(NamedTuple):
    """An image that a user gave.

    Attributes:
      pixels: uint8[H, W, 3].
      name: its path, or a digest of its pixels if it was given in memory.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    name: str

    @property
    def short_name(self) -> str:
        """The name without folders."""
        return self.name.rpartition("/")[2]


def read_images(images: ImagesLike) -> list[InputImage]:
    """Reads one or several images.

    Raises:
      DataError: an image cannot be read, is too large, or is an array of another type or shape.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise DataError("the list of images is empty")
        return [read_image(image) for image in images]
    if not _is_encoded(images) and not isinstance(images, Image.Image):
        array = _as_array(images)
        if array.ndim == 4:
            return [_from_array(image) for image in array]
    return [read_image(images)]


def read_image(image: ImageLike) -> InputImage:
    """Reads one image.

    Raises:
      DataError: it cannot be read, is too large, or is an array of another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image).expanduser())
    if isinstance(image, bytes | bytearray):
        return _in_memory(_decode(bytes(image), None))
    if isinstance(image, Image.Image):
        return _in_memory(_from_pillow(image))
    if _is_encoded(image):
        content = cast(BinaryIO, image).read(MAX_FILE + 1)
        if not isinstance(content, bytes):
            raise DataError("an image file must be opened in binary mode: open(path, 'rb')")
        return _in_memory(_decode(content, None))
    return _from_array(_as_array(image))


def read_mask(mask: ImageLike, image: InputImage) -> Bool[np.ndarray, "H W"]:
    """Reads an inpainting mask.

    Args:
      mask: an image, or a bool array [H, W]: white, or True, where the image is regenerated.
      image: the image that it belongs to.

    Returns:
      True where the image is regenerated.

    Raises:
      DataError: it cannot be read, is of another size than the image, or is black everywhere.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = np.where(mask, np.uint8(255), np.uint8(0))
    given = read_image(mask)
    if given.pixels.shape != image.pixels.shape:
        sizes = " and ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (image.pixels, given.pixels))
        raise DataError(f"image and mask differ in size ({sizes}): make a mask of the size of the image", given.name)
    regenerated = given.pixels.max(axis=2) >= 128
    if not regenerated.any():
        raise DataError(
            f"the mask {given.name} is black everywhere: make it white where the image is regenerated", given.name
        )
    return regenerated


def read_captions(captions: str | Sequence[str]) -> list[str]:
    """Returns one or several captions as a list.

    Raises:
      UsageError: one is no text, is too long, or is not valid Unicode.
    """
    several = [captions] if isinstance(captions, str) else list(captions)
    if not several:
        raise UsageError("the list of captions is empty")
    for number, caption in enumerate(several):
        check_caption(caption, f"caption {number}")
    return several


def check_caption(caption: Any, what: str = "the caption") -> None:
    """Raises UsageError unless ``caption`` is a valid caption."""
    if not isinstance(caption, str):
        raise UsageError(f"{what} must be a str, not {shown(caption)}")
    if len(caption) > MAX_CAPTION:
        raise UsageError(f"{what} has {len(caption)} characters: the maximum is {MAX_CAPTION}")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UsageError(f"{what} is not UTF-8 text: {ascii(caption)[:100]}")


def fit(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Scales an image so that its shorter side is ``side``."""
    return decoding.fit(pixels, side)


def square(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "S S 3"]:
    """Scales an image so that its shorter side is ``side`` and cuts its centre."""
    return decoding.crop(decoding.fit(pixels, side), side)


def _is_encoded(image: Any) -> bool:
    """Whether ``image`` is a path, a file's content, or an open file."""
    return isinstance(image, str | os.PathLike | bytes | bytearray) or callable(getattr(image, "read", None))


def _from_file(path: Path) -> InputImage:
    if not path.is_file():
        raise DataError(f"there is no image file {path}", path)
    return InputImage(_decode(read_bytes(path), path), str(path))


def _decode(content: bytes, path: Path | None) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decoding.decode(content)
    except ValueError as error:
        raise DataError(f"{path or 'the image file'} is {error}", path) from error


def _in_memory(pixels: UInt8[np.ndarray, "H W 3"]) -> InputImage:
    height, width, _ = pixels.shape
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return InputImage(pixels, f"{width}x{height} image, sha256 {digest[:16]}")


def _from_pillow(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    _check_size(image.height, image.width)
    try:
        return decoding.to_rgb(image)
    except (ValueError, OSError) as error:
        raise DataError(f"the image cannot be read ({error})") from error


def _as_array(image: Any) -> np.ndarray:
    """Returns ``image`` as an array. DataError if it is no image, or its values are not uint8."""
    array = np.asarray(image) if hasattr(image, "__array__") else None
    if array is None:
        kinds = "a path, a Pillow image, an open file or a uint8 array"
        raise DataError(f"an image must be {kinds}, not {type(image).__name__}")
    if array.dtype == np.uint8:
        return array
    values = "floats" if np.issubdtype(array.dtype, np.floating) else f"{array.dtype} values"
    raise DataError(
        f"an image array must be uint8, from 0 to 255, and this one has {values} {_range(array)}: convert it with "
        f"{_conversion(array)}"
    )


def _range(array: np.ndarray) -> str:
    if not array.size or array.dtype == object or array.dtype == bool:
        return "of unknown range"
    return f"from {array.min():g} to {array.max():g}"


def _conversion(array: np.ndarray) -> str:
    """Returns the expression that most likely makes a uint8 image of an array."""
    if np.issubdtype(array.dtype, np.floating) and array.size:
        low, high = float(array.min()), float(array.max())
        if low < 0 and low >= -1 and high <= 1:
            return "np.round((x + 1) * 127.5).astype(np.uint8)"
        if low >= 0 and high <= 1:
            return "np.round(x * 255).astype(np.uint8)"
        return "np.round(np.clip(x, 0, 255)).astype(np.uint8)"
    return "x.astype(np.uint8)"


def _from_array(array: UInt8[np.ndarray, "..."]) -> InputImage:
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in _CHANNELS:
        transposed = array.ndim == 3 and array.shape[0] in _CHANNELS
        hint = "transpose it with x.transpose(1, 2, 0)" if transposed else "several are a list, or [N, H, W, C]"
        raise DataError(f"an image array must be [H, W] or [H, W, C] with C 1, 3 or 4, not {array.shape}: {hint}")
    _check_size(*array.shape[:2])
    if array.shape[2] == 4:
        return _in_memory(_from_pillow(Image.fromarray(np.ascontiguousarray(array))))
    return _in_memory(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def _check_size(height: int, width: int) -> None:
    try:
        decoding.check_size(height, width)
    except decoding.ImageError as error:
        raise DataError(f"the image is {error}") from error
