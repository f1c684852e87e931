"""Images and captions in memory as a `Source`: numpy arrays, PIL images, or any sequence of examples.

`as_source` turns what a user has into a source. Every error is a `DataError` that names the example at fault.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.records import Record, RejectionCounts, captions_in, spread
from dalle2_jax.data.images.rejections import MAX_REJECTED
from dalle2_jax.data.images.source import ImageSource
from dalle2_jax.data.opening import source_named
from dalle2_jax.data.sources import Source
from dalle2_jax.errors import DataError, shown

_IMAGES, _CAPTIONS = ("image", "img", "images"), ("caption", "text", "captions")
"""Names of the fields of an example, in the order in which they are looked for."""


@runtime_checkable
class SupportsArray(Protocol):
    """An object that NumPy can convert to an array, such as a tensor of torch or JAX."""

    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class Examples(Protocol):
    """Random access to examples: a list of mappings, a torch data set, a Hugging Face ``datasets.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ArrayRecords:
    """A `Records` of images and captions in two sequences.

    Args:
        images: uint8[N, H, W, 3], or a sequence of arrays uint8[H, W, 3] or PIL images, of any sizes.
        captions: for each image a string, or a list of strings.

    Raises:
        DataError: the lengths differ, there are no images, or the array is not uint8[N, H, W, 3].
    """

    def __init__(self, images: Any, captions: Any) -> None:
        _check_sequence("image", images)
        _check_sequence("caption", captions)
        if len(images) != len(captions):
            raise DataError(f"data has {len(images)} images and {len(captions)} captions: give one caption per image")
        if not len(images):
            raise DataError("data has no images: give at least one")
        if isinstance(images, np.ndarray):
            if images.ndim != 4:
                raise DataError(f"data['image'] must be uint8[N, H, W, 3], got {_described(images)}")
            _check_image(images[0], "data['image'][0]")
        self._images, self._captions = images, captions
        self.rejections = RejectionCounts()
        _image(images[0], "data['image'][0]")
        _texts(captions[0], "data['caption'][0]")

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return f"ArrayRecords({len(self)} images)"

    def read(self, index: int) -> Record:
        """Returns an image and its captions. DataError if they are of a wrong type."""
        image = _image(self._images[int(index)], f"data['image'][{index}]")
        return Record(str(index), image, _texts(self._captions[int(index)], f"data['caption'][{index}]"), {})

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` images, evenly spread over the data."""
        for index in spread(len(self), limit):
            yield from _texts(self._captions[index], f"data['caption'][{index}]")


class ExampleRecords:
    """A `Records` of examples that an object returns by index, each a mapping with an image and a caption.

    Args:
        examples: the object. Worker processes (``config.workers``) need one that can be pickled.

    Raises:
        DataError: there are no examples, or the first has no image or no caption.
    """

    def __init__(self, examples: Examples) -> None:
        self._examples, self.rejections = examples, RejectionCounts()
        if not len(examples):
            raise DataError("data has no examples: give at least one")
        first = self._mapping(0)
        self._image, self._caption = _field(first, _IMAGES, "image"), _field(first, _CAPTIONS, "caption")
        self.read(0)

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"ExampleRecords({len(self)} examples of {type(self._examples).__name__})"

    def read(self, index: int) -> Record:
        """Returns the image and the captions of an example. DataError if they are missing or of a wrong type."""
        one = self._mapping(index)
        for name in (self._image, self._caption):
            if name not in one:
                raise DataError(f"data[{index}] has no {name!r}, which data[0] has: give every example the same fields")
        image = _image(one[self._image], f"data[{index}][{self._image!r}]")
        return Record(str(index), image, _texts(one[self._caption], f"data[{index}][{self._caption!r}]"), {})

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` examples, evenly spread over the data."""
        for index in spread(len(self), limit):
            yield from _texts(self._mapping(index).get(self._caption), f"data[{index}][{self._caption!r}]")

    def _mapping(self, index: int) -> Mapping[str, Any]:
        one = self._examples[int(index)]
        if not isinstance(one, Mapping):
            raise DataError(
                f"data[{index}] must be a mapping such as {{'image': ..., 'caption': ...}}, got {_described(one)}"
            )
        return one


class ArraySource(ImageSource):
    """A `Source` of images and captions in memory, resized and cropped to one size.

    Args:
        data: ``{"image": uint8[N, H, W, 3] or a sequence of images, "caption": a sequence of captions}``. An image is
            uint8[H, W, 3] or a PIL image, a caption a string or a list of strings.
        resolution: side of the images in pixels; None for the shorter side of the first image.
        crop: "center", "random" or "shift".
        max_rejected: rejection rate above which a run ends (see `ImageSource`).

    Raises:
        DataError: a field is missing, or of a wrong type or length.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        resolution: int | None = None,
        crop: str = "center",
        max_rejected: float = MAX_REJECTED,
    ) -> None:
        records = ArrayRecords(*(data[_field(data, names, names[0])] for names in (_IMAGES, _CAPTIONS)))
        super().__init__(records, resolution or _side(records), crop, max_rejected=max_rejected)


def as_source(
    data: Any,
    resolution: int | None = None,
    split: str = "train",
    crop: str = "center",
    max_rejected: float = MAX_REJECTED,
) -> Source:
    """Returns the `Source` of whatever holds a user's images and captions.

    Args:
        data: a `Source`, which is returned unchanged; the path of a data set or KIND:PATH (see `source_named`); a
            mapping of columns (see `ArraySource`); or an object with ``__len__`` and ``__getitem__`` that returns
            mappings with an image and a caption, such as a list, a torch data set or a Hugging Face ``Dataset``.
        resolution: side of the images in pixels; None for the shorter side of the first image, or 64 at a path.
        split: of a data set at a path.
        crop: "center", "random" or "shift", of data in memory.
        max_rejected: rejection rate above which a run ends (see `ImageSource`).

    Raises:
        DataError: ``data`` is none of these, or its images or captions are of a wrong type.
        UserError: there is no data set at a path.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        return source_named(str(os.fspath(data)), split, resolution or 64, max_rejected)
    if isinstance(data, Mapping):
        return ArraySource(data, resolution, crop, max_rejected)
    if not isinstance(data, Examples) or isinstance(data, bytes | np.ndarray):
        raise DataError(
            "data must be a path, a mapping with 'image' and 'caption', or a sequence of such mappings, got "
            f"{_described(data)}"
        )
    records = ExampleRecords(data)
    return ImageSource(records, resolution or _side(records), crop, max_rejected=max_rejected)


def _side(records: ArrayRecords | ExampleRecords) -> int:
    image = records.read(0).image
    assert isinstance(image, np.ndarray)
    return min(image.shape[:2])


def _field(fields: Mapping[str, Any], names: Sequence[str], what: str) -> str:
    """Returns the first of some names that a mapping has. DataError if it has none."""
    found = next((name for name in names if name in fields), None)
    if found is None:
        raise DataError(f"data has no {what}, only {', '.join(map(str, fields)) or 'nothing'}: name a field {what!r}")
    return found


def _check_sequence(name: str, values: Any) -> None:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Examples):
        raise DataError(f"data[{name!r}] must be a sequence with one {name} per example, got {_described(values)}")


def _image(value: Any, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image as RGB, with transparency on white. DataError if it is not a PIL image or uint8[H, W, 3]."""
    if isinstance(value, Image.Image):
        try:
            return decoding.to_rgb(value)
        except Exception as error:  # Pillow decodes files only now, and raises any exception for a damaged one
            reason = str(error).partition("\n")[0]
            raise DataError(f"{where} cannot be converted to RGB ({reason}): fix or remove it") from error
    if not isinstance(value, np.ndarray):
        if isinstance(value, str | bytes | Path) or not isinstance(value, SupportsArray):
            raise DataError(f"{where} must be uint8[H, W, 3] or a PIL image, got {_described(value)}")
        value = np.asarray(value)  # a tensor of torch or JAX
    _check_image(value, where)
    return value


def _check_image(value: np.ndarray, where: str) -> None:
    if value.dtype != np.uint8:
        hint = "convert floats by (255 * image).round().astype(np.uint8) if they are in [0, 1]"
        if value.dtype.kind != "f":
            hint = "convert it by image.astype(np.uint8) if its levels are 0 to 255"
        raise DataError(f"{where} must be uint8[H, W, 3], got {_described(value)}: {hint}")
    if value.ndim != 3 or value.shape[2] != 3 or not value.size:
        hint = "repeat grey levels by np.stack([image] * 3, axis=-1)"
        if value.ndim == 3 and value.shape[2] == 4:
            hint = "give RGBA as Image.fromarray(image), or drop the last channel"
        elif value.ndim == 3 and value.shape[0] == 3:
            hint = "put the channels last by image.transpose(1, 2, 0)"
        raise DataError(f"{where} must be uint8[H, W, 3], got {_described(value)}: {hint}")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """Returns the captions of an example. DataError if it is not a string or a list of strings."""
    if isinstance(value, tuple | np.ndarray):
        value = list(value)
    try:
        return captions_in(value)
    except TypeError:
        raise DataError(f"{where} must be a string or a list of strings, got {shown(value)}") from None


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__
