"""Any folder of pictures with captions.

Captions come from ``metadata.jsonl`` or ``metadata.csv`` beside the pictures (the Hugging Face imagefolder convention:
an object a line, ``{"file_name": "a/b.png", "text": "a caption"}``, where ``text`` may be a list of captions, or the
columns ``file_name`` and ``text``; whatever else a line has is a field of its record), or else from a ``.txt`` file
beside each picture, one caption a line. A folder may be divided into sub-folders ``train``, ``val`` and so on; an
undivided folder is all ``train``.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle2_jax.data import images
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.pictures import MAX_REJECTED, PictureSource, check_arguments
from dalle2_jax.data.records import Record, Rejected, caption_lines, captions_in, json_object, text_of
from dalle2_jax.types import UserError

METADATA = "metadata.jsonl"
_TABLE = "metadata.csv"
_DIVISIONS = ("train", "val", "validation", "test")

_Told = dict[str, tuple[tuple[str, ...], dict[str, Any]]]
"""Captions and fields by file name."""


class FolderRecords:
    """The captioned pictures of a folder, in the order of its metadata, else by name; a `Records`.

    Args:
        path: the folder; if it has a sub-folder named ``split``, that is read.
        split: ``train``, or the name of a sub-folder.
        filters: pictures not wanted by their fields are left out.

    Raises:
        UserError: when the folder, the split, the pictures or a caption is missing, or a line of metadata is broken.
    """

    def __init__(self, path: str | Path, split: str = "train", filters: Filters = Filters()) -> None:
        self.path, self.split = Path(path), split
        self._folder = folder = division(self.path, split)
        pictures = _pictures(folder)
        metadata = next((folder / name for name in (METADATA, _TABLE) if (folder / name).is_file()), None)
        self.refused: Counter[str] = Counter()
        if metadata is None:
            told = _read_sidecars(folder, sorted(pictures))
        else:
            told = _read_metadata(metadata)
            self.refused["missing"] = len(told.keys() - pictures)
            told = {name: one for name, one in told.items() if name in pictures}
        if not told:
            raise UserError(f"{metadata} names no picture that is in {folder}: file_name is relative to {folder}")
        self._told = tuple((name, *one) for name, one in told.items() if filters.want_fields(one[1]))
        if not self._told:
            raise UserError(f"the filters leave not one of the {len(told)} pictures in {folder}: {filters}")

    def __len__(self) -> int:
        return len(self._told)

    def __repr__(self) -> str:
        return f"FolderRecords({str(self.path)!r}, {self.split!r})"

    def read(self, index: int) -> Record:
        """Returns the picture's file, its captions and fields. Raises Rejected when it cannot be read."""
        name, captions, fields = self._told[index]
        try:
            return Record(name, (self._folder / name).read_bytes(), captions, fields)
        except OSError:
            raise Rejected("unreadable") from None

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of the first ``limit`` pictures."""
        for _, captions, _ in self._told[:limit]:
            yield from captions


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

    Raises:
        UserError: when there is none.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if (path / split).is_dir():
        return path / split
    divisions = [name for name in _DIVISIONS if (path / name).is_dir()]
    if split == "train" and not divisions:
        return path
    found = f"it has {', '.join(divisions)}" if divisions else "it is undivided, so all of it is train"
    raise UserError(f"{path} has no sub-folder {split!r} ({found}): make {path / split} with its own captions")


def _pictures(folder: Path) -> set[str]:
    """Names of the picture files below ``folder``, relative to it, with forward slashes."""
    found = set()
    for root, directories, files in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        relative = Path(root).relative_to(folder)
        found.update(
            (relative / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in images.SUFFIXES and not name.startswith(".")
        )
    if not found:
        raise UserError(f"there are no pictures in {folder} ({', '.join(sorted(images.SUFFIXES))})")
    return found


def _read_metadata(path: Path) -> _Told:
    """Returns captions and fields; a file named twice has the captions of both lines, and the fields of the first."""
    told: _Told = {}
    for number, line in _lines(path):
        try:
            name, captions, fields = _parse(json_object(line) if isinstance(line, str) else line)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        earlier, first = told.get(name, ((), fields))
        told[name] = (earlier + captions, first)
    return told


def _lines(path: Path) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Yields the number of each line that is not blank, and the line, of a table by column."""
    text = text_of(path.read_bytes())
    if path.name == METADATA:
        yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    table = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    try:
        for row in table:
            yield table.line_num, {column: value for column, value in row.items() if column and value is not None}
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: {error}") from None


def _parse(line: dict[str, Any]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    for field in ("file_name", "text"):
        if field not in line:
            raise ValueError(f"{field} is missing")
    fields = dict(line)
    name, text = fields.pop("file_name"), fields.pop("text")
    try:
        captions = captions_in(text)
    except TypeError:
        captions = ()
    if not isinstance(name, str) or not captions:
        raise TypeError("file_name must be a string, and text a string or a list of strings")
    return Path(name).as_posix(), captions, fields


def _read_sidecars(folder: Path, names: list[str]) -> _Told:
    """Returns captions from the .txt beside each picture."""
    told, missing = {}, []
    for name in names:
        try:
            content = (folder / name).with_suffix(".txt").read_bytes()
        except FileNotFoundError:
            missing.append(name)
            continue
        told[name] = (caption_lines(text_of(content)), {})
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} pictures in {folder} have no caption, the first {missing[0]}: "
            f"write {Path(missing[0]).with_suffix('.txt')} or a {METADATA}"
        )
    return told
