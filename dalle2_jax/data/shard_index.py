"""Where in tar shards the members of each record lie: one scan of the headers, kept in files beside the shards.

``SHARD.tar.index.npz`` has the index of one shard, and is valid as long as the shard's size and time are those it was
made for; one file for the whole list of shards has them joined, and is mapped into memory, so that opening a data set
costs neither time nor memory for its records. Where the folder of the shards cannot be written, both are kept below
``~/.cache/dalle2_jax``.
"""

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from dalle2_jax.data import images
from dalle2_jax.data.storage import SCAN_TIMEOUT, Files, persistently
from dalle2_jax.files import write_atomically

IMAGE, TEXT, JSON = 0, 2, 4
"""Columns of `Index.rows`: where the offset of a member is; its size is the next. -1 for a member that is not there."""

_VERSION = 1
_SCANNERS = 8


class Index(NamedTuple):
    """The records of one shard or of many, in the order of the shards and in them.

    Attributes:
        rows: offsets and sizes of picture, text and JSON, within the shard.
        ends: where in ``names`` the key of each record ends.
        names: the keys, UTF-8, one after the other.
        starts: the first record of each shard, and the count of all records.
        about: JSON: what was left out, by cause.
    """

    rows: Int64[np.ndarray, "N 6"]
    ends: Int64[np.ndarray, "N"]
    names: UInt8[np.ndarray, "letters"]
    starts: Int64[np.ndarray, "shards+1"]
    about: UInt8[np.ndarray, "json"]

    def key(self, record: int) -> str:
        """Returns the key of a record."""
        start = self.ends[record - 1] if record else 0
        return bytes(self.names[start : self.ends[record]]).decode("utf-8", "replace")

    @property
    def refused(self) -> Counter[str]:
        """How many records were left out, by cause."""
        return Counter(json.loads(bytes(self.about)))


def scan(file: BinaryIO, size: int) -> Index:
    """Reads the headers of a tar file of ``size`` bytes.

    Members belong to one record if their names agree up to the first dot after the last slash. Of a file that is
    cut short or damaged in the middle the whole records before that are left.
    """
    rows: dict[str, list[int]] = {}
    refused: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError("a header that leads back")
                if member.isreg() and not member.issparse():
                    _note(member, size, rows, refused)
            file.seek(tar.offset)
            tail = file.read(tarfile.BLOCKSIZE)
        if len(tail) < tarfile.BLOCKSIZE or any(tail):
            refused["shard cut short" if len(tail) < tarfile.BLOCKSIZE else "shard damaged"] += 1
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        refused["shard cut short" if rows else "not a tar"] += 1
    whole = {key: row for key, row in rows.items() if row[IMAGE] >= 0 and max(row[TEXT], row[JSON]) >= 0}
    for key, row in rows.items():
        if key not in whole and min(row) >= -1:
            refused["no caption" if row[IMAGE] >= 0 else "no picture"] += 1
    keys = [key.encode("utf-8", "replace") for key in whole]
    return Index(
        np.array(list(whole.values()), np.int64).reshape(-1, 6),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.frombuffer(b"".join(keys), np.uint8),
        np.array([0, len(whole)], np.int64),
        _packed(refused),
    )


def _note(member: tarfile.TarInfo, size: int, rows: dict[str, list[int]], refused: Counter[str]) -> None:
    """Notes where a member lies, in the row of its record."""
    path = PurePosixPath(member.name)
    stem, _, kind = path.name.partition(".")
    column = {"txt": TEXT, "json": JSON}.get(kind.lower(), IMAGE if f".{kind.lower()}" in images.SUFFIXES else None)
    if column is None or not stem:
        return
    if path.is_absolute() or ".." in path.parts:
        refused["unsafe name"] += column == IMAGE
        return
    row = rows.setdefault(str(path.parent / stem), [-1] * 6)
    if row[column] >= 0:
        refused["named twice"] += column == IMAGE
    elif member.offset_data + member.size > size:
        row[:] = [-2] * 6  # the record at the cut
    elif row[column] == -1:
        row[column : column + 2] = member.offset_data, member.size


def open_index(files: Files) -> tuple[Index, Path | None]:
    """Returns the index of all shards, and the file that it is mapped from, None if none could be written.

    Shards that are not there, or are no tars, count among the refused as many records as the others have on average.
    """
    lasting = hashlib.sha256(json.dumps([_VERSION, files.paths]).encode()).hexdigest()[:16]
    homes = [_cache() / f"{lasting}.index"]
    if files.local:
        homes.insert(0, Path(files.paths[0]).parent / f".{lasting}.index")
    for home in homes:
        try:
            stamps, *arrays = map_arrays(home, 1 + len(Index._fields))
            if np.array_equal(stamps, files.stamps):
                return Index(*arrays), home
        except (OSError, ValueError):
            continue
    index = _joined(_scan_all(files))
    for home in homes:
        try:
            write_arrays(home, files.stamps, *index)
            return Index(*map_arrays(home, 1 + len(Index._fields))[1:]), home
        except OSError:
            continue
    return index, None


def _scan_all(files: Files) -> list[Index | None]:
    numbers = range(len(files.paths))
    with ThreadPoolExecutor(_SCANNERS) as pool:
        found = pool.map(lambda number: _shard(files, number), numbers)
        return list(tqdm(found, "reading the headers of shards", len(numbers), leave=False, disable=len(numbers) < 20))


def _shard(files: Files, number: int) -> Index | None:
    """Returns the index of a shard, from its cache or from a scan; None if it cannot be read."""
    path, stamp = files.paths[number], files.stamps[number]
    if stamp[0] < 0:
        return None
    name = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    homes = [Path(f"{path}.index.npz")] * files.local + [_cache() / f"{name}.npz"]
    for home in homes:
        try:
            with open(home, "rb") as file, np.load(file) as stored:
                if stored["version"] == _VERSION and np.array_equal(stored["stamp"], stamp):
                    return Index(*(stored[field] for field in Index._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    try:
        index = persistently(lambda: _scan_one(files, number), SCAN_TIMEOUT)
    except OSError:
        return None
    content = io.BytesIO()
    np.savez(content, version=_VERSION, stamp=stamp, **index._asdict())
    for home in homes:
        try:
            write_atomically(home, content.getvalue())
            break
        except OSError:
            continue
    return index


def _scan_one(files: Files, number: int) -> Index:
    with files.scan(number) as file:
        return scan(file, int(files.stamps[number, 0]))


def _joined(shards: list[Index | None]) -> Index:
    refused: Counter[str] = Counter()
    for shard in shards:
        refused.update(shard.refused if shard else {"shard lost": 1})
    there = [shard for shard in shards if shard is not None and "not a tar" not in shard.refused]
    counts = [0 if shard is None else len(shard.rows) for shard in shards]
    for cause in ("shard lost", "not a tar"):
        refused[cause] *= max(1, round(sum(counts) / max(1, len(there))))
    letters = np.cumsum([0] + [len(shard.names) for shard in there])
    ends = [shard.ends + before for shard, before in zip(there, letters, strict=False)]
    return Index(
        np.concatenate([np.zeros((0, 6), np.int64)] + [shard.rows for shard in there]),
        np.concatenate([np.zeros(0, np.int64)] + ends),
        np.concatenate([np.zeros(0, np.uint8)] + [shard.names for shard in there]),
        np.cumsum([0] + counts),
        _packed(refused),
    )


def write_arrays(path: Path, *arrays: np.ndarray) -> None:
    """Writes arrays one after the other as .npy, for `map_arrays`. OSError where that cannot be."""
    content = io.BytesIO()
    for array in arrays:
        np.save(content, np.ascontiguousarray(array), allow_pickle=False)
        content.write(bytes(-content.tell() % 64))
    write_atomically(path, content.getbuffer())


def map_arrays(path: Path, count: int) -> list[np.ndarray]:
    """Maps the arrays of a file into memory, read-only. OSError or ValueError if there are not so many."""
    arrays = []
    whole = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    with open(path, "rb") as file:
        for _ in range(count):
            np.lib.format.read_magic(file)
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), int(np.prod(shape)) * kind.itemsize
            arrays.append(whole[start : start + size].view(kind).reshape(shape))
            file.seek(-(-(start + size) // 64) * 64)
    return arrays


def _packed(refused: Mapping[str, int]) -> np.ndarray:
    told = {cause: count for cause, count in refused.items() if count}
    return np.frombuffer(json.dumps(told).encode(), np.uint8)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle2_jax" / "shards"
