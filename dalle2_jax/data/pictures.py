"""Pictures of one size for training, from records of any kind.

A record that cannot be used does not stop a run: the next good one takes its place, `PictureSource.rejected` counts
the refused by cause, and each cause is logged once. Too many of them mean that something is wrong with the data set
or with the way to it; then the run ends and says what.
"""

import io
import logging
import math
import warnings
from collections import Counter, deque
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dalle2_jax.data import images
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.records import MARK, LeftOut, Record, Records, Rejected
from dalle2_jax.data.refusals import Refusals
from dalle2_jax.types import UserError

MAX_REJECTED = 0.1
"""The share of refused records above which a run ends; of a small data set ten may be bad, if they are no third."""

MAX_PIXELS, MAX_ASPECT = 90_000_000, 50
"""No picture worth training on is larger, or longer for its width; decoding or scaling one would fill the memory."""

_FEW, _RECENT = 100, 1000
"""Of fewer records a share says nothing; and how many of those asked for last are looked at."""

_SURE = 5
"""Standard deviations by which the share of those must be too large: chance alone never ends a run."""

_MARRED = "not UTF-8 (used)"

_FRUITLESS = 10_000
"""Records tried for one example before it is clear that none will do."""

_LOG = logging.getLogger(__name__)


class PictureSource:
    """The pictures of records, fitted and cropped to ``uint8[resolution, resolution, 3]``; a `Source`.

    Args:
        records: where the pictures and captions are.
        resolution: side of the pictures; a picture's shorter side is scaled to it, then the longer is cropped.
        crop: ``center``, or ``random`` for another crop at each `draw`.
        filters: which records are wanted; others are passed over, and not counted as refused.
        max_rejected: the share of refused records, 0 to 1, above which `UserError` is raised.

    Raises:
        UserError: when an argument is out of range, or too many records were refused when they were opened.
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
        self._left_out: LeftOut = getattr(records, "left_out", LeftOut())
        self._refused = Refusals()
        self._unwanted: set[int] = set()
        self._marred = Refusals()
        self._recent: deque[bool] = deque(maxlen=_RECENT)  # which of those asked for last were bad
        self._check_share()
        if self._left_out.counts:
            _LOG.warning("%s: left out are %s", self, self._left_out)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"PictureSource({self.records!r}, {self.resolution}, {self.crop!r})"

    @property
    def rejected(self) -> Counter[str]:
        """How many records were refused, by cause: when the data set was opened, and since."""
        return self._left_out.counts + Counter(self._refused.causes().values())

    def refusals(self) -> dict[str, str]:
        """Returns why each record was refused since the opening, here and by copies in other processes, by its name.

        Records whose captions had bytes that are not UTF-8 are in it too, though they are used. The names are the same
        on every machine that opens the data set.
        """
        marred = {f"{place}, caption": cause for place, cause in self._marred.causes().items()}
        return {str(place): cause for place, cause in self._refused.causes().items()} | marred

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image", "captions", "caption", "key", "stands_in"}``, with the centre crop whatever ``crop`` is.

        ``stands_in``: it is another record than the one asked for, which cannot be used.

        Raises:
            UserError: when no good record is found, or too many are bad.
        """
        return self._example(index, *self._usable(index))

    def _example(self, index: int, picture: np.ndarray, record: Record, place: int) -> dict:
        return {
            "image": images.crop(picture, self.resolution),
            "captions": record.captions,
            "caption": record.captions[record.fixed],
            "key": record.key,
            "stands_in": place != index % len(self),
        }

    def draw(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Returns the picture, cropped as ``crop`` says, and one of its captions drawn with ``rng``.

        Raises:
            UserError: when no good record is found, or too many are bad.
        """
        image, record, number = self._drawn(index, rng)
        return image, record.captions[number]

    def _drawn(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], Record, int]:
        """Draws a crop and the number of a caption."""
        picture, record, _ = self._usable(index)
        image = images.crop(picture, self.resolution, rng if self.crop == "random" else None)
        return image, record, int(rng.integers(len(record.captions)))

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of at most ``limit`` records."""
        return self.records.captions(limit)

    def _usable(self, index: int) -> tuple[np.ndarray, Record, int]:
        """Returns the fitted picture, the record and its place, of ``index`` or of the next that can be used."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        for place in self._places(index % len(self)):
            if place not in self._refused and place not in self._unwanted:
                found = self._try(place)
                if found:
                    if place == index % len(self):
                        self._recent.append(False)
                    return *found, place
            if place == index % len(self) and place in self._refused:
                self._recent.append(True)
                self._check_recent()
        raise UserError(f"not one picture of {self.records} can be used ({self._causes()})")

    def _places(self, index: int) -> Iterator[int]:
        """Yields an index, the next, then others far apart: records of a lost shard have different stand-ins."""
        yield index
        count = len(self)
        stride = next(step for step in range(max(1, round(0.618 * count)), count + 2) if math.gcd(step, count) == 1)
        for number in range(min(count, _FRUITLESS)):
            yield (index + 1 + number * stride) % count

    def _try(self, place: int) -> tuple[np.ndarray, Record] | None:
        """Returns the fitted picture and the record of a place; None, and remembers why, if it cannot be used."""
        name = f"record {place}"
        try:
            record = self.records.read(place)
            name += f" ({record.key})"
            picture = self._fitted(record)
        except Rejected as rejection:
            name += "".join(f" ({note})" for note in getattr(rejection, "__notes__", ()))  # of one that was not read
            if self._refused.add(place, rejection.cause):
                _LOG.warning("%s: %s is refused (%s); others are only counted", self, name, rejection.cause)
            self._check_share()
            return None
        if picture is None:
            self._unwanted.add(place)
            return None
        if place not in self._marred and any(MARK in caption for caption in record.captions):
            if self._marred.add(place, _MARRED):
                _LOG.warning("%s: %s has a caption that is not UTF-8, and is used; others are only counted", self, name)
        return picture, record

    def _fitted(self, record: Record) -> np.ndarray | None:
        """Returns the picture at its resolution, None for an unwanted one; raises Rejected."""
        if not self.filters.want_fields(record.fields):
            return None
        picture, (height, width) = picture_of(record, self.resolution)
        return images.fit(picture, self.resolution) if self.filters.want_size(height, width) else None

    def _check_share(self) -> None:
        """Raises UserError if too many of all records are known to be bad, whoever met them."""
        left_out = self._left_out.counts.total()
        bad, count = left_out + len(self._refused), left_out + len(self)
        if bad > bearable(count, self.max_rejected):
            raise self._too_many(f"{bad} of {count} records")

    def _check_recent(self) -> None:
        """Raises UserError if too many are bad of those asked for last: stand-ins among bad neighbours do not count."""
        asked, bad = len(self._recent), self._recent.count(True)
        share = min(1.0, bearable(len(self), self.max_rejected) / len(self))
        if asked >= _FEW and bad > share * asked + _SURE * math.sqrt(share * (1 - share) * asked):
            raise self._too_many(f"{bad} of the last {asked} records")

    def _too_many(self, found: str) -> UserError:
        return too_many(f"{found} of {self.records}", f"found so far: {self._causes()}", self.max_rejected)

    def _causes(self) -> str:
        causes = LeftOut(self.rejected, self._left_out.first)
        unwanted = [f"{len(self._unwanted)} not wanted by the filters"] * bool(self._unwanted)
        return ", ".join([str(causes)] * bool(causes.counts) + unwanted)


def bearable(count: int, max_rejected: float) -> float:
    """Returns how many of so many records may be bad: of fewer than a hundred more than that share, but no third."""
    return max(max_rejected * count, min(max_rejected * _FEW, max(1, count / 3)))


def too_many(found: str, causes: str, max_rejected: float) -> UserError:
    """Returns the error of a data set of which too much is bad."""
    return UserError(
        f"{found} are bad ({causes}), more than max_rejected={max_rejected:g}: mend the data set, or raise max_rejected"
    )


def check_arguments(resolution: int, crop: str, max_rejected: float) -> None:
    """Raises UserError for what no source of pictures can do; before a large data set is opened."""
    if crop not in images.CROPS:
        raise UserError(f"crop {crop!r} is not one of {', '.join(images.CROPS)}")
    if resolution < 1:
        raise UserError(f"resolution must be at least 1, not {resolution}")
    if not 0 <= max_rejected <= 1:
        raise UserError(f"max_rejected is a share from 0 to 1, not {max_rejected}")


def picture_of(record: Record, side: int | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """Returns the picture of a record and its own height and width.

    Args:
        record: the record.
        side: the picture may be smaller, but with at least so many pixels each way where it has them; None wants all.

    Raises:
        Rejected: it is of no use for training.
    """
    if not record.captions:
        raise Rejected("no caption")
    if record.image is None:
        raise Rejected("no picture")
    if isinstance(record.image, np.ndarray):
        picture, (height, width) = record.image, record.image.shape[:2]
    else:
        picture, (height, width) = decoded(record.image, side)
    check_aspect(height, width)
    return picture, (height, width)


def header(content: bytes) -> tuple[str, tuple[int, int]]:
    """Returns what the header of a picture file says: its format, as Pillow calls it, and its height and width.

    Raises:
        Rejected: ``empty``, ``far too large`` or ``not a picture``.
    """
    if not content:
        raise Rejected("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as file:
                kind, (width, height) = file.format, file.size
    except Image.DecompressionBombError:
        raise Rejected("far too large") from None
    except Exception:
        raise Rejected("not a picture") from None  # whatever a parser says of bytes from the world
    if width * height > MAX_PIXELS:
        raise Rejected("far too large")
    return kind, (height, width)


def check_aspect(height: int, width: int) -> None:
    """Raises Rejected, ``far too long``, for a picture of no use."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise Rejected("far too long")


def decoded(content: bytes, side: int | None = None) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """Decodes a picture file, as `images.decode`, but nothing that would fill the memory.

    Returns:
        The picture, in full or smaller, but with at least ``side`` pixels each way where it has them; and the height
        and width of the whole picture.

    Raises:
        Rejected: ``empty``, ``far too large`` or ``not a picture``.
    """
    _, (height, width) = header(content)
    factor = 1 if side is None else images.reduction(height, width, side)
    upright, turned = ((-(-height // factor), -(-width // factor)), (-(-width // factor), -(-height // factor)))
    if upright == turned and height != width:
        factor = 1  # a smaller one would not tell whether its camera was turned, and so which side is which
    try:
        picture = images.decode(content, factor)
    except (ValueError, cv2.error, MemoryError):
        raise Rejected("not a picture") from None
    if factor == 1 or max(picture.shape[:2]) == max(height, width):  # not every kind can be had smaller
        return picture, picture.shape[:2]
    return picture, (height, width) if picture.shape[:2] == upright else (width, height)
