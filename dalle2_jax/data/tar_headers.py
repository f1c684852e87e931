"""The headers of tar files, read several times as fast as by `tarfile`, which makes an object of each.

What writers of data sets write is understood: POSIX and GNU headers and old ones, GNU's long names, times in pax
headers, links and folders among the files. From the first header of another kind on a tar is left to `tarfile`.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_NOTHING = bytes(BLOCK)
_FILES, _EMPTY = b"0\x007", b"123456"
_LONG_NAME, _PAX, _UNUSED = b"L", b"x", b"gK"
_TELLING = (b"path=", b"size=", b"GNU.sparse", b"hdrcharset=")
"""What in a pax header matters here."""


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


class DamagedError(Exception):
    """A tar ends, or makes no sense, at a place; ``cut`` says which. What came before it is good."""

    def __init__(self, place: int, cut: bool) -> None:
        super().__init__(f"{'cut' if cut else 'damaged'} at {place}")
        self.place, self.cut = place, cut


class _UnusualError(Exception):
    """A header that is left to `tarfile`."""


def members(file: BinaryIO) -> Iterator[Member]:
    """Yields the files of a tar in their order; sparse ones are left out.

    Raises:
        DamagedError: after the files before the damage.
        OSError: it cannot be read.
    """
    try:
        yield from _members(file)
    except _UnusualError as unusual:
        [place] = unusual.args
        yield from _by_tarfile(file, place)


def _members(file: BinaryIO) -> Iterator[Member]:
    place, start, long_name = 0, 0, None  # of a header, and of the first that belongs to a file
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedError(place, cut=True)
        if block == _NOTHING:
            return
        kind, size = block[156:157], _number(block[124:136])
        if size is None or not _is_whole(block):
            raise DamagedError(place, cut=False)
        content = place + BLOCK
        place = content + (0 if kind in _EMPTY else -(-size // BLOCK) * BLOCK)
        if kind in _UNUSED:
            continue
        if kind in (_LONG_NAME, _PAX):
            told = file.read(size)
            if len(told) < size:
                raise DamagedError(content, cut=True)
            if kind == _LONG_NAME:
                long_name = told.rstrip(b"\0")
            elif any(word in told for word in _TELLING):
                raise _UnusualError(start)
            continue
        if kind in _FILES:
            name = _name(block) if long_name is None else long_name
            if not (kind == b"\0" and name.endswith(b"/")):  # a folder, of old
                yield Member(name.decode("utf-8", "surrogateescape"), content, size)
        elif kind not in _EMPTY:
            raise _UnusualError(start)
        start, long_name = place, None


def _is_whole(block: bytes) -> bool:
    """Whether a header's sum is that of its letters, its own counting as spaces; of old, as signed ones."""
    told, unsigned = _number(block[148:156]), sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return told == unsigned or told == unsigned - 256 * sum(letter > 127 for letter in block[:148] + block[156:])


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int | None:
    """The number in a field, octal or, with its first bit set, binary; None if it is none, or below zero."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return number if number >= 0 else None


def _by_tarfile(file: BinaryIO, start: int) -> Iterator[Member]:
    """Yields the files from a header on."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()
                if member.size < 0 or tar.offset <= member.offset:
                    raise DamagedError(member.offset, cut=False)
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
            place = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        raise DamagedError(start, cut=True) from None
    file.seek(place)
    tail = file.read(BLOCK)
    if len(tail) < BLOCK or any(tail):
        raise DamagedError(place, cut=len(tail) < BLOCK)
