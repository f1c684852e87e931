"""Any folder of pictures with captions.

Captions come from ``metadata.jsonl`` or ``metadata.csv`` beside the pictures (the Hugging Face imagefolder convention:
an object a line, ``{"file_name": "a/b.png", "text": "a caption"}``, where ``text`` may be a list of captions, or the
columns ``file_name`` and ``text``; whatever else a line has is a field of its record), or else from a ``.txt`` file
beside each picture, one caption a line. A folder may be divided into sub-folders ``train``, ``val`` and so on; an
undivided folder is all ``train``. Lines that are broken and pictures without a caption are left out.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from dalle2_jax.data.arrays import beside, kept
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.folder_index import map_index, open_folder
from dalle2_jax.data.pictures import MAX_REJECTED, PictureSource, check_arguments
from dalle2_jax.data.records import (
    MAX_BYTES,
    OTHER_NAMES,
    LeftOut,
    Record,
    Rejected,
    caption_lines,
    clean,
    spread,
    text_of,
)
from dalle2_jax.types import UserError

_DIVISIONS = ("train", "val", "validation", "test")


class FolderRecords:
    """The captioned pictures of a folder, in the order of its metadata, else by name; a `Records`.

    Args:
        path: the folder; if it has a sub-folder named ``split``, that is read.
        split: ``train``, or the name of a sub-folder; ``val`` may be called ``validation``.
        filters: pictures not wanted by their fields are left out.

    Raises:
        UserError: when the folder or the split is not there, or has no picture with a caption, or the path is empty.
    """

    def __init__(self, path: str | Path, split: str = "train", filters: Filters = Filters()) -> None:
        if path == "":
            raise UserError("a folder has no path: set config.data.path, such as 'data/pictures', or '.' for this one")
        self.path, self.split = Path(os.path.expanduser(path)), split
        self._folder = division(self.path, split)
        self._index, self._home = open_folder(self._folder)
        self.left_out = LeftOut(**self._index.description()["left_out"])
        self._chosen = None
        if filters != Filters():
            homes = beside(self._home, filters, self._index.times)
            [self._chosen], _ = kept(homes, 1, lambda _: True, lambda: ([self._choose(filters)], True))
            if not len(self._chosen):
                count = len(self._index.name_ends)
                raise UserError(f"the filters leave not one of the {count} pictures in {self._folder}: {filters}")

    def __len__(self) -> int:
        return len(self._index.name_ends if self._chosen is None else self._chosen)

    def __repr__(self) -> str:
        return f"FolderRecords({str(self.path)!r}, {self.split!r})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self._home is None else {**vars(self), "_index": None}  # mapped again where it is needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._index is None:
            self._index = map_index(self._home)

    def read(self, index: int) -> Record:
        """Returns the picture's file, its captions and fields. Raises Rejected when one cannot be read."""
        place = self._place(index)
        name = self._index.name(place)
        captions, fields = self._said(place)
        return Record(clean(name), _content(self._folder / name, "missing"), captions, fields)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of at most ``limit`` pictures from all over the folder."""
        for index in spread(len(self), limit):
            try:
                yield from self._said(self._place(index))[0]
            except Rejected:
                continue

    def _place(self, index: int) -> int:
        return int(index if self._chosen is None else self._chosen[index])

    def _said(self, place: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        said = self._index.said(place)
        if said is None:
            stem, _ = os.path.splitext(self._index.name(place))
            content = _content(self._folder / f"{stem}.txt", "no caption")
            return caption_lines(text_of(content)), {}
        return said

    def _choose(self, filters: Filters) -> Int64[np.ndarray, "M"]:
        """Returns the places of the pictures that are wanted by their fields."""
        count = len(self._index.name_ends)
        fields = ((self._index.said(place) or ((), {}))[1] for place in range(count))
        bar = tqdm(fields, "filtering by fields", count, leave=False, disable=count < 100_000)
        return np.flatnonzero(np.fromiter(map(filters.want_fields, bar), bool, count))


def _content(path: Path, lacking: str) -> bytes:
    """Reads a file. Raises Rejected, ``lacking`` when it is not there."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("unreadable")
            if status.st_size > MAX_BYTES:
                raise Rejected("far too large")
            return file.read()
    except FileNotFoundError:
        raise Rejected(lacking) from None
    except OSError:
        raise Rejected("unreadable") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe too, to which a link may lead since it was indexed, without waiting for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


class FolderSource(PictureSource):
    """The pictures of a folder at one size; arguments as `FolderRecords` and `PictureSource`."""

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
        super().__init__(FolderRecords(path, split, filters), resolution, crop, filters, max_rejected)

    def __repr__(self) -> str:
        return f"FolderSource({str(self.records.path)!r}, {self.records.split!r}, {self.resolution}, {self.crop!r})"


def division(path: Path, split: str) -> Path:
    """Returns the folder of a split: ``path/split``, or ``path`` itself for the train split of an undivided folder.

    ``val`` is found in ``validation`` too.

    Raises:
        UserError: when there is none.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    for name in (split, OTHER_NAMES.get(split, split)):
        if (path / name).is_dir():
            return path / name
    divisions = [name for name in _DIVISIONS if (path / name).is_dir()]
    if split == "train" and not divisions:
        return path
    found = f"it has {', '.join(divisions)}" if divisions else "it is undivided, so all of it is train"
    raise UserError(f"{path} has no sub-folder {split!r} ({found}): make {path / split} with its own captions")
