"""A folder of images with captions.

Captions come from ``metadata.jsonl`` or ``metadata.csv`` in the folder (the Hugging Face imagefolder convention: one
object per line, ``{"file_name": "a/b.png", "text": "a caption"}``, where ``text`` may be a list of captions, or the
columns ``file_name`` and ``text``; other values of a line are fields of its record), or else from a ``.txt`` file with
the name of each image, one caption per line. A folder may have sub-folders ``train``, ``val`` and so on; without them
all of it is ``train``. Broken lines and images without a caption are rejected.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from dalle2_jax.data.formats.folder_index import map_index, open_folder
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.data.images.records import (
    MAX_BYTES,
    MAX_TEXT,
    OTHER_NAMES,
    Record,
    Rejected,
    RejectionCounts,
    caption_lines,
    clean,
    spread,
    text_of,
)
from dalle2_jax.data.images.rejections import MAX_REJECTED
from dalle2_jax.data.images.source import ImageSource, check_arguments
from dalle2_jax.data.storage.arrays import NUMBERS, cache_path, load_or_build
from dalle2_jax.errors import DataError
from dalle2_jax.reading import read_bytes

_DIVISIONS = ("train", "val", "validation", "test")


class FolderRecords:
    """The captioned images of a folder, in the order of its metadata, else by name; a `Records`.

    Args:
        path: the folder; if it has a sub-folder named ``split``, that is read.
        split: "train", or the name of a sub-folder; "val" also finds ``validation``, and the reverse.
        filters: images that they exclude by their fields are skipped.

    Raises:
        DataError: the folder or the split does not exist, or has no image with a caption, or the path is empty.
    """

    def __init__(self, path: str | Path, split: str = "train", filters: Filters = Filters()) -> None:
        if path == "":
            raise DataError("a folder has no path: set config.data.path, such as 'data/images', or '.' for this one")
        self.path, self.split = Path(os.path.expanduser(path)), split
        self._folder = division(self.path, split)
        self._index, self._cached = open_folder(self._folder)
        self.rejections = RejectionCounts(**self._index.description()["left_out"])
        self._chosen = None
        if filters != Filters():
            paths = cache_path(self._cached, filters, self._index.times)
            [self._chosen], _ = load_or_build(
                paths, (NUMBERS,), lambda _: True, lambda: ([self._choose(filters)], True)
            )
            if not len(self._chosen):
                count = len(self._index.name_ends)
                raise DataError(f"the filters exclude all {count} images in {self._folder}: {filters}", self._folder)

    def __len__(self) -> int:
        return len(self._index.name_ends if self._chosen is None else self._chosen)

    def __repr__(self) -> str:
        return f"FolderRecords({str(self.path)!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self._cached is None else {**vars(self), "_index": None}  # mapped again after unpickling

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index is None and self._cached is not None:
            self._index = map_index(self._cached)

    def read(self, index: int) -> Record:
        """Returns the bytes, captions and fields of an image. Raises Rejected if it cannot be read."""
        place = self._place(index)
        name = self._index.name(place)
        captions, fields = self._metadata(place)
        return Record(clean(name), _read(self._folder / name, "missing", MAX_BYTES), captions, fields)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of at most ``limit`` images, evenly spread over the folder."""
        for index in spread(len(self), limit):
            try:
                yield from self._metadata(self._place(index))[0]
            except Rejected:
                continue

    def _place(self, index: int) -> int:
        return int(index if self._chosen is None else self._chosen[index])

    def _metadata(self, place: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Returns the captions and fields of an image."""
        metadata = self._index.metadata(place)
        if metadata is None:
            stem, _ = os.path.splitext(self._index.name(place))
            content = _read(self._folder / f"{stem}.txt", "no caption", MAX_TEXT)
            return caption_lines(text_of(content)), {}
        return metadata

    def _choose(self, filters: Filters) -> Int64[np.ndarray, "M"]:
        """Returns the indices of the images that the filters accept by their fields."""
        count = len(self._index.name_ends)
        fields = ((self._index.metadata(place) or ((), {}))[1] for place in range(count))
        bar = tqdm(fields, "filtering by fields", count, leave=False, disable=count < 100_000)
        return np.flatnonzero(np.fromiter(map(filters.accept_fields, bar), bool, count))


def _read(path: Path, missing: str, limit: int) -> bytes:
    """Reads a file. Raises Rejected, with the cause ``missing`` if it does not exist."""
    try:
        return read_bytes(path, limit)
    except FileNotFoundError:
        raise Rejected(missing) from None
    except OSError as error:
        raise Rejected("far too large" if error.errno == errno.EFBIG else "unreadable") from None


class FolderSource(ImageSource):
    """A `Source` of the images of a folder; the arguments are those of `FolderRecords` and `ImageSource`."""

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        resolution: int = 64,
        crop: str = "center",
        filters: Filters = Filters(),
        max_rejected: float = MAX_REJECTED,
    ) -> None:
        check_arguments(resolution, crop, max_rejected)
        records = FolderRecords(path, split, filters)
        self._name = f"{str(records.path)!r}, {records.split!r}"
        super().__init__(records, resolution, crop, filters, max_rejected)

    def __repr__(self) -> str:
        return f"FolderSource({self._name}, {self.resolution}, {self.crop!r})"


def division(path: Path, split: str) -> Path:
    """Returns the folder of a split: ``path/split``, or ``path`` itself for "train" if it has no sub-folders of splits.

    "val" also finds ``validation``.

    Raises:
        DataError: there is none.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: check the path", path)
    for name in (split, OTHER_NAMES.get(split, split)):
        if (path / name).is_dir():
            return path / name
    divisions = [name for name in _DIVISIONS if (path / name).is_dir()]
    if split == "train" and not divisions:
        return path
    found = f"it has {', '.join(divisions)}" if divisions else "it is undivided, so all of it is train"
    raise DataError(f"{path} has no sub-folder {split!r} ({found}): make {path / split} with its own captions", path)
