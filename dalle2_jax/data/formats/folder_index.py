"""The index of a folder of images: their names and their metadata, without a Python object for each.

The index of a large folder is cached under ``~/.cache/dalle2_jax``. It is valid until the modification time of its
metadata or of a folder in it changes, as it does when an image is added or removed. Captions in ``.txt`` files are not
part of it: they are read with the images.
"""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.records import (
    MAX_TEXT,
    RejectionCounts,
    captions_in,
    clean,
    json_object,
    text_of,
)
from dalle2_jax.data.storage.arrays import BYTES, NUMBERS, Strings, load_or_build, map_arrays
from dalle2_jax.errors import DataError, printable
from dalle2_jax.files import cache_folder
from dalle2_jax.reading import open_regular, parse_json

METADATA, TABLE, SIDECARS = "metadata.jsonl", "metadata.csv", ""
"""Where captions come from: a metadata file, or, as "", text files with the names of the images."""

_VERSION = 2
_LARGE, _SLOW = 20_000, 2**25
"""Number of images from which the index is cached, and bytes of metadata that take seconds to read."""

_KINDS = (BYTES, NUMBERS, BYTES, NUMBERS, BYTES, NUMBERS)
"""Kinds of the fields of an `Index`."""

_LOG = logging.getLogger(__name__)


class Index(NamedTuple):
    """The images of a folder that have captions, in the order of its metadata, else by name.

    Attributes:
        names, name_ends: paths relative to the folder, packed as `Strings`.
        entries, entry_ends: ``[captions, fields]`` of each image as JSON; empty if its captions are in a text file.
        about: JSON with the source of the captions, the folders, the number of images that the metadata does not name
            and the first of them, and the rejected records (`RejectionCounts`).
        times: modification times of the metadata and the folders, in nanoseconds.
    """

    names: UInt8[np.ndarray, "letters"]
    name_ends: Int64[np.ndarray, "N"]
    entries: UInt8[np.ndarray, "letters2"]
    entry_ends: Int64[np.ndarray, "N"]
    about: UInt8[np.ndarray, "letters3"]
    times: Int64[np.ndarray, "folders+1"]

    def name(self, place: int) -> str:
        """Returns the path of an image relative to the folder, with forward slashes."""
        return os.fsdecode(Strings(self.names, self.name_ends).at(place))

    def metadata(self, place: int) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        """Returns the captions and fields of an image; None if its captions are in a text file."""
        stored = Strings(self.entries, self.entry_ends).at(place)
        if not stored:
            return None
        captions, fields = parse_json(stored)
        return tuple(captions), fields

    def description(self) -> dict[str, Any]:
        """Returns the content of ``about``: "captions", "folders", "unnamed" and "left_out"."""
        return parse_json(bytes(self.about))


def open_folder(folder: Path) -> tuple[Index, Path | None]:
    """Returns the index of a folder, and the file that it is mapped from, None if it is not cached.

    Images that the metadata does not name are ignored, with a warning.

    Raises:
        DataError: there is no image, or none with a caption.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, os.fspath(folder.resolve())]).encode()).hexdigest()[:16]

    def make() -> tuple[Index, bool]:
        index = _read(folder)
        unread = "unreadable" in index.description()["left_out"]["counts"]  # they may be readable the next time
        return index, len(index.name_ends) >= _LARGE and not unread

    paths = [cache_folder("folders") / f"{digest}.index"]
    arrays, cached = load_or_build(paths, _KINDS, lambda found: _holds(Index(*found), folder), make)
    index = Index(*arrays)
    about = index.description()
    unnamed, first = about["unnamed"]
    if unnamed:
        message = "%d images in %s are not named in %s, the first %s"
        _LOG.warning(message, unnamed, folder, about["captions"], printable(first))
    return index, cached


def map_index(cached: Path) -> Index:
    """Maps the index that `open_folder` wrote."""
    return Index(*map_arrays(cached, _KINDS))


def _holds(index: Index, folder: Path) -> bool:
    about = index.description()
    captions = _caption_file(folder)
    times = [_time(folder / name) for name in (captions, *about["folders"])]
    return captions == about["captions"] and np.array_equal(index.times, times)


def _caption_file(folder: Path) -> str:
    return next((name for name in (METADATA, TABLE) if (folder / name).is_file()), SIDECARS)


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


# --- reading a folder -------------------------------------------------------------------------


def _read(folder: Path) -> Index:
    rejections = RejectionCounts()
    captions = _caption_file(folder)
    times = {captions: _time(folder / captions)}
    images: dict[str, bool] = {}  # name -> whether it has a text file
    for below, names in _walk(folder, times, rejections):
        images.update(_images(below, names))
    if not images:
        raise DataError(f"there are no images in {folder} ({', '.join(sorted(decoding.SUFFIXES))})", folder)
    unnamed: set[str] = set()
    if captions == SIDECARS:
        entries = {name: b"" for name in sorted(images) if images[name]}
        if not entries:
            first = PurePosixPath(min(images))
            raise DataError(
                f"none of the {len(images)} images in {folder} has a caption, the first {first}: "
                f"write {first.with_suffix('.txt')} or a {METADATA}",
                folder,
            )
        for name in sorted(images.keys() - entries.keys()):
            rejections.add("no caption", name)
    else:
        entries, unnamed = _read_metadata(folder / captions, images, rejections)
        if not entries:
            causes = str(rejections) or "it is empty"
            raise DataError(
                f"{folder / captions} has no caption of an image in {folder} ({causes}): "
                "write file_name relative to that folder",
                folder / captions,
            )
    _, *folders = times
    about = {
        "captions": captions,
        "folders": folders,
        "unnamed": [len(unnamed), clean(min(unnamed, default=""))],
        "left_out": vars(rejections),
    }
    names, packed = Strings.of([os.fsencode(name) for name in entries]), Strings.of([*entries.values()])
    description = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return Index(*names, *packed, description, np.array([*times.values()], np.int64))


def _walk(folder: Path, times: dict[str, int], rejections: RejectionCounts) -> Iterator[tuple[str, list[str]]]:
    """Yields the relative path of each folder, as "a/b/", and its files; adds its time to ``times`` first."""
    waiting, seen = ["./"], set()
    while waiting:
        below = waiting.pop()
        inner, files = [], []
        try:
            status = os.stat(folder / below)
            if (status.st_dev, status.st_ino) in seen:  # a link to a parent
                continue
            seen.add((status.st_dev, status.st_ino))
            times[below] = status.st_mtime_ns
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir():
                            inner.append(entry.name)
                        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                            files.append(entry.name)  # not pipes and devices, which never end
                    except OSError:  # a link to itself, or no permission
                        rejections.add("unreadable", str(PurePosixPath(below, entry.name)))
        except OSError:
            rejections.add("unreadable", below)
        below = below.removeprefix("./")
        yield below, files
        waiting += [f"{below}{name}/" for name in sorted(inner, reverse=True)]


def _images(below: str, names: list[str]) -> Iterator[tuple[str, bool]]:
    """Yields the images among the files of a folder, and whether each has a text file of its name."""
    split = [os.path.splitext(name) for name in names]
    texts = {stem for stem, ending in split if ending == ".txt"}
    for name, (stem, ending) in zip(names, split, strict=True):
        if ending.lower() in decoding.SUFFIXES:
            yield f"{below}{name}", stem in texts


def _read_metadata(
    path: Path, images: Collection[str], rejections: RejectionCounts
) -> tuple[dict[str, bytes], set[str]]:
    """Returns ``[captions, fields]`` of each image as JSON, and the images that no line names; rejects bad lines.

    An image that is named twice has the captions of both lines, and the fields of the first.
    """
    entries: dict[str, bytes] = {}
    unnamed = set(images)
    missing: dict[str, str] = {}
    for number, line in _lines(path, rejections):
        where = f"{path.name}:{number}"
        try:
            name, captions, fields = _parsed(json_object(line) if isinstance(line, str) else line)
        except (ValueError, TypeError) as error:
            rejections.add("broken metadata", f"{where}, {error}")
            continue
        name = name if name in images else PurePosixPath(name).as_posix()  # of ./a.png
        unnamed.discard(name)
        if name not in images:
            missing.setdefault(name, where)
        elif not captions:
            rejections.add("no caption", where)
        else:
            earlier, first = parse_json(entries[name]) if name in entries else ((), fields)
            entries[name] = json.dumps([[*earlier, *captions], first]).encode()
    for name, where in missing.items():
        rejections.add("missing", f"{where}, {name}")
    return entries, unnamed


def _lines(path: Path, rejections: RejectionCounts) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Yields the number and content of each line that is not blank; the content of a table is a dict by column."""
    if path.name == METADATA:
        yield from ((number, line) for number, line in enumerate(_texts(path), 1) if line.strip())
        return
    table = csv.DictReader(_texts(path), restkey="")
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            rejections.add("broken metadata", f"{path.name}:{table.line_num}, {error}")
            continue
        yield table.line_num, {column: value for column, value in row.items() if column and value is not None}


def _texts(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    with open_regular(path) as file, tqdm(None, path.name, size, leave=False, unit="B", disable=size < _SLOW) as bar:
        while line := file.readline(MAX_TEXT):
            bar.update(len(line))
            yield text_of(line)
            while len(line) == MAX_TEXT and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(MAX_TEXT)
                bar.update(len(line))


def _parsed(line: dict[str, Any]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    for field in ("file_name", "text"):
        if field not in line:
            raise ValueError(f"{field} is missing")
    fields = dict(line)
    name, text = fields.pop("file_name"), fields.pop("text")
    wrong = "file_name must be a string, and text a string or a list of strings"
    try:
        captions = captions_in(text) if text not in (None, []) else ()
    except TypeError:
        raise TypeError(wrong) from None
    if not isinstance(name, str):
        raise TypeError(wrong)
    return name, captions, fields
