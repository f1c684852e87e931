"""What a folder of pictures holds: their names, and what metadata tells of each, without an object for each.

The index of a large folder is kept below ``~/.cache/dalle2_jax``, and holds as long as its metadata and each folder
in it have the time they had: a picture that comes or goes changes that of its folder. Captions in files beside the
pictures are not in it, but read with them.
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

from dalle2_jax.data import images
from dalle2_jax.data.arrays import Strings, cache_folder, kept, map_arrays
from dalle2_jax.data.records import LeftOut, captions_in, clean, json_object, text_of
from dalle2_jax.types import UserError

METADATA, TABLE, SIDECARS = "metadata.jsonl", "metadata.csv", ""
"""Where captions come from; the last stands for files beside the pictures."""

_VERSION = 2
_LARGE, _SLOW = 20_000, 2**25
"""Pictures from which on the index is kept, and bytes of metadata that take seconds to read."""

_LOG = logging.getLogger(__name__)


class Index(NamedTuple):
    """The pictures of a folder that have captions, in the order of its metadata, else by name.

    Attributes:
        names, name_ends: relative to the folder, as `Strings` packs them.
        told, told_ends: of each, ``[captions, fields]`` as JSON; empty where captions lie beside the pictures.
        about: JSON: where captions come from, the folders, how many pictures metadata does not name and the first of
            them, and what was left out, as `LeftOut` has it.
        times: when metadata and folders were last changed, in nanoseconds.
    """

    names: UInt8[np.ndarray, "letters"]
    name_ends: Int64[np.ndarray, "N"]
    told: UInt8[np.ndarray, "letters2"]
    told_ends: Int64[np.ndarray, "N"]
    about: UInt8[np.ndarray, "letters3"]
    times: Int64[np.ndarray, "folders+1"]

    def name(self, place: int) -> str:
        """Returns the path of a picture below the folder, with forward slashes."""
        return os.fsdecode(Strings(self.names, self.name_ends).at(place))

    def said(self, place: int) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        """Returns the captions and fields of a picture; None where its captions lie beside it."""
        told = Strings(self.told, self.told_ends).at(place)
        if not told:
            return None
        captions, fields = json.loads(told)
        return tuple(captions), fields

    def description(self) -> dict[str, Any]:
        """Returns what ``about`` says: "captions", "folders", "unnamed" and "left_out"."""
        return json.loads(bytes(self.about))


def open_folder(folder: Path) -> tuple[Index, Path | None]:
    """Returns the index of a folder, and the file that it is mapped from, None if it is not kept.

    Pictures that metadata does not name are no part of it, and a warning tells of them.

    Raises:
        UserError: there is no picture, or none with a caption.
    """
    home = hashlib.sha256(json.dumps([_VERSION, os.fspath(folder.resolve())]).encode()).hexdigest()[:16]

    def make() -> tuple[Index, bool]:
        index = _read(folder)
        unread = "unreadable" in index.description()["left_out"]["counts"]  # it may be readable the next time
        return index, len(index.name_ends) >= _LARGE and not unread

    homes = [cache_folder("folders") / f"{home}.index"]
    arrays, home = kept(homes, len(Index._fields), lambda found: _holds(Index(*found), folder), make)
    index = Index(*arrays)
    about = index.description()
    unnamed, first = about["unnamed"]
    if unnamed:
        _LOG.warning("%d pictures in %s are not named in %s, the first %s", unnamed, folder, about["captions"], first)
    return index, home


def map_index(home: Path) -> Index:
    """Maps the index that `open_folder` wrote."""
    return Index(*map_arrays(home, len(Index._fields)))


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
    left_out = LeftOut()
    captions = _caption_file(folder)
    times = {captions: _time(folder / captions)}
    pictures: dict[str, bool] = {}  # and whether a text lies beside
    for below, names in _walk(folder, times, left_out):
        pictures.update(_pictures(below, names))
    if not pictures:
        raise UserError(f"there are no pictures in {folder} ({', '.join(sorted(images.SUFFIXES))})")
    unnamed: set[str] = set()
    if captions == SIDECARS:
        told = {name: b"" for name in sorted(pictures) if pictures[name]}
        if not told:
            first = PurePosixPath(min(pictures))
            raise UserError(
                f"not one of {len(pictures)} pictures in {folder} has a caption, the first {first}: "
                f"write {first.with_suffix('.txt')} or a {METADATA}"
            )
        for name in sorted(pictures.keys() - told.keys()):
            left_out.add("no caption", name)
    else:
        told, unnamed = _read_metadata(folder / captions, pictures, left_out)
        if not told:
            causes = str(left_out) or "it is empty"
            raise UserError(
                f"{folder / captions} has no caption of a picture that is in {folder}, to which file_name is relative "
                f"({causes})"
            )
    _, *folders = times
    about = {
        "captions": captions,
        "folders": folders,
        "unnamed": [len(unnamed), clean(min(unnamed, default=""))],
        "left_out": vars(left_out),
    }
    names, said = Strings.of([os.fsencode(name) for name in told]), Strings.of([*told.values()])
    description = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return Index(*names, *said, description, np.array([*times.values()], np.int64))


def _walk(folder: Path, times: dict[str, int], left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder's place below ``folder``, "a/b/", and its files; notes its time before it is read."""
    waiting, seen = ["./"], set()
    while waiting:
        below = waiting.pop()
        inner, files = [], []
        try:
            status = os.stat(folder / below)
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
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
                            files.append(entry.name)  # no pipe and no device, of which reading has no end
                    except OSError:  # a link that leads to itself, or where nobody may look
                        left_out.add("unreadable", str(PurePosixPath(below, entry.name)))
        except OSError:
            left_out.add("unreadable", below)
        below = below.removeprefix("./")
        yield below, files
        waiting += [f"{below}{name}/" for name in sorted(inner, reverse=True)]


def _pictures(below: str, names: list[str]) -> Iterator[tuple[str, bool]]:
    """Yields the pictures among the files of a folder, and whether each has a text of its name beside it."""
    split = [os.path.splitext(name) for name in names]
    texts = {stem for stem, ending in split if ending == ".txt"}
    for name, (stem, ending) in zip(names, split, strict=True):
        if ending.lower() in images.SUFFIXES:
            yield f"{below}{name}", stem in texts


def _read_metadata(path: Path, pictures: Collection[str], left_out: LeftOut) -> tuple[dict[str, bytes], set[str]]:
    """Returns ``[captions, fields]`` of each picture, as JSON, and those that no line names; leaves out bad lines.

    A file named twice has the captions of both lines, and the fields of the first.
    """
    told: dict[str, bytes] = {}
    unnamed = set(pictures)
    missing: dict[str, str] = {}
    for number, line in _lines(path, left_out):
        where = f"{path.name}:{number}"
        try:
            name, captions, fields = _parsed(json_object(line) if isinstance(line, str) else line)
        except (ValueError, TypeError) as error:
            left_out.add("broken metadata", f"{where}, {error}")
            continue
        name = name if name in pictures else PurePosixPath(name).as_posix()  # of ./a.png
        unnamed.discard(name)
        if name not in pictures:
            missing.setdefault(name, where)
        elif not captions:
            left_out.add("no caption", where)
        else:
            earlier, first = json.loads(told[name]) if name in told else ((), fields)
            told[name] = json.dumps([[*earlier, *captions], first]).encode()
    for name, where in missing.items():
        left_out.add("missing", f"{where}, {name}")
    return told, unnamed


def _lines(path: Path, left_out: LeftOut) -> Iterator[tuple[int, str | dict[str, Any]]]:
    """Yields the number of each line that is not blank, and the line, of a table by column."""
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
            left_out.add("broken metadata", f"{path.name}:{table.line_num}, {error}")
            continue
        yield table.line_num, {column: value for column, value in row.items() if column and value is not None}


def _texts(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(None, path.name, size, leave=False, unit="B", disable=size < _SLOW) as bar:
        for line in file:
            bar.update(len(line))
            yield text_of(line)


def _parsed(line: dict[str, Any]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    for field in ("file_name", "text"):
        if field not in line:
            raise ValueError(f"{field} is missing")
    fields = dict(line)
    name, text = fields.pop("file_name"), fields.pop("text")
    try:
        captions = captions_in(text) if text not in (None, []) else ()
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise TypeError("file_name must be a string, and text a string or a list of strings")
    return name, captions, fields
