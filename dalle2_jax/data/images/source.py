"""Images of one size for training, from records of any format.

A record that cannot be used does not stop a run: the next good one is its substitute, `ImageSource.rejections` counts
the rejected records by cause, and each cause is logged once. Too many of them mean that the data set, or the access to
it, is broken: the run ends with an error.
"""

import copy
import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.data.images.records import REPLACEMENT, Record, Records, Rejected, RejectionCounts
from dalle2_jax.data.images.rejections import MAX_REJECTED, RejectionLog
from dalle2_jax.data.sources import DESCRIPTIVE, Generators, Indices, Rejections, Source, stacked
from dalle2_jax.errors import UserError, printable
from dalle2_jax.types import Preprocessing

_MIN_RECENT, _RECENT = 100, 1000
"""Below the first number of records the rejection rate is not meaningful; the rate is that of the last ``_RECENT``."""

_SIGMAS = 5
"""Standard deviations by which the recent rejection rate must exceed the limit, so that chance alone ends no run."""

_NOT_UTF8 = "not UTF-8 (used)"

_MAX_TRIES = 10_000
"""Records tried as a substitute for one example."""

_LOG = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One example of an `ImageSource`: the values of its columns, their record, and the number of its caption."""

    example: dict[str, Any]
    record: Record
    caption: int


class ImageSource(Source):
    """A `Source` of the images of records, resized and cropped to uint8[resolution, resolution, 3].

    Args:
        records: the encoded images and their captions.
        resolution: side of the images in pixels; the shorter side is resized to it, then the longer is cropped.
        crop: "center", or "random" for another crop each time an example is fetched; "shift" pads the image by an
            eighth of the resolution before, so that square images move too.
        filters: which records are used; others are skipped and not counted as rejected.
        max_rejected: rejection rate, 0 to 1, above which `UserError` is raised.

    Raises:
        UserError: an argument is out of range, or too many records were rejected when the data set was opened.
    """

    def __init__(
        self,
        records: Records,
        resolution: int = 64,
        crop: str = "center",
        filters: Filters = Filters(),
        max_rejected: float = MAX_REJECTED,
    ) -> None:
        check_arguments(resolution, crop, max_rejected)
        self.records, self.resolution, self.crop = records, resolution, crop
        self.filters, self.max_rejected = filters, max_rejected
        self.preprocessing = Preprocessing()
        self.columns = ("image", *DESCRIPTIVE)
        self._at_opening = records.rejections
        self._rejected = RejectionLog()
        self._filtered: set[int] = set()
        self._flawed = RejectionLog()
        self._recent: deque[bool] = deque(maxlen=_RECENT)  # whether each of the last requested records was bad
        self._check_rate()
        if self._at_opening.counts:
            _LOG.warning("%s: rejected at opening: %s", self, self._at_opening)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"ImageSource({self.records!r}, {self.resolution}, {self.crop!r})"

    @property
    def rejections(self) -> Rejections:
        """The records rejected so far, by their index, the same on every machine that opens the data set.

        Records whose captions are not UTF-8 are used, and count as flawed.
        """
        flawed = {f"{place}, caption": flaw for place, flaw in self._flawed.causes().items()}
        rejected = {str(place): cause for place, cause in self._rejected.causes().items()}
        return Rejections(self._at_opening.counts, rejected, flawed)

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch, with images cropped as ``crop`` says, or at the centre without ``rngs``.

        The next record that can be used is the substitute of one that cannot.

        Raises:
            UserError: no record can be used, or too many are rejected.
        """
        samples = [self.sample(index, rngs[row] if rngs else None) for row, index in enumerate(indices)]
        return stacked([one.example for one in samples], self.columns)

    def sample(self, index: int, rng: np.random.Generator | None) -> "Sample":
        """Returns an example, with a random crop (unless ``crop`` is "center") and caption if there is a generator."""
        image, record, place = self._usable(index)
        if rng and self.crop == "shift":
            image = decoding.padded(image, self.resolution // 8)
        moved = rng is not None and self.crop != "center"
        image = decoding.crop(image, self.resolution, rng) if moved else self._centre(image)
        number = int(rng.integers(len(record.captions))) if rng else record.fixed
        example = {
            "image": image,
            "caption": record.captions[number],
            "captions": record.captions,
            "key": record.key,
            "substitute": place != index % len(self),
        }
        return Sample(example, record, number)

    def preprocessed(self, how: Preprocessing) -> "ImageSource":
        """Returns the source with its images resized and cropped as a CLIP reads them, at the same resolution."""
        source = copy.copy(self)
        source.preprocessing = how.at(self.resolution)
        return source

    def _centre(self, image: np.ndarray) -> np.ndarray:
        return decoding.crop(image, self.resolution, rounding=self.preprocessing.crop_rounding)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of at most ``limit`` records."""
        return self.records.captions(limit)

    def _usable(self, index: int) -> tuple[np.ndarray, Record, int]:
        """Returns the resized image, the record and its place, of ``index`` or of its substitute."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for place in self._places(index % len(self)):
            if place not in self._rejected and place not in self._filtered:
                found = self._try(place)
                if found:
                    if place == index % len(self):
                        self._recent.append(False)
                    return *found, place
            if place == index % len(self) and place in self._rejected:
                self._recent.append(True)
                self._check_recent()
        raise UserError(f"no image of {self.records} can be used ({self._causes()}): fix the data set or the filters")

    def _places(self, index: int) -> Iterator[int]:
        """Yields an index, the next, then others far apart, so that records of a lost shard differ in substitutes."""
        yield index
        count = len(self)
        stride = next(step for step in range(max(1, round(0.618 * count)), count + 2) if math.gcd(step, count) == 1)
        for number in range(min(count, _MAX_TRIES)):
            yield (index + 1 + number * stride) % count

    def _try(self, place: int) -> tuple[np.ndarray, Record] | None:
        """Returns the resized image and the record of a place; None, and logs why, if it cannot be used."""
        name = f"record {place}"
        try:
            record = self.records.read(place)
            name += f" ({record.key})"
            image = self._resized(record)
        except Rejected as rejection:
            name += "".join(f" ({note})" for note in rejection.notes)  # of a record that was not read
            name = printable(name)
            if self._rejected.add(place, rejection.cause):
                _LOG.warning("%s: %s is rejected (%s); others are only counted", self, name, rejection.cause)
            self._check_rate()
            return None
        if image is None:
            self._filtered.add(place)
            return None
        if place not in self._flawed and any(REPLACEMENT in caption for caption in record.captions):
            if self._flawed.add(place, _NOT_UTF8):
                message = "%s: %s has a caption that is not UTF-8, and is used; others are only counted"
                _LOG.warning(message, self, printable(name))
        return image, record

    def _resized(self, record: Record) -> np.ndarray | None:
        """Returns the image at the source's resolution, None if the filters exclude it; raises Rejected."""
        if not self.filters.accept_fields(record.fields):
            return None
        # a JPEG decoded at a fraction of its size is resized by another filter than the requested one
        side = self.resolution if self.preprocessing.resample == "area" else None
        image, (height, width) = image_of(record, side)
        if not self.filters.accept_size(height, width):
            return None
        return decoding.resized(image, self.preprocessing, self.resolution)

    def _check_rate(self) -> None:
        """Raises UserError if too many of all records are known to be bad, whichever process found them."""
        before = self._at_opening.counts.total()
        bad, count = before + len(self._rejected), before + len(self)
        if bad > max_bad(count, self.max_rejected):
            raise self._too_many(f"{bad} of {count} records")

    def _check_recent(self) -> None:
        """Raises UserError if too many of the last requested records are bad; their substitutes do not count."""
        count, bad = len(self._recent), self._recent.count(True)
        rate = min(1.0, max_bad(len(self), self.max_rejected) / len(self))
        if count >= _MIN_RECENT and bad > rate * count + _SIGMAS * math.sqrt(rate * (1 - rate) * count):
            raise self._too_many(f"{bad} of the last {count} records")

    def _too_many(self, found: str) -> UserError:
        return too_many_error(f"{found} of {self.records}", f"found so far: {self._causes()}", self.max_rejected)

    def _causes(self) -> str:
        causes = RejectionCounts(self.rejections.counts, self._at_opening.first)
        filtered = [f"{len(self._filtered)} excluded by the filters"] * bool(self._filtered)
        return ", ".join([str(causes)] * bool(causes.counts) + filtered)


def max_bad(count: int, max_rejected: float) -> float:
    """Returns how many of ``count`` records may be bad: of fewer than 100 more than the rate, but under a third."""
    return max(max_rejected * count, min(max_rejected * _MIN_RECENT, max(1, count / 3)))


def too_many_error(found: str, causes: str, max_rejected: float) -> UserError:
    """Returns the error for a data set with too many bad records."""
    return UserError(
        f"{found} are bad ({causes}), more than max_rejected={max_rejected:g}: fix the data set, or raise max_rejected"
    )


def check_arguments(resolution: int, crop: str, max_rejected: float) -> None:
    """Raises UserError for arguments that no image source accepts; before a large data set is opened."""
    if crop not in decoding.CROPS:
        raise UserError(f"crop must be one of {', '.join(decoding.CROPS)}, got {crop!r}")
    if resolution < 1:
        raise UserError(f"resolution must be at least 1, got {resolution}")
    if not 0 <= max_rejected <= 1:
        raise UserError(f"max_rejected must be from 0 to 1, got {max_rejected}")


def image_of(record: Record, side: int | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """Returns the image of a record, and its height and width before any reduction.

    Args:
        record: the record.
        side: the decoder may reduce the image to at least ``side`` pixels each way; None decodes it in full.

    Raises:
        Rejected: the record cannot be used for training.
    """
    if not record.captions:
        raise Rejected("no caption")
    if record.image is None:
        raise Rejected("no image")
    if isinstance(record.image, np.ndarray):
        image, (height, width) = record.image, record.image.shape[:2]
    else:
        image, (height, width) = decoded(record.image, side)
    check_aspect(height, width)
    return image, (height, width)


def header(content: bytes) -> tuple[str, tuple[int, int]]:
    """Returns the format of an image file, by Pillow's name, and its height and width, from the header alone.

    Raises:
        Rejected: "empty", "far too large" or "not an image".
    """
    try:
        found = decoding.header(content)
    except decoding.ImageError as error:
        raise Rejected(error.cause) from None
    return found.format, (found.height, found.width)


def check_aspect(height: int, width: int) -> None:
    """Raises Rejected, "far too long", for an image of an aspect ratio over ``decoding.MAX_ASPECT``."""
    if max(height, width) > decoding.MAX_ASPECT * min(height, width):
        raise Rejected("far too long")


def decoded(content: bytes, side: int | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """Decodes an image file, as `decoding.decode`, within the limits on its size.

    Returns:
        The image, in full or reduced to at least ``side`` pixels each way; and its full height and width.

    Raises:
        Rejected: "empty", "far too large", "far too long" or "not an image".
    """
    try:
        found = decoding.header(content)
        height, width = found.height, found.width
        factor = 1 if side is None else decoding.reduction(height, width, side)
        upright, turned = ((-(-height // factor), -(-width // factor)), (-(-width // factor), -(-height // factor)))
        if upright == turned and height != width:
            factor = 1  # the reduced sides would be equal, and not show whether EXIF turned the image
        image = decoding.decode(content, factor, found)
    except decoding.ImageError as error:
        raise Rejected(error.cause) from None
    if factor == 1 or max(image.shape[:2]) == max(height, width):  # only JPEG is decoded at a fraction of its size
        return image, (image.shape[0], image.shape[1])
    return image, (height, width) if image.shape[:2] == upright else (width, height)
