"""The headers of tar files, read several times as fast as by `tarfile`, which makes an object for each.

It reads what writers of data sets write: POSIX, GNU and old headers, long names of GNU, times in pax headers, links and
folders among the files. From the first header of another kind on, `tarfile` reads the rest of the file.
"""

import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

BLOCK = tarfile.BLOCKSIZE

_MAX_MEMBER, _MAX_EXTENSION = 2**50, 2**20
"""Limits on the bytes that a header may claim for a member, and for an extended header."""

_NOTHING = bytes(BLOCK)
_FILES, _EMPTY = b"0\x007", b"123456"
_LONG_NAME, _PAX, _UNUSED = b"L", b"x", b"gK"
_RELEVANT = (b"path=", b"size=", b"GNU.sparse", b"hdrcharset=")
"""Fields of a pax header that this reader does not support."""


class Readable(Protocol):
    """A file that is read from any offset, local or remote."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...


class TarMember(NamedTuple):
    """A file in a tar: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


class DamagedError(Exception):
    """A tar file is cut short (``cut``) or damaged at an offset; the members before it are intact."""

    def __init__(self, place: int, cut: bool) -> None:
        super().__init__(f"{'cut' if cut else 'damaged'} at {place}")
        self.place, self.cut = place, cut


class _UnusualError(Exception):
    """A header that only `tarfile` reads."""


def members(file: Readable) -> Iterator[TarMember]:
    """Yields the files of a tar in their order, except sparse ones.

    Raises:
        DamagedError: after the files before the damage.
        OSError: the file cannot be read.
    """
    try:
        yield from _members(file)
    except _UnusualError as unusual:
        [place] = unusual.args
        yield from _by_tarfile(file, place)


def _members(file: Readable) -> Iterator[TarMember]:
    place, start, long_name = 0, 0, None  # of a header, and of the first header of a file
    while True:
        file.seek(place)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DamagedError(place, cut=True)
        if block == _NOTHING:
            return
        kind, size = block[156:157], _number(block[124:136])
        limit = _MAX_EXTENSION if kind in (_LONG_NAME, _PAX) else _MAX_MEMBER
        if size is None or size > limit or not _is_intact(block):
            raise DamagedError(place, cut=False)
        content = place + BLOCK
        place = content + (0 if kind in _EMPTY else -(-size // BLOCK) * BLOCK)
        if kind in _UNUSED:
            continue
        if kind in (_LONG_NAME, _PAX):
            extension = file.read(size)
            if len(extension) < size:
                raise DamagedError(content, cut=True)
            if kind == _LONG_NAME:
                long_name = extension.rstrip(b"\0")
            elif any(word in extension for word in _RELEVANT):
                raise _UnusualError(start)
            continue
        if kind in _FILES:
            name = _name(block) if long_name is None else long_name
            if not (kind == b"\0" and name.endswith(b"/")):  # a folder, in old files
                yield TarMember(name.decode("utf-8", "surrogateescape"), content, size)
        elif kind not in _EMPTY:
            raise _UnusualError(start)
        start, long_name = place, None


def _is_intact(block: bytes) -> bool:
    """Returns whether the checksum of a header is right: the sum of its bytes, in old files of signed ones."""
    stored, unsigned = _number(block[148:156]), sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return stored == unsigned or stored == unsigned - 256 * sum(letter > 127 for letter in block[:148] + block[156:])


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int | None:
    """Returns the number in a field, octal or, with its first bit set, binary; None if it is none or negative."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return number if number >= 0 else None


class _Bounded:
    """A file that limits what `tarfile` reads at a time, since that trusts the sizes in headers."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Returns the next bytes. tarfile.ReadError for more bytes than an extended header may have."""
        if not 0 <= size <= _MAX_EXTENSION + BLOCK:
            raise tarfile.ReadError("a header claims too much")
        return self._file.read(size)


def _by_tarfile(file: Readable, start: int) -> Iterator[TarMember]:
    """Yields the files from a header on, read by `tarfile`."""
    file.seek(start)
    try:
        bounded: Any = _Bounded(file)
        tar: Any = tarfile.open(fileobj=bounded, mode="r:")
        with tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which tarfile would keep for all members
                if member.size < 0 or tar.offset <= member.offset:
                    raise DamagedError(member.offset, cut=False)
                if member.isreg() and not member.issparse():
                    yield TarMember(member.name, member.offset_data, member.size)
            place = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError, LookupError, RecursionError):
        raise DamagedError(start, cut=True) from None
    file.seek(place)
    tail = file.read(BLOCK)
    if len(tail) < BLOCK or any(tail):
        raise DamagedError(place, cut=len(tail) < BLOCK)
