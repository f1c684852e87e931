"""Tar shards behind a real web server that fails in every way: what hangs, breaks or goes is tried again, then left."""

import pickle
import threading

import pytest
from tar_files import members, png, tar
from web_server import served

from dalle2_jax.data import PictureSource, Rejected, WebdatasetRecords, make_stream, remote, storage
from dalle2_jax.types import UserError


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def shards(tmp_path):
    """Three shards of four records each."""
    for shard in range(3):
        tar(tmp_path / f"{shard:05d}.tar", members(range(4 * shard, 4 * shard + 4)))
    return tmp_path


@pytest.fixture
def site(shards):
    with served(shards) as site:
        yield site


def all_of(site):
    return WebdatasetRecords(f"{site.url}/{{00000..00002}}.tar")


def test_shards_behind_a_web_server(site):
    for pattern in (f"{site.url}/{{00000..00003}}.tar", f"{site.url}/*.tar", site.url):
        records = pickle.loads(pickle.dumps(WebdatasetRecords(pattern)))
        assert len(records) == 12 and [*records.captions(2)] == ["caption 0", "caption 11"]
        assert records.left_out.counts == ({"shard lost": 4} if "3}" in pattern else {})
        for index in (11, 0, 5):
            assert records.read(index).image == png(index)


def test_the_headers_are_read_once(site):
    all_of(site)
    site.asked.clear()
    assert all_of(site).read(9).captions == ("caption 9",)
    parts = {name: part for method, name, part in site.asked if method == "GET" and name.endswith(".tar")}
    assert parts.keys() == {"00000.tar", "00002.tar"} and all(parts.values())  # whether it knows parts, and the record


def test_the_index_lies_beside_shards_where_it_can_be_written(shards, monkeypatch):
    """So that of many hosts one reads the headers."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        system.pipe_file(f"/beside/{path.name}", path.read_bytes())
    try:
        WebdatasetRecords("memory://beside")
        assert system.exists("/beside/00001.tar.index.npz")
        monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "another host"))
        monkeypatch.setattr("dalle2_jax.data.shard_index.scan", None)
        assert WebdatasetRecords("memory://beside").read(10).captions == ("caption 10",)
    finally:
        system.rm("/beside", recursive=True)


def test_parts_are_asked_for_by_name(shards, monkeypatch):
    """The file system of s3:// has a version where others have the beginning."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    system, cat_file = memory(), memory.cat_file

    def as_s3(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return cat_file(self, path, start, end)

    monkeypatch.setattr(memory, "cat_file", as_s3)
    system.pipe_file("/versions/0.tar", (shards / "00000.tar").read_bytes())
    try:
        assert WebdatasetRecords("memory://versions").read(3).captions == ("caption 3",)
    finally:
        system.rm("/versions", recursive=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_from_the_web_resumes_in_the_middle_of_a_shard(site, workers):
    def make(num_workers=0):
        return make_stream(PictureSource(all_of(site), 8), None, 8, 2, seed=3, num_workers=num_workers)

    whole = [next(stream)["image"][:, 0, 0, 0].tolist() for stream in [make()] for _ in range(8)]
    assert sorted(sum(whole[:6], [])) == list(range(12))
    resumed = make(workers)
    resumed.set_state({"global_next_index": 6})
    assert [next(resumed)["image"][:, 0, 0, 0].tolist() for _ in range(5)] == whole[3:]
    resumed.close()


@pytest.mark.parametrize("failure", ["broken", "cut", "drop", "gone", "forbidden"])
def test_what_fails_is_tried_again_and_then_left(site, failure):
    source = PictureSource(all_of(site), 8)
    site.fails["00001.tar"] = [failure, failure]
    assert source[5]["image"][0, 0, 0] == 5 and not source.rejected, "the third attempt is good"
    site.fails["00001.tar"] = failure
    site.asked.clear()
    assert source[6]["stands_in"] and source[7]["stands_in"] and source.rejected == {"shard lost": 2}
    asked = [name for _, name, _ in site.asked].count("00001.tar")
    assert asked in (3, 6), "a lost shard is not asked for again; the library asks twice where a connection breaks"
    assert [int(source[index]["image"][0, 0, 0]) for index in (0, 4, 8)][::2] == [0, 8]


def test_a_shard_that_hangs_is_left_within_the_time_limit(site, monkeypatch):
    monkeypatch.setattr(storage, "TIMEOUT", 0.3)
    records = all_of(site)
    site.fails["00001.tar"] = "hang"
    with pytest.raises(Rejected, match="shard lost"):
        records.read(6)
    assert records.read(2).captions == ("caption 2",) and records.read(9).image == png(9)
    source = PictureSource(records, 8)
    drawn = [int(source[index]["image"][0, 0, 0]) for index in range(12)]
    assert drawn[:4] + drawn[8:] == [0, 1, 2, 3, 8, 9, 10, 11] and not {4, 5, 6, 7} & set(drawn)


def test_a_shard_whose_headers_cannot_be_read_is_lost_until_the_next_time(site):
    site.fails["00001.tar"] = "broken"
    records = all_of(site)
    assert len(records) == 8 and records.left_out.counts == {"shard lost": 4}
    assert "00001.tar" in records.left_out.first["shard lost"]
    site.fails.clear()
    assert len(all_of(site)) == 12


def test_an_empty_shard_is_no_tar(site, shards):
    (shards / "00000.tar").write_bytes(b"")
    records = all_of(site)
    assert len(records) == 8 and records.left_out.counts == {"not a tar": 4}


def test_a_server_that_knows_no_parts_is_said_in_one_line(site):
    site.fails.update(dict.fromkeys(("00000.tar", "00001.tar", "00002.tar"), "whole"))
    with pytest.raises(UserError, match="sends whole files and no parts of them") as told:
        all_of(site)
    assert "\n" not in str(told.value)


def test_a_server_that_is_not_there_is_said_in_one_line(site, monkeypatch):
    with pytest.raises(UserError, match="there are no .tar files at .*/9.tar"):
        WebdatasetRecords(f"{site.url}/9.tar")
    port = site.url.split(":")[2].split("/")[0]
    gone = site.url.replace(port, "1")
    with pytest.raises(UserError, match="http:// gives no answer .*connect") as told:
        WebdatasetRecords(f"{gone}/{{00000..00002}}.tar")
    assert "\n" not in str(told.value)
    monkeypatch.setattr(remote, "LIST_TIMEOUT", 0.2)
    site.fails[""] = "hang"
    with pytest.raises(UserError, match="http:// gives no answer .no answer within 0.2 s"):
        WebdatasetRecords(site.url)


def test_many_threads_read_at_once(site):
    source, found = PictureSource(all_of(site), 8), {}

    def read(start):
        found[start] = [int(source[index]["image"][0, 0, 0]) for index in range(start, 12, 3)]

    threads = [threading.Thread(target=read, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {start: list(range(start, 12, 3)) for start in range(3)} and not source.rejected
