"""The index of tar shards: offsets of the members of each record, from one scan of the headers, cached in files.

``SHARD.tar.index.npz`` next to a shard has its index, and is valid while the size and time of the shard do not change.
Another file has the joined index of all shards and is mapped into memory, so that opening a data set takes no time or
memory per record. Files that cannot be written next to the shards are written under ``~/.cache/dalle2_jax``.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from dalle2_jax.data.formats.tar_headers import DamagedError, Readable, TarMember, members
from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.records import RejectionCounts
from dalle2_jax.data.storage.arrays import (
    BYTES,
    NUMBERS,
    Kind,
    Strings,
    allocate,
    load_or_build,
    map_arrays,
    unpack_arrays,
)
from dalle2_jax.data.storage.files import Files
from dalle2_jax.data.storage.remote import Reader
from dalle2_jax.data.storage.retry import Heartbeat, with_retries
from dalle2_jax.errors import UserError
from dalle2_jax.files import cache_folder, write_atomically
from dalle2_jax.reading import parse_json, read_bytes

IMAGE, TEXT, JSON = 0, 2, 4
"""Columns of `Index.rows` with the offset of a member, followed by its size; -1 for a missing member."""

_COLUMNS = {"txt": TEXT, "json": JSON, **{suffix[1:]: IMAGE for suffix in decoding.SUFFIXES}}

SCAN_TIMEOUT = 60.0
"""Seconds that reading a header of a shard may take."""

_VERSION, _JOINED_VERSION = 2, 3
_SCANNERS = 8
_CACHE, _ENDING = "shards", ".index.npz"

_MIN_INDEX, _MAX_ABOUT, _MAX_RECORDS = 2**20, 2**20, 2**22
"""Minimum limit on the bytes of an index (else twice those of the shard), and limits on ``about`` and the records."""

_HELD = 2**24
"""Records whose indices stay in memory while they are joined, at about 100 bytes each."""

_ALL_LOST = ("shard lost", "not a tar")
"""Causes that reject all records of a shard, estimated as the mean of the intact shards."""

_REST_LOST = ("shard cut short", "shard damaged")
"""Causes that reject the rest of a shard, estimated as the difference to that mean."""


class Index(NamedTuple):
    """The records of one shard or of many, in the order of the shards and in them.

    Attributes:
        rows: offset and size of the image, the text and the JSON, within the shard.
        ends: where in ``names`` the key of each record ends.
        names: the keys, UTF-8, one after the other.
        starts: the first record of each shard, and the count of all records.
        about: the rejected records (`RejectionCounts`) as JSON.
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
    def rejections(self) -> RejectionCounts:
        """The rejected records."""
        return unpacked(self.about)


_KINDS = {
    "rows": Kind(np.int64, (None, 6)),
    "ends": NUMBERS,
    "names": BYTES,
    "starts": NUMBERS,
    "about": BYTES,
}
"""Kinds of the fields of an `Index`."""


def packed(rejections: RejectionCounts) -> UInt8[np.ndarray, "json"]:
    """Returns counts of rejected records as JSON."""
    return np.frombuffer(json.dumps(vars(rejections)).encode(), np.uint8)


def unpacked(about: UInt8[np.ndarray, "json"]) -> RejectionCounts:
    """Returns the counts that `packed` encoded. ValueError for anything else."""
    counts, first = {"": -1}, {}
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        stored = parse_json(bytes(about[: _MAX_ABOUT + 1]))
        counts, first = dict(stored.get("counts", {})), dict(stored.get("first", {}))
    counted = all(type(count) is int and count >= 0 for count in counts.values())
    if not counted or not all(isinstance(where, str) for where in first.values()):
        raise ValueError("it has no counts of rejected records")
    return RejectionCounts(counts, first)


def is_rejection_counts(about: UInt8[np.ndarray, "json"]) -> bool:
    """Returns whether `unpacked` can read the JSON."""
    try:
        unpacked(about)
    except ValueError:
        return False
    return True


def scan(file: Readable, size: int) -> Index:
    """Reads the headers of a tar file of ``size`` bytes.

    Members belong to one record if their names are equal up to the first dot after the last slash. If a file is cut
    short or damaged, the complete records before the damage are returned.
    """
    rows: dict[str, list[int]] = {}
    rejections = RejectionCounts()
    try:
        for member in members(file):
            if len(rows) > _MAX_RECORDS:
                raise DamagedError(member.offset, cut=False)
            _add_member(member, size, rows, rejections)
    except DamagedError as damage:
        if damage.place == 0 and not rows:
            rejections.add("not a tar", "")
        else:
            rejections.add("shard cut short" if damage.cut else "shard damaged", "")
    complete = {key: row for key, row in rows.items() if row[IMAGE] >= 0 and max(row[TEXT], row[JSON]) >= 0}
    for key, row in rows.items():
        if key not in complete and min(row) >= -1:
            rejections.add("no caption" if row[IMAGE] >= 0 else "no image", key)
    keys = Strings.of([key.encode("utf-8", "replace") for key in complete])
    return Index(
        np.array(list(complete.values()), np.int64).reshape(-1, 6),
        keys.ends,
        keys.letters,
        np.array([0, len(complete)], np.int64),
        packed(rejections),
    )


def _add_member(member: TarMember, size: int, rows: dict[str, list[int]], rejections: RejectionCounts) -> None:
    """Adds the offset and size of a member to the row of its record."""
    folder, _, file = member.name.rpartition("/")
    stem, _, kind = file.partition(".")
    column = _COLUMNS.get(kind.lower())
    if column is None or not stem:
        return
    above = folder.split("/") if folder else []
    if member.name.startswith("/") or ".." in above:
        rejections.add("unsafe name", member.name, column == IMAGE)
        return
    key = "/".join([*(name for name in above if name not in ("", ".")), stem]) if above else stem
    row = rows.setdefault(key, [-1] * 6)
    if row[column] >= 0:
        rejections.add("named twice", member.name, column == IMAGE)
    elif member.offset + member.size > size:
        row[:] = [-2] * 6  # the record at the cut
    elif row[column] == -1:
        row[column : column + 2] = member.offset, member.size


def open_index(files: Files) -> tuple[Index, Path | None]:
    """Returns the index of all shards, and the file that it is mapped from, None if none could be written.

    A shard that is missing or no tar file counts as many rejected records as an intact shard has on average; one that
    is cut short or damaged counts its difference to that mean, but at least one.
    """
    lasting = hashlib.sha256(json.dumps([_JOINED_VERSION, files.paths]).encode()).hexdigest()[:16]
    paths = [cache_folder(_CACHE) / f"{lasting}.index"]
    if files.local:
        paths.insert(0, Path(files.paths[0]).parent / f".{lasting}.index")

    def make() -> tuple[list[np.ndarray], bool]:
        shards = _scan_all(files)
        unread = any(shard.lost and size >= 0 for shard, (size, _) in zip(shards, files.stamps, strict=True))
        return [files.stamps, *_joined(files, shards)], not unread  # it may be readable the next time

    def holds(found: list[np.ndarray]) -> bool:
        index = Index(*found[1:])
        starts = index.starts
        if len(starts) != len(files.paths) + 1 or starts[0] != 0 or np.any(np.diff(starts) < 0):
            return False
        fits = starts[-1] == len(index.rows) == len(index.ends) and is_rejection_counts(index.about)
        return bool(fits) and np.array_equal(found[0], files.stamps)

    arrays, cached = load_or_build(paths, [Kind(np.int64, (None, 2)), *_KINDS.values()], holds, make)
    return Index(*arrays[1:]), cached


def map_index(cached: Path) -> Index:
    """Maps the index that `open_index` wrote."""
    return Index(*map_arrays(cached, [Kind(np.int64, (None, 2)), *_KINDS.values()])[1:])


class _Shard(NamedTuple):
    """The index of a shard, or only its sizes (``held`` is None) if all indices would fill the memory."""

    records: int
    letters: int
    rejections: RejectionCounts
    held: Index | None

    @property
    def lost(self) -> bool:
        return self.has("shard lost")

    def has(self, *causes: str) -> bool:
        """Returns whether records were rejected for one of the causes."""
        return any(cause in self.rejections.counts for cause in causes)


def _scan_all(files: Files) -> list[_Shard]:
    numbers, found, held = range(len(files.paths)), [], 0
    with ThreadPoolExecutor(_SCANNERS) as pool:
        indices = pool.map(lambda number: _shard(files, number), numbers)
        title = "reading the headers of shards"
        for index in tqdm(indices, title, len(numbers), leave=False, disable=len(numbers) < 20):
            if index is None:
                found.append(_Shard(0, 0, RejectionCounts({"shard lost": 1}), None))
                continue
            held += len(index.rows)
            found.append(_Shard(len(index.rows), len(index.names), index.rejections, index if held <= _HELD else None))
    return found


def _shard(files: Files, number: int) -> Index | None:
    """Returns the index of a shard, from its cache or from a scan; None if the shard cannot be read."""
    stamp = files.stamps[number]
    if stamp[0] < 0:
        return None
    name = hashlib.sha256(files.paths[number].encode("utf-8", "surrogateescape")).hexdigest()[:24]
    cached = cache_folder(_CACHE) / f"{name}.npz"
    limit = max(_MIN_INDEX, 2 * int(stamp[0]))
    for read in (lambda: files.read_companion(number, _ENDING, limit), lambda: read_bytes(cached, limit)):
        try:
            stored = unpack_arrays(read(), {"version": Kind(np.int64, ()), "stamp": NUMBERS, **_KINDS}, limit)
        except (OSError, ValueError):
            continue
        index = Index(*(stored[field] for field in Index._fields))
        if stored["version"] == _VERSION and np.array_equal(stored["stamp"], stamp) and _fits(index, int(stamp[0])):
            return index
    try:
        heartbeat = Heartbeat()
        index = with_retries(lambda: _scan_one(files, number, heartbeat), SCAN_TIMEOUT, heartbeat=heartbeat)
    except OSError:
        return None
    content = io.BytesIO()
    np.savez(content, version=_VERSION, stamp=stamp, **index._asdict())
    writes = (lambda text: files.write_companion(number, _ENDING, text), lambda text: write_atomically(cached, text))
    for write in writes:
        try:
            write(content.getvalue())
            break
        except OSError:
            continue
    return index


def _fits(index: Index, size: int) -> bool:
    """Returns whether an index fits a shard of ``size`` bytes: like the shard, it is untrusted."""
    places, sizes = index.rows[:, ::2], index.rows[:, 1::2]
    inside = (places == -1) | ((places >= 0) & (sizes >= 0) & (sizes <= size) & (places <= size - sizes))
    ends = np.concatenate([[0], index.ends])
    named = len(ends) == len(index.rows) + 1 and np.all(np.diff(ends) >= 0) and ends[-1] <= len(index.names)
    return (
        bool(inside.all() and named)
        and index.starts.tolist() == [0, len(index.rows)]
        and is_rejection_counts(index.about)
    )


def _scan_one(files: Files, number: int, heartbeat: Heartbeat) -> Index:
    with files.scan(number) as file:
        return scan(_Beating(file, heartbeat), int(files.stamps[number, 0]))


class _Beating:
    """A file whose reads are beats of a heartbeat."""

    def __init__(self, file: BinaryIO | Reader, heartbeat: Heartbeat) -> None:
        self._file, self._heartbeat = file, heartbeat
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._heartbeat.beat()
        return content


def _joined(files: Files, shards: list[_Shard]) -> Index:
    """Joins the indices of shards; reads those again that are not in memory."""
    rejections = _total_rejections(files.paths, shards)
    starts = np.cumsum([0] + [shard.records for shard in shards])
    letters = np.cumsum([0] + [shard.letters for shard in shards])
    rows, ends = allocate((int(starts[-1]), 6), np.int64), allocate((int(starts[-1]),), np.int64)
    names = allocate((int(letters[-1]),), np.uint8)
    for number, shard in enumerate(shards):
        if not shard.records:
            continue
        index = shard.held or _shard(files, number)
        if index is None or (len(index.rows), len(index.names)) != (shard.records, shard.letters):
            raise UserError(
                f"{files.paths[number]} was changed while the headers of the shards were read: run the command again"
            )
        own = slice(starts[number], starts[number + 1])
        rows[own], ends[own] = index.rows, index.ends + letters[number]
        names[letters[number] : letters[number + 1]] = index.names
    return Index(rows, ends, names, starts, packed(rejections))


def _total_rejections(paths: Sequence[str], shards: list[_Shard]) -> RejectionCounts:
    """Counts the rejected records of all shards, by an estimate where a shard or the rest of it is lost."""
    intact = [shard.records for shard in shards if not shard.has(*_ALL_LOST, *_REST_LOST)]
    # without an intact shard, the size of the largest
    usual = max(1, round(sum(intact) / len(intact)) if intact else max(shard.records for shard in shards))
    rejections = RejectionCounts()
    for path, (records, _, found, _) in zip(paths, shards, strict=True):
        estimates = {
            cause: usual if cause in _ALL_LOST else max(1, usual - records) for cause in (*_ALL_LOST, *_REST_LOST)
        }
        for cause, count in found.counts.items():
            name = found.first.get(cause)
            rejections.add(cause, f"{path}: {name}" if name else path, estimates.get(cause, count))
    return rejections
