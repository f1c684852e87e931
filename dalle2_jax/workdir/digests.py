"""Digests of files: detect damage on disk (a flipped bit, a zeroed page, a lost file) before the content is used.

A folder's ``digests.json`` names each file below it with its size and the digest of each of its parts. A digest is the
BLAKE2b of sums: the words of a block are summed in ``_COLUMNS`` columns, modulo 2^64, and only the sums are hashed.
It runs at about 12 GB/s a core, ten times as fast as a cryptographic hash of all bytes. Every change within one row
(8,168 bytes) changes a sum; the number of columns is prime, so that exchanged pages do too. It is no protection
against a person who changes file and digest.
"""

import concurrent.futures
import contextlib
import contextvars
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dalle2_jax.files import write_atomically
from dalle2_jax.reading import open_regular, parse_json

NAME = "digests.json"

_COLUMNS, _ROWS = 1021, 128
_BLOCK = 8 * _COLUMNS * _ROWS
_PART = 64 * _BLOCK
"""Bytes that one thread digests at a time, about 67 MB. Part of the format, as are the two lines above."""

_THREADS = min(8, os.cpu_count() or 1)

LARGEST_MANIFEST = 2**26
"""Bytes; the digests of a million files."""


NOVERIFY = "load without comparing files with their digests, which find damage on disk"
"""The help of --noverify, in every command that has it."""

_VERIFYING = contextvars.ContextVar("verifying", default=True)


class Damaged(Exception):
    """A file is proven to differ from what was written; the message is one line."""


@contextlib.contextmanager
def unverified(skip: bool) -> Iterator[None]:
    """Lets everything be read without a look at its digests, if ``skip``: what --noverify does."""
    token = _VERIFYING.set(not skip)
    try:
        yield
    finally:
        _VERIFYING.reset(token)


def verifying() -> bool:
    """Whether digests are to be compared here."""
    return _VERIFYING.get()


def write(folder: Path) -> None:
    """Writes ``digests.json`` with the digests of all files in a folder and below.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    _write(folder, of_folder(folder))


def of_folder(folder: Path) -> dict[str, list[Any]]:
    """Reads all files in a folder and below; returns {file: [size, digest of each part]}. OSError if one cannot be."""
    paths = (Path(root) / name for root, _, names in os.walk(folder, onerror=_raise) for name in names)
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    return _digests(folder, [name for name in files if name != NAME])


def record(folder: Path, name: str) -> None:
    """Adds the digests of one file, or of all files in a subfolder, to a folder's ``digests.json``."""
    try:
        known = _read(folder) or {}
    except Damaged:
        known = {}
    path = folder / name
    files = [name]
    if path.is_dir():
        files = sorted(file.relative_to(folder).as_posix() for file in path.rglob("*") if file.is_file())
    gone = {other for other in known if other == name or other.startswith(f"{name}/")} - {*files}
    others = {other: entry for other, entry in known.items() if other not in gone}
    _write(folder, others | _digests(folder, files))  # in the same order: nothing changes if no file did


def check(folder: Path, names: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)) -> bool:
    """Compares files with their digests.

    Args:
      folder: has the ``digests.json``.
      names: subfolders and files to check, besides the files at the top of the folder; None for all.
      share: (i, n) checks each n-th part from the i-th on, for n processes that check one folder together.

    Returns:
      False if the folder has no ``digests.json``.

    Raises:
      Damaged: a file differs, is missing, or ``digests.json`` itself is damaged.
      OSError: a file cannot be read now, which proves nothing.
    """
    files = _read(folder)
    if files is None:
        return False
    if names is not None:
        selected = {*names}
        files = {name: entry for name, entry in files.items() if "/" not in name or name.split("/")[0] in selected}
    parts = [(name, number) for name, (_, *digests) in files.items() for number in range(len(digests))]
    own = parts[share[0] :: share[1]]
    for name in dict.fromkeys(name for name, _ in own):
        _check_size(folder, name, files[name][0])
    for (name, number), digest in zip(own, _of_parts(folder, own), strict=True):
        if digest != files[name][1 + number]:
            raise Damaged(f"{name} is not as it was written")
    return True


def changed(folder: Path, name: str | None = None) -> list[str]:
    """Returns the files that differ from their entry in a folder's ``digests.json``, without removed files.

    Args:
      folder: may have a ``digests.json``, which counts as changed if it is damaged itself.
      name: the only file or subfolder to compare; None for all.

    Raises:
      OSError: a file cannot be read now.
    """
    try:
        known = _read(folder) or {}
    except Damaged:
        return [NAME]
    there = {
        file: entry
        for file, entry in known.items()
        if (name is None or f"{file}/".startswith(f"{name}/")) and (folder / file).is_file()
    }
    found = _digests(folder, there)
    return [file for file, entry in there.items() if entry != found[file]]


def sizes(folder: Path) -> dict[str, int]:
    """Returns the size of each file that a folder's ``digests.json`` lists, by its path inside the folder.

    Raises:
      Damaged: ``digests.json`` is damaged or missing.
    """
    files = _read(folder)
    if files is None:
        raise Damaged(f"{NAME} is missing")
    return {name: size for name, (size, *_) in files.items()}


def _write(folder: Path, files: Mapping[str, list[Any]]) -> None:
    write_atomically(folder / NAME, json.dumps({"files": files, "digest": _of_manifest(files)}, indent=0) + "\n")


def _read(folder: Path) -> dict[str, list[Any]] | None:
    """Returns a folder's {file: [size, digest of each part]}, or None if it has no ``digests.json``."""
    try:
        with open_regular(folder / NAME, follow=False) as file:
            content = file.read(LARGEST_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) > LARGEST_MANIFEST:
        raise Damaged(f"{NAME} is larger than {LARGEST_MANIFEST} bytes")
    files: dict[str, list[Any]] = {}
    try:
        manifest = parse_json(content)
        files = manifest["files"]
        sound = manifest["digest"] == _of_manifest(files) and all(map(_valid, files, files.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise Damaged(f"{NAME} is not as it was written")
    return files


def _valid(name: str, entry: Any) -> bool:
    """Whether an entry names a file inside the folder, its size, and as many digests as it has parts."""
    size, *digests = entry
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(size, int) and len(digests) == _parts(size)


def _of_manifest(files: Mapping[str, list[Any]]) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()


def _raise(error: OSError) -> None:
    raise error


def _parts(size: int) -> int:
    return max(1, -(-size // _PART))


def _digests(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Returns {file: [size, digest of each part]}."""
    sizes = {name: os.lstat(folder / name).st_size for name in names}
    parts = [(name, number) for name, size in sizes.items() for number in range(_parts(size))]
    files: dict[str, list[Any]] = {name: [size] for name, size in sizes.items()}
    for (name, _), digest in zip(parts, _of_parts(folder, parts), strict=True):
        files[name].append(digest)
    return files


def _of_parts(folder: Path, parts: Iterable[tuple[str, int]]) -> list[str]:
    """Returns the digest of each (file, number of part), computed by several threads."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        waiting = [pool.submit(_of_part, folder / name, number) for name, number in parts]
        try:
            return [each.result() for each in waiting]
        except FileNotFoundError as error:
            raise Damaged(f"{os.path.relpath(error.filename, folder)} is missing") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _of_part(path: Path, number: int) -> str:
    """Returns the digest of a file's bytes from ``number * _PART`` on."""
    digest, buffer = hashlib.blake2b(digest_size=16), bytearray(_BLOCK)
    view = memoryview(buffer)
    with open_regular(path, follow=False) as file:
        for start in range(number * _PART, (number + 1) * _PART, _BLOCK):
            length = _fill(file.fileno(), view, start)
            if rows := length // (8 * _COLUMNS):
                words = np.frombuffer(buffer, "<u8", rows * _COLUMNS).reshape(rows, _COLUMNS)
                digest.update(np.add.reduce(words, axis=0).tobytes())
            digest.update(view[8 * rows * _COLUMNS : length])
            if length < _BLOCK:
                break
    return digest.hexdigest()


def _fill(handle: int, view: memoryview, start: int) -> int:
    """Reads a file from ``start`` until the buffer or the file is at its end; returns how many bytes were read."""
    length = 0
    while length < len(view) and (count := os.preadv(handle, [view[length:]], start + length)):
        length += count
    return length


def _check_size(folder: Path, name: str, size: int) -> None:
    try:
        found = os.lstat(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{name} is not a regular file")
    if found.st_size != size:
        raise Damaged(f"{name} has {found.st_size} bytes, not {size}")
