"""Tar shards on a real web server with injected failures: failed reads are retried, then skipped."""

import pickle
import threading

import pytest
from raised import mentions
from streams import text_stream
from tar_files import members, png, tar
from web_server import served

from dalle2_jax.data import ImageSource, Rejected, WebdatasetRecords, example
from dalle2_jax.data.storage import files, remote
from dalle2_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def shards(tmp_path):
    """Returns a folder of three shards with four records each."""
    for shard in range(3):
        tar(tmp_path / f"{shard:05d}.tar", members(range(4 * shard, 4 * shard + 4)))
    return tmp_path


@pytest.fixture
def site(shards):
    with served(shards) as site:
        yield site


def all_of(site):
    return WebdatasetRecords(f"{site.url}/{{00000..00002}}.tar")


def test_shards_on_a_web_server_are_read(site):
    for pattern in (f"{site.url}/{{00000..00003}}.tar", f"{site.url}/*.tar", site.url):
        records = pickle.loads(pickle.dumps(WebdatasetRecords(pattern)))
        assert len(records) == 12 and [*records.captions(2)] == ["caption 0", "caption 11"]
        assert records.rejections.counts == ({"shard lost": 4} if "3}" in pattern else {})
        for index in (11, 0, 5):
            assert records.read(index).image == png(index)


def test_the_index_of_remote_shards_is_cached(site):
    all_of(site)
    site.requests.clear()
    assert all_of(site).read(9).captions == ("caption 9",)
    parts = {name: part for method, name, part in site.requests if method == "GET" and name.endswith(".tar")}
    assert parts.keys() == {"00000.tar", "00002.tar"} and all(parts.values())  # range probe and record


def test_the_index_is_stored_next_to_writable_shards(shards, monkeypatch):
    """Then only one of many hosts scans the headers."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    try:
        WebdatasetRecords("memory://shards")
        assert system.exists("/shards/00001.tar.index.npz")
        monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "another host"))
        monkeypatch.setattr("dalle2_jax.data.formats.shard_index.scan", None)
        assert WebdatasetRecords("memory://shards").read(10).captions == ("caption 10",)
    finally:
        system.rm("/shards", recursive=True)


def test_byte_ranges_are_passed_by_keyword(shards, monkeypatch):
    """The s3:// file system has the version where others have the start of the range."""
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
        return text_stream(ImageSource(all_of(site), 8), None, 8, 2, seed=3, num_workers=num_workers)

    uninterrupted = [next(stream)["image"][:, 0, 0, 0].tolist() for stream in [make()] for _ in range(8)]
    assert sorted(sum(uninterrupted[:6], [])) == list(range(12))
    resumed = make(workers)
    resumed.set_state({"global_next_index": 6})
    assert [next(resumed)["image"][:, 0, 0, 0].tolist() for _ in range(5)] == uninterrupted[3:]
    resumed.close()


@pytest.mark.parametrize("failure", ["broken", "cut", "drop", "not found", "forbidden"])
def test_failed_reads_are_retried_then_skipped(site, failure):
    source = ImageSource(all_of(site), 8)
    site.fails["00001.tar"] = [failure, failure]
    assert example(source, 5)["image"][0, 0, 0] == 5 and not source.rejections.counts, "the third attempt succeeds"
    site.fails["00001.tar"] = failure
    site.requests.clear()
    assert source.fetch([6, 7])["substitute"].all() and source.rejections.counts == {"shard lost": 2}
    requested = [name for _, name, _ in site.requests].count("00001.tar")
    assert requested in (3, 6), "a lost shard is not requested again; the library requests twice if a connection breaks"
    assert [int(example(source, index)["image"][0, 0, 0]) for index in (0, 4, 8)][::2] == [0, 8]


def test_a_hanging_download_is_skipped_within_the_time_limit(site, monkeypatch):
    monkeypatch.setattr(files, "TIMEOUT", 0.3)
    records = all_of(site)
    site.fails["00001.tar"] = "hang"
    with pytest.raises(Rejected, check=mentions(cause="shard lost")):
        records.read(6)
    assert records.read(2).captions == ("caption 2",) and records.read(9).image == png(9)
    source = ImageSource(records, 8)
    levels = [int(example(source, index)["image"][0, 0, 0]) for index in range(12)]
    assert levels[:4] + levels[8:] == [0, 1, 2, 3, 8, 9, 10, 11] and not {4, 5, 6, 7} & set(levels)


def test_a_shard_with_unreadable_headers_is_lost_until_the_next_source(site):
    site.fails["00001.tar"] = "broken"
    records = all_of(site)
    assert len(records) == 8 and records.rejections.counts == {"shard lost": 4}
    assert "00001.tar" in records.rejections.first["shard lost"]
    site.fails.clear()
    assert len(all_of(site)) == 12


def test_an_empty_remote_shard_is_not_a_tar(site, shards):
    (shards / "00000.tar").write_bytes(b"")
    records = all_of(site)
    assert len(records) == 8 and records.rejections.counts == {"not a tar": 4}


def test_a_server_without_range_support_is_reported_in_one_line(site):
    site.fails.update(dict.fromkeys(("00000.tar", "00001.tar", "00002.tar"), "ignore range"))
    with pytest.raises(UserError, check=mentions(f"{site.url}/00000.tar", "range requests")):
        all_of(site)


def test_an_unreachable_server_is_reported_in_one_line(site, monkeypatch):
    with pytest.raises(UserError, check=mentions(f"{site.url}/9.tar")):
        WebdatasetRecords(f"{site.url}/9.tar")
    port = site.url.split(":")[2].split("/")[0]
    unreachable = site.url.replace(port, "1")
    with pytest.raises(UserError, check=mentions("http://", "127.0.0.1:1")):
        WebdatasetRecords(f"{unreachable}/{{00000..00002}}.tar")
    monkeypatch.setattr(remote, "LIST_TIMEOUT", 0.2)
    site.fails[""] = "hang"
    with pytest.raises(UserError, check=mentions("http://", "0.2 s")):
        WebdatasetRecords(site.url)


def test_many_threads_read_at_once(site):
    source, found = ImageSource(all_of(site), 8), {}

    def read(start):
        found[start] = [int(example(source, index)["image"][0, 0, 0]) for index in range(start, 12, 3)]

    threads = [threading.Thread(target=read, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {start: list(range(start, 12, 3)) for start in range(3)} and not source.rejections.counts
