"""Headers are parsed as `tarfile` parses them, for every tar writer, and damage is located exactly."""

import io
import random
import subprocess
import tarfile

import pytest

from dalle2_jax.data.formats.tar_headers import BLOCK, DamagedError, TarMember, members

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def entry(name, content=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(entries, form=tarfile.PAX_FORMAT):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as file:
        for info, data in entries:
            file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def by_tarfile(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        return [TarMember(one.name, one.offset_data, one.size) for one in file if one.isreg() and not one.issparse()]


def read(content):
    """Returns the members before the first damage, and the damage (None if there is none)."""
    found = []
    try:
        found.extend(members(io.BytesIO(content)))
    except DamagedError as damage:
        return found, damage
    return found, None


LINKS = [
    entry("a.png", b"a" * 700),
    entry("link.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    entry("hard.png", kind=tarfile.LNKTYPE, linkname="a.png"),
    entry("folder", kind=tarfile.DIRTYPE),
    entry("pipe", kind=tarfile.FIFOTYPE),
    entry("device", kind=tarfile.CHRTYPE),
    entry("old.png", b"b" * 512, kind=tarfile.AREGTYPE),
    entry("oldfolder/", kind=tarfile.AREGTYPE),
    entry("empty.txt"),
    entry("contiguous.txt", b"c", kind=tarfile.CONTTYPE),
]
NAMES = [
    *(entry(name, name.encode()) for name in ("x.y.z", "./here.txt", "../up.txt", "/root.txt", "a//b.txt")),
    entry("l" * 60 + "/" + "m" * 90 + ".txt", b"long"),
]
WORLD = [
    entry("n" * 99 + "/" + "o" * 240 + ".txt", b"longer"),
    entry("\u65e5\u672c \u00fc.txt", b"unicode"),
    entry(b"caf\xe9.txt".decode("utf-8", "surrogateescape"), b"not UTF-8"),
    entry("timed.txt", b"time", mtime=1234567890.123),
    entry("linked", kind=tarfile.SYMTYPE, linkname="p" * 200),
    entry("owned.txt", b"x", uname="\u00fc" * 20, uid=2**40),
]


@pytest.mark.parametrize("form", FORMATS)
def test_headers_are_parsed_as_tarfile_parses_them(form):
    entries = LINKS + NAMES + (WORLD if form != "ustar" else [])
    content = tar(entries + [entry("last.txt", b"end")], FORMATS[form])
    found, damage = read(content)
    assert damage is None and found == by_tarfile(content) and found[-1].name == "last.txt"
    for member in found:
        assert len(content[member.offset : member.offset + member.size]) == member.size


def test_archives_of_the_tar_command_are_parsed(tmp_path):
    """A sparse file in the middle of the archive is excluded."""
    for name in ("a.png", "b.txt", "z.txt"):
        (tmp_path / name).write_bytes(name.encode() * 300)
    with (tmp_path / "c.png").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"something")
    for form in ("gnu", "posix", "ustar", "v7"):
        words = ["tar", "-cf", "out.tar", f"--format={form}", *(["-S"] if form in ("gnu", "posix") else [])]
        subprocess.run([*words, "a.png", "b.txt", "c.png", "z.txt"], cwd=tmp_path, check=True)
        content = (tmp_path / "out.tar").read_bytes()
        found, damage = read(content)
        assert damage is None and found == by_tarfile(content)
        assert [one.name for one in found] == ["a.png", "b.txt", "z.txt"] or form in ("ustar", "v7")


def test_sizes_too_large_for_octal_are_parsed():
    info = entry("huge.bin")[0]
    info.size = 2**36
    header = info.tobuf(tarfile.GNU_FORMAT)
    found, damage = read(header + bytes(BLOCK))
    assert found == [TarMember("huge.bin", BLOCK, 2**36)] and damage.cut


def test_damage_is_located_exactly():
    content = tar([entry(f"{number}.txt", b"x" * 600) for number in range(4)], tarfile.GNU_FORMAT)
    assert read(b"")[1].cut and read(b"")[1].place == 0
    assert read(content[: 2 * 1536 + 100])[1].place == 2 * 1536 and read(content[: 2 * 1536 + 100])[1].cut
    broken = bytearray(content)
    broken[3 * 1536 + 20] ^= 1
    found, damage = read(bytes(broken))
    assert len(found) == 3 and damage.place == 3 * 1536 and not damage.cut
    found, damage = read(b"<html>" * 200)
    assert not found and damage.place == 0 and not damage.cut
    assert read(bytes(2 * BLOCK)) == ([], None), "an empty tar"
    negative = bytearray(entry("a.txt")[0].tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12
    assert read(bytes(negative))[1].place == 0


def test_historic_signed_checksums_are_accepted():
    header = bytearray(entry("\u00fc.txt")[0].tobuf(tarfile.GNU_FORMAT))
    signed = sum(letter - 256 * (letter > 127) for letter in header[:148] + header[156:]) + 8 * ord(" ")
    header[148:156] = b"%06o\0 " % signed
    assert read(bytes(header) + bytes(BLOCK)) == ([TarMember("\u00fc.txt", BLOCK, 0)], None)


def test_random_corruption_yields_intact_members_or_a_damage():
    """However a tar is corrupted, the members before the corruption are unchanged, or damage is reported."""
    rng = random.Random(0)
    entries = [entry(f"{number}.txt", bytes([number]) * 100 * number) for number in range(5)]
    content = tar(LINKS + WORLD + entries)
    intact = by_tarfile(content)
    for _ in range(400):
        noisy = bytearray(content)
        first = len(noisy)
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(len(noisy))
            noisy[place] = rng.randrange(256)
            first = min(first, place)
        if rng.random() < 0.3:
            del noisy[rng.randrange(len(noisy)) :]
        found, damage = read(bytes(noisy))
        before = [one for one in intact if one.offset + one.size <= min(first, len(noisy))]
        assert found[: len(before)] == before or damage is not None and damage.place <= first
