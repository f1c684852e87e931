"""Where in tar shards the members of each record lie: one scan of the headers, kept in files.

``SHARD.tar.index.npz`` beside a shard has its index, and holds as long as the shard's size and time are those it was
made for. One more file has those of the whole list of shards joined, and is mapped into memory, so that opening a data
set costs neither time nor memory for its records. What cannot be written beside the shards is kept below
``~/.cache/dalle2_jax``.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from dalle2_jax.data import images
from dalle2_jax.data.arrays import Strings, cache_folder, kept, map_arrays, room
from dalle2_jax.data.patience import Pulse, persistently
from dalle2_jax.data.records import LeftOut
from dalle2_jax.data.storage import Files
from dalle2_jax.data.tar_headers import DamagedError, Member, members
from dalle2_jax.files import write_atomically
from dalle2_jax.types import UserError

IMAGE, TEXT, JSON = 0, 2, 4
"""Columns of `Index.rows`: where the offset of a member is; its size is the next. -1 for a member that is not there."""

_COLUMNS = {"txt": TEXT, "json": JSON, **{suffix[1:]: IMAGE for suffix in images.SUFFIXES}}

SCAN_TIMEOUT = 60.0
"""Seconds that reading a header of a shard may take."""

_VERSION, _JOINED_VERSION = 2, 3
_SCANNERS = 8
_CACHE, _ENDING = "shards", ".index.npz"

_HELD = 2**24
"""Records whose indices are held in memory while they are joined, which takes about 100 bytes each."""

_WHOLE = ("shard lost", "not a tar")
"""Causes of all of a shard, which counts as many records as whole ones have on average."""

_PART = ("shard cut short", "shard damaged")
"""Causes of the rest of a shard, which counts as many records as it has fewer than that."""


class Index(NamedTuple):
    """The records of one shard or of many, in the order of the shards and in them.

    Attributes:
        rows: offsets and sizes of picture, text and JSON, within the shard.
        ends: where in ``names`` the key of each record ends.
        names: the keys, UTF-8, one after the other.
        starts: the first record of each shard, and the count of all records.
        about: JSON: what was left out, as `LeftOut` has it.
    """

    rows: Int64[np.ndarray, "N 6"]
    ends: Int64[np.ndarray, "N"]
    names: UInt8[np.ndarray, "letters"]
    starts: Int64[np.ndarray, "shards+1"]
    about: UInt8[np.ndarray, "json"]

    def key(self, record: int) -> str:
        """Returns the key of a record."""
        return Strings(self.names, self.ends).at(record).decode("utf-8", "replace")

    @property
    def left_out(self) -> LeftOut:
        """What was left out."""
        return unpacked(self.about)


def packed(left_out: LeftOut) -> UInt8[np.ndarray, "json"]:
    """Returns what was left out as JSON."""
    return np.frombuffer(json.dumps(vars(left_out)).encode(), np.uint8)


def unpacked(about: UInt8[np.ndarray, "json"]) -> LeftOut:
    """Returns what `packed` was given."""
    return LeftOut(**json.loads(bytes(about)))


def scan(file: BinaryIO, size: int) -> Index:
    """Reads the headers of a tar file of ``size`` bytes.

    Members belong to one record if their names agree up to the first dot after the last slash. Of a file that is
    cut short or damaged in the middle the whole records before that are left.
    """
    rows: dict[str, list[int]] = {}
    left_out = LeftOut()
    try:
        for member in members(file):
            _note(member, size, rows, left_out)
    except DamagedError as damage:
        if damage.place == 0 and not rows:
            left_out.add("not a tar", "")
        else:
            left_out.add("shard cut short" if damage.cut else "shard damaged", "")
    whole = {key: row for key, row in rows.items() if row[IMAGE] >= 0 and max(row[TEXT], row[JSON]) >= 0}
    for key, row in rows.items():
        if key not in whole and min(row) >= -1:
            left_out.add("no caption" if row[IMAGE] >= 0 else "no picture", key)
    keys = Strings.of([key.encode("utf-8", "replace") for key in whole])
    return Index(
        np.array(list(whole.values()), np.int64).reshape(-1, 6),
        keys.ends,
        keys.letters,
        np.array([0, len(whole)], np.int64),
        packed(left_out),
    )


def _note(member: Member, size: int, rows: dict[str, list[int]], left_out: LeftOut) -> None:
    """Notes where a member lies, in the row of its record."""
    folder, _, file = member.name.rpartition("/")
    stem, _, kind = file.partition(".")
    column = _COLUMNS.get(kind.lower())
    if column is None or not stem:
        return
    above = folder.split("/") if folder else []
    if member.name.startswith("/") or ".." in above:
        left_out.add("unsafe name", member.name, column == IMAGE)
        return
    key = "/".join([*(name for name in above if name not in ("", ".")), stem]) if above else stem
    row = rows.setdefault(key, [-1] * 6)
    if row[column] >= 0:
        left_out.add("named twice", member.name, column == IMAGE)
    elif member.offset + member.size > size:
        row[:] = [-2] * 6  # the record at the cut
    elif row[column] == -1:
        row[column : column + 2] = member.offset, member.size


def open_index(files: Files) -> tuple[Index, Path | None]:
    """Returns the index of all shards, and the file that it is mapped from, None if none could be written.

    Of shards that are not there, or are no tars, as many records are left out as whole ones have on average; of those
    that are cut short or damaged, as many as they have fewer than that, but at least one.
    """
    lasting = hashlib.sha256(json.dumps([_JOINED_VERSION, files.paths]).encode()).hexdigest()[:16]
    homes = [cache_folder(_CACHE) / f"{lasting}.index"]
    if files.local:
        homes.insert(0, Path(files.paths[0]).parent / f".{lasting}.index")

    def make() -> tuple[list[np.ndarray], bool]:
        shards = _scan_all(files)
        unread = any(shard.lost and size >= 0 for shard, (size, _) in zip(shards, files.stamps, strict=True))
        return [files.stamps, *_joined(files, shards)], not unread  # it may be there the next time

    arrays, home = kept(homes, 1 + len(Index._fields), lambda found: np.array_equal(found[0], files.stamps), make)
    return Index(*arrays[1:]), home


def map_index(home: Path) -> Index:
    """Maps the index that `open_index` wrote."""
    return Index(*map_arrays(home, 1 + len(Index._fields))[1:])


class _Shard(NamedTuple):
    """What is known of a shard; its index is not held where all of them would fill the memory."""

    records: int
    letters: int
    left_out: LeftOut
    index: Index | None

    @property
    def lost(self) -> bool:
        return self.has("shard lost")

    def has(self, *causes: str) -> bool:
        """Whether anything was left out for one of the causes."""
        return any(cause in self.left_out.counts for cause in causes)


def _scan_all(files: Files) -> list[_Shard]:
    numbers, found, held = range(len(files.paths)), [], 0
    with ThreadPoolExecutor(_SCANNERS) as pool:
        indices = pool.map(lambda number: _shard(files, number), numbers)
        title = "reading the headers of shards"
        for index in tqdm(indices, title, len(numbers), leave=False, disable=len(numbers) < 20):
            if index is None:
                found.append(_Shard(0, 0, LeftOut({"shard lost": 1}), None))
                continue
            held += len(index.rows)
            found.append(_Shard(len(index.rows), len(index.names), index.left_out, index if held <= _HELD else None))
    return found


def _shard(files: Files, number: int) -> Index | None:
    """Returns the index of a shard, from where it is kept or from a scan; None if it cannot be read."""
    stamp = files.stamps[number]
    if stamp[0] < 0:
        return None
    name = hashlib.sha256(files.paths[number].encode("utf-8", "surrogateescape")).hexdigest()[:24]
    cached = cache_folder(_CACHE) / f"{name}.npz"
    for read in (lambda: files.beside(number, _ENDING), cached.read_bytes):
        try:
            with np.load(io.BytesIO(read()), allow_pickle=False) as stored:
                if stored["version"] == _VERSION and np.array_equal(stored["stamp"], stamp):
                    return Index(*(stored[field] for field in Index._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    try:
        pulse = Pulse()
        index = persistently(lambda: _scan_one(files, number, pulse), SCAN_TIMEOUT, pulse=pulse)
    except OSError:
        return None
    content = io.BytesIO()
    np.savez(content, version=_VERSION, stamp=stamp, **index._asdict())
    writes = (lambda text: files.write_beside(number, _ENDING, text), lambda text: write_atomically(cached, text))
    for write in writes:
        try:
            write(content.getvalue())
            break
        except OSError:
            continue
    return index


def _scan_one(files: Files, number: int, pulse: Pulse) -> Index:
    with files.scan(number) as file:
        return scan(_Beating(file, pulse), int(files.stamps[number, 0]))


class _Beating:
    """A file with a pulse."""

    def __init__(self, file: BinaryIO, pulse: Pulse) -> None:
        self._file, self._pulse = file, pulse
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._pulse.beat()
        return content


def _joined(files: Files, shards: list[_Shard]) -> Index:
    """Joins the indices of shards; those that are not held are read again."""
    left_out = _left_out(files.paths, shards)
    starts = np.cumsum([0] + [shard.records for shard in shards])
    letters = np.cumsum([0] + [shard.letters for shard in shards])
    rows, ends = room((int(starts[-1]), 6), np.int64), room((int(starts[-1]),), np.int64)
    names = room((int(letters[-1]),), np.uint8)
    for number, shard in enumerate(shards):
        if not shard.records:
            continue
        index = shard.index or _shard(files, number)
        if index is None or (len(index.rows), len(index.names)) != (shard.records, shard.letters):
            raise UserError(f"{files.paths[number]} was changed while the headers of its shards were read")
        own = slice(starts[number], starts[number + 1])
        rows[own], ends[own] = index.rows, index.ends + letters[number]
        names[letters[number] : letters[number + 1]] = index.names
    return Index(rows, ends, names, starts, packed(left_out))


def _left_out(paths: Sequence[str], shards: list[_Shard]) -> LeftOut:
    """Counts what was left out of all shards, by estimate where a whole shard or the rest of one is gone."""
    whole = [shard.records for shard in shards if not shard.has(*_WHOLE, *_PART)]
    # with no whole one, as many as the largest has
    usual = max(1, round(sum(whole) / len(whole)) if whole else max(shard.records for shard in shards))
    left_out = LeftOut()
    for path, (records, _, found, _) in zip(paths, shards, strict=True):
        estimates = dict.fromkeys(_WHOLE, usual) | dict.fromkeys(_PART, max(1, usual - records))
        for cause, count in found.counts.items():
            name = found.first.get(cause)
            left_out.add(cause, f"{path}: {name}" if name else path, estimates.get(cause, count))
    return left_out
