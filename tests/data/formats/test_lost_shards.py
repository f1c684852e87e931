"""Local shards that vanish, hang or change are retried and then skipped; the other shards are still read."""

import os
import threading

import pytest
from raised import mentions
from tar_files import levels, members, png, tar

from dalle2_jax.data import ImageSource, Rejected, WebdatasetRecords
from dalle2_jax.data.formats import shard_index
from dalle2_jax.data.storage import files, retry

pytestmark = pytest.mark.usefixtures("alone")


def test_a_shard_that_vanishes_is_retried_then_skipped(shards, monkeypatch):
    source = ImageSource(WebdatasetRecords(shards), 8)
    (shards / "00001.tar").rename(shards / "away")
    tried, wait = [], retry.time.sleep
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: tried.append(seconds) or wait(seconds))
    found = levels(source)
    assert found[:5] == list(range(5)) and found[8:] == list(range(8, 12)) and not {5, 6, 7} & set(found)
    assert source.rejections.counts == {"shard lost": 3} and tried == [0.01, 0.01]


def test_a_pipe_is_rejected_as_a_shard(shards):
    os.mkfifo(shards / "00003.tar")
    records = WebdatasetRecords(shards)
    assert len(records) == 12 and records.rejections.counts == {"shard lost": 4}


def test_a_shard_whose_headers_hang_is_skipped(shards, monkeypatch):
    monkeypatch.setattr(shard_index, "SCAN_TIMEOUT", 0.1)
    hang, scan = threading.Event(), files.Files.scan

    class Hanging:
        def __init__(self, file):
            self.file, self.seek, self.tell = file, file.seek, file.tell

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            return hang.wait(20) and b"" if self.file.tell() > 2000 else self.file.read(size)

    def opened(self, number):
        return Hanging(scan(self, number)) if number == 1 else scan(self, number)

    monkeypatch.setattr(files.Files, "scan", opened)
    records = WebdatasetRecords(shards)
    assert len(records) == 9 and "00001.tar" in records.rejections.first["shard lost"]
    hang.set()
    monkeypatch.setattr(files.Files, "scan", scan)
    assert len(WebdatasetRecords(shards)) == 12, "the next source retries the shard"


def test_a_shard_that_reappears_is_read(shards, monkeypatch):
    records = WebdatasetRecords(shards)
    (shards / "00001.tar").rename(shards / "away")
    monkeypatch.setattr(retry.time, "sleep", lambda _: (shards / "away").rename(shards / "00001.tar"))
    assert records.read(6).captions == ("caption 6",)


def test_a_shard_that_hangs_is_skipped(shards, monkeypatch):
    monkeypatch.setattr(files, "TIMEOUT", 0.05)
    records, pread = WebdatasetRecords(shards), os.pread
    hang = threading.Event()
    monkeypatch.setattr(os, "pread", lambda *place: hang.wait(20) and b"")
    with pytest.raises(Rejected, check=mentions(cause="shard lost")):
        records.read(6)
    hang.set()
    monkeypatch.setattr(os, "pread", pread)
    assert records.read(0).captions == ("caption 0",)


def test_a_rewritten_shard_is_not_read_with_the_old_index(shards):
    records = WebdatasetRecords(shards)
    tar(shards / "00001.tar", members(range(90, 96)))
    with pytest.raises(Rejected, check=mentions(cause="shard lost")):
        records.read(6)
    assert records.read(3).captions == ("caption 3",)


def test_the_number_of_open_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_OPEN_FILES", 2)
    for number in range(6):
        tar(tmp_path / f"{number}.tar", members([number]))
    records = WebdatasetRecords(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [records.read(index).image for index in range(6)] == [png(index) for index in range(6)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
