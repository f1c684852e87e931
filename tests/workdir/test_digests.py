"""Digests find every change of a file, and of themselves."""

import errno
import json
import os

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.workdir import digests

LARGE = digests._BLOCK + 5 * 8168 + 321
"""Bytes of a file of more than one block, with rows and a remainder in the second one."""


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for name, size in {"a/large": LARGE, "a/b/small": 100, "empty": 0, "top": 9000}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(noise.bytes(size))
    digests.write(tmp_path)
    return tmp_path


def flip(path, place, bit=0):
    with open(path, "r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def assert_found(folder):
    with pytest.raises(digests.Damaged, check=mentions()):
        digests.check(folder)


def test_what_is_unchanged_is_sound(folder):
    assert digests.check(folder) and digests.changed(folder) == []
    assert not digests.check(folder / "a"), "it has no digests.json"


@pytest.mark.parametrize("name", ["a/large", "a/b/small", "top"])
def test_every_flipped_bit_is_found(folder, name):
    noise, path = np.random.default_rng(1), folder / name
    size = path.stat().st_size
    for place in (0, size - 1, *noise.integers(size, size=8)):
        bit = int(noise.integers(8))
        flip(path, place, bit)
        assert_found(folder)
        flip(path, place, bit)
    assert digests.check(folder)


def test_zeroed_exchanged_and_repeated_pages_are_found(folder):
    path = folder / "a/large"
    content = path.read_bytes()
    page = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    for changed in (
        [bytes(4096), *page[1:]],
        [page[1], page[0], *page[2:]],
        [page[2], page[1], page[0], *page[3:]],
        [page[255], *page[1:255], page[0], *page[256:]],
        [page[0], page[0], *page[2:]],
    ):
        path.write_bytes(b"".join(changed))
        assert_found(folder)


def test_sizes_losses_and_other_kinds_of_file_are_found(folder):
    path = folder / "a/b/small"
    content = path.read_bytes()
    for damage in (
        lambda: path.write_bytes(content[:-1]),
        lambda: path.write_bytes(content + b"\0"),
        path.unlink,
        lambda: os.mkfifo(path),  # which would wait for a writer
        lambda: (path.unlink(), path.symlink_to(folder / "top")),
        lambda: (path.unlink(), path.parent.rmdir(), path.parent.write_bytes(b"")),
    ):
        damage()
        assert_found(folder)


def test_every_damaged_byte_of_the_digests_is_found_or_harmless(folder):
    path = folder / digests.NAME
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            assert digests._read(folder) == json.loads(content)["files"]
        except digests.Damaged:
            continue
        assert content[place : place + 1].isspace()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_digests_name_nothing_outside(folder, name):
    digests._write(folder, {name: [0, "0" * 32]})
    assert_found(folder)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": 3}', "null", '{"files": {"a": []}, "digest": ""}', "\xff"]
)
def test_hostile_digests_are_damage(folder, content):
    (folder / digests.NAME).write_text(content, encoding="latin-1")
    assert_found(folder)


def test_parts_are_checked_alone(folder):
    flip(folder / "a/b/small", 3)
    assert digests.check(folder, ["elsewhere"])
    with pytest.raises(digests.Damaged, check=mentions("a/b/small")):
        digests.check(folder, ["a"])
    flip(folder / "top", 3)
    with pytest.raises(digests.Damaged, check=mentions("top")):
        digests.check(folder, [])


@pytest.mark.parametrize("name", ["a/large", "a/b/small", "empty", "top"])
def test_processes_share_the_work_and_leave_nothing_out(folder, name):
    with open(folder / name, "ab") as file:
        file.write(b"!")
    found = 0
    for number in range(3):
        try:
            digests.check(folder, None, (number, 3))
        except digests.Damaged:
            found += 1
    assert found == 1


def test_what_cannot_be_read_is_no_damage(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.EIO):
        digests.check(folder)


def test_files_are_recorded_one_by_one(tmp_path):
    for name in ("one", "two", "more/three"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    digests.record(tmp_path, "one")
    digests.record(tmp_path, "more")
    (tmp_path / "two").write_text("not recorded")
    assert digests.changed(tmp_path) == []
    (tmp_path / "one").write_text("1")
    (tmp_path / "more/three").write_text("3")
    assert digests.changed(tmp_path) == ["one", "more/three"] and digests.changed(tmp_path, "more/three")
    digests.record(tmp_path, "one")
    (tmp_path / "more/three").unlink()
    assert digests.changed(tmp_path) == [], "a file may be removed"
    flip(tmp_path / digests.NAME, 20)
    assert digests.changed(tmp_path) == [digests.NAME]
    digests.record(tmp_path, "one")
    assert digests.changed(tmp_path) == []


def test_verification_is_skipped_inside_a_block_alone():
    assert digests.verifying()
    with digests.unverified(skip=True):
        assert not digests.verifying()
        with digests.unverified(skip=False):
            assert digests.verifying()
    assert digests.verifying()
