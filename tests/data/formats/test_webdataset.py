import os
import pickle
import tarfile

import cv2
import numpy as np
import pytest
from raised import mentions
from streams import sample, text_stream
from tar_files import levels, members, png, tar
from web_server import served

from dalle2_jax import files as atomic_files
from dalle2_jax.data import (
    Filters,
    FolderSource,
    ImageSource,
    Records,
    Rejected,
    WebdatasetConfig,
    WebdatasetRecords,
    example,
    make_source,
    source_named,
)
from dalle2_jax.data.formats import shard_index
from dalle2_jax.data.storage import files
from dalle2_jax.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("alone")


def test_records_of_shards(shards):
    records = pickle.loads(pickle.dumps(WebdatasetRecords(shards)))
    assert isinstance(records, Records) and len(records) == 12 and not records.rejections.counts
    for index in (11, 0, 4, 5, 7, 8):
        record = records.read(index)
        assert (record.key, record.captions, record.fields["number"]) == (f"{index:09d}", (f"caption {index}",), index)
        assert record.image == png(index)
    assert list(records.captions(3)) == ["caption 0", "caption 5", "caption 11"]
    assert len(list(records.captions(100))) == 12
    assert levels(ImageSource(records, 8)) == list(range(12))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00002}.tar", "/0000{0,1,2}.tar", "/{00000..00001}.tar"])
def test_shard_patterns_are_expanded(shards, pattern):
    assert len(WebdatasetRecords(f"{shards}{pattern}")) == (8 if "1}" in pattern and ".." in pattern else 12)


def test_braces_are_expanded():
    assert files.expand_braces("a{08..10}b{x,y}.tar")[:3] == ["a08bx.tar", "a08by.tar", "a09bx.tar"]
    assert files.expand_braces("{split}.tar") == ["{split}.tar"]
    assert len(files.expand_braces("{000000..009999}.tar")) == 10_000
    for wrong in ("{b..a}", "{3..1}", "{..3}"):
        with pytest.raises(UserError, check=mentions(f"'{wrong}'", "range of numbers")):
            files.expand_braces(wrong)


def test_splits_are_folders_of_shards(tmp_path):
    tar(tmp_path / "train" / "0.tar", members(range(3)))
    tar(tmp_path / "val" / "0.tar", members(range(2)))
    assert [len(WebdatasetRecords(tmp_path, split)) for split in ("train", "val")] == [3, 2]
    assert [len(WebdatasetRecords(f"{tmp_path}/{{split}}/*.tar", split)) for split in ("train", "val")] == [3, 2]
    with pytest.raises(DataError, check=mentions("'val'", "{split}")):
        WebdatasetRecords(f"{tmp_path}/train/0.tar", "val")
    with pytest.raises(DataError, check=mentions("'test'", path=tmp_path)):
        WebdatasetRecords(tmp_path, "test")


@pytest.mark.parametrize("name", ["a{b,c}", "a[b]", "{3..1}", "a*", "{split}"])
def test_a_folder_named_like_a_pattern_is_opened_literally(tmp_path, name):
    for split, count in (("train", 3), ("val", 2)):
        tar(tmp_path / name / split / "0[1].tar", members(range(count)))
        for pattern in ("", "/{split}", "/{split}/*.tar", "/{split}/{0,}0[[]1].tar"):
            assert len(WebdatasetRecords(f"{tmp_path}/{name}{pattern}", split)) == count
        assert len(WebdatasetRecords(f"{tmp_path}/{name}/{split}/0[1].tar")) == count
    with pytest.raises(DataError, check=mentions("'test'", "train", "val", path=tmp_path / name)):
        WebdatasetRecords(tmp_path / name, "test")


def test_a_path_may_start_with_a_tilde(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    for pattern in ("", "/*.tar", "/{00000..00002}.tar"):
        assert len(WebdatasetRecords(f"~/{shards.name}{pattern}")) == 12


def test_the_index_of_local_shards_is_cached(shards, monkeypatch):
    WebdatasetRecords(shards)
    assert len(list(shards.glob("*.tar.index.npz"))) == 3 and len(list(shards.glob(".*.index"))) == 1
    scanned, opened = [], files.Files.scan
    monkeypatch.setattr(
        files.Files, "scan", lambda self, number: scanned.append(self.paths[number]) or opened(self, number)
    )
    assert len(WebdatasetRecords(shards)) == 12 and not scanned
    tar(shards / "00001.tar", members(range(50, 56)))
    assert WebdatasetRecords(shards).read(7).key == "000000052" and scanned == [str(shards / "00001.tar")]
    for path in (*shards.glob("*.npz"), *shards.glob(".*.index")):
        path.write_bytes(path.read_bytes()[:90])
    assert len(WebdatasetRecords(shards)) == 15 and len(scanned) == 4


def test_the_index_is_cached_elsewhere_if_the_shard_folder_is_read_only(shards, monkeypatch):
    def deny(target):
        if str(target).startswith(str(read_only)):
            raise PermissionError(target)
        return create(target)

    read_only, create = shards, atomic_files._temporary_file
    monkeypatch.setattr(atomic_files, "_temporary_file", deny)
    assert len(WebdatasetRecords(shards)) == 12
    assert sorted(path.suffix for path in shards.iterdir()) == [".tar"] * 3
    scan = shard_index.scan
    monkeypatch.setattr(shard_index, "scan", None)
    assert WebdatasetRecords(shards).read(11).captions == ("caption 11",)
    monkeypatch.setattr(shard_index, "scan", scan)
    read_only = "/"
    (shards / "x").mkdir()
    os.rename(shards / "00000.tar", shards / "x" / "00000.tar")
    nowhere = pickle.loads(pickle.dumps(WebdatasetRecords(shards / "x")))
    assert nowhere.read(4).captions == ("caption 4",)


def test_a_truncated_shard_yields_the_complete_records_before_the_cut(tmp_path):
    shard = tar(tmp_path / "complete" / "0.tar", members(range(3))).read_bytes()
    with tarfile.open(tmp_path / "complete" / "0.tar") as file:
        ends = [member.offset_data + member.size for member in file]
        starts = [member.offset for member in file]
    complete = starts[-1] + 1024
    for size in {*range(256, complete + 513, 256), *ends, *starts[1:], *(end - 1 for end in ends)}:
        (tmp_path / "0.tar").write_bytes(shard[:size])
        try:
            records = WebdatasetRecords(tmp_path / "0.tar")
        except UserError as error:
            assert mentions("no records", path=tmp_path / "0.tar")(error) and size < ends[2]
            continue
        intact = sum(size >= ends[3 * number + 2] for number in range(3))
        headless = len(records) - intact  # image and text are complete, so the missing JSON cannot be noticed
        assert headless == any(ends[3 * n + 1] <= size < starts[3 * n + 2] + 512 for n in range(3))
        assert records.rejections.counts["shard cut short"] == (size < complete + 512)
        for index in range(len(records)):
            assert records.read(index).image == png(index)


def test_damaged_empty_and_missing_shards_are_counted(shards):
    content = bytearray((shards / "00000.tar").read_bytes())
    with tarfile.open(shards / "00000.tar") as file:
        start = file.getmembers()[6].offset
    content[start : start + 512] = b"\xff" * 512
    (shards / "00000.tar").write_bytes(content)
    (shards / "00001.tar").write_bytes(b"<html>no such shard</html>" * 100)
    records = WebdatasetRecords(shards)
    assert len(records) == 2 + 4 and records.rejections.counts == {"shard damaged": 4 - 2, "not a tar": 4}
    (shards / "00001.tar").write_bytes(b"")
    (shards / "00002.tar").unlink()
    records = WebdatasetRecords(f"{shards}/{{00000..00002}}.tar")
    assert len(records) == 2 and records.rejections.counts == {"shard damaged": 1, "not a tar": 2, "shard lost": 2}


def test_unusual_and_unsafe_member_names(tmp_path):
    link = tarfile.TarInfo("d.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    entries = [
        *(("../a.png", png(1)), ("../a.txt", b"a")),
        *(("/b.png", png(2)), ("/b.txt", b"b")),
        *(("x/../../c.png", png(3)), ("x/../../c.txt", b"c")),
        *((link, b""), ("d.txt", b"d")),
        *(("._e.png", b"resource fork"), ("./e.PNG", png(5)), ("./e.txt", b"e")),
        *(("sub/f.g.h.png", png(6)), ("sub/f.png", png(7)), ("sub/f.txt", b"f")),
        *(("\u65e5\u672c \u00fc.png", png(8)), ("\u65e5\u672c \u00fc.txt", "\u732b".encode())),
        *(("long/" * 60 + "i.png", png(9)), ("long/" * 60 + "i.txt", b"i")),
        *((b"caf\xe9.png".decode("utf-8", "surrogateescape"), png(10)),),
        *((b"caf\xe9.txt".decode("utf-8", "surrogateescape"), b"coff\xe9e"),),
    ]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        records = WebdatasetRecords(tar(tmp_path / f"{format}.tar", entries, format))
        keys = [records.read(index).key for index in range(len(records))]
        assert keys[:4] == ["e", "sub/f", "\u65e5\u672c \u00fc", "long/" * 60 + "i"] and keys[4].startswith("caf")
        keys[4].encode()
        assert records.rejections.counts == {"unsafe name": 3, "no image": 1}
        assert [int(level) for level in levels(ImageSource(records, 8, max_rejected=1.0))] == [5, 7, 8, 9, 10]
        assert records.read(2).captions == ("\u732b",) and records.read(4).captions == ("coff\ufffde",)


def test_invalid_records_are_rejected_by_cause(tmp_path):
    entries = [
        *(("0.png", png(0)), ("0.txt", b" one \n\n two\n")),
        *(("1.png", b""), ("1.txt", b"empty")),
        *(("2.png", png(2)[:50]), ("2.txt", b"torn")),
        *(("3.png", png(3)), ("3.json", b'{"caption": ')),
        *(("4.png", png(4)), ("4.txt", b"x"), ("4.json", b"[" * 100_000)),
        *(("5.png", png(5)), ("5.json", b'{"caption": null}')),
        *(("6.png", png(6)), ("6.json", b'{"caption": "by json"}')),
        *(("7.txt", b"no image"),),
        *(("8.png", png(8)),),
        *(("9.png", png(9)), ("9.png", png(99)), ("9.txt", b"first"), ("9.txt", b"second")),
        *(("10.txt", b"apart"), ("11.png", png(11)), ("11.txt", b""), ("10.png", png(10))),
        *(("12.mp4", b"film"), ("12.wav", b"sound")),
    ]
    source = ImageSource(WebdatasetRecords(tar(tmp_path / "0.tar", entries)), 8, max_rejected=1.0)
    assert len(source) == 10
    assert [example(source, index)["captions"] for index in (0, 6, 7, 8, 9)] == [
        ("one", "two"),
        ("by json",),
        ("first",),
        ("apart",),
        ("",),
    ]
    levels(source)
    assert source.rejections.counts == {
        **{"no image": 1, "no caption": 2, "named twice": 1},
        **{"empty": 1, "not an image": 1, "broken JSON": 2},
    }
    assert "".join(source.captions(99)) == "onetwoemptytornby jsonfirstapart"


def test_filters_on_json_fields_are_applied_once_and_cached(tmp_path, monkeypatch):
    for shard in range(2):
        entries = list(members(range(shard * 10, shard * 10 + 10), LANGUAGE="en" if shard else "de"))
        entries[2] = (entries[2][0], b"{")
        tar(tmp_path / f"{shard}.tar", entries)
    config = {"path": str(tmp_path), "resolution": 8}
    source = make_source(WebdatasetConfig(**config, filters=Filters(ranges={"number": (5, 14)})), "train")
    assert levels(source) == list(range(5, 10)) + list(range(11, 15)) and source.rejections.counts == {"broken JSON": 2}
    english = Filters(ranges={"number": (None, 14)}, equals={"LANGUAGE": "en"})
    assert len(WebdatasetRecords(tmp_path, filters=english)) == 4
    assert len(WebdatasetRecords(tmp_path, filters=Filters(min_width=13))) == 18  # the JSON has no sizes
    monkeypatch.setattr(WebdatasetRecords, "_choose", None)
    again = pickle.loads(pickle.dumps(WebdatasetRecords(tmp_path, filters=english)))
    assert [again.read(index).fields["number"] for index in range(4)] == [11, 12, 13, 14]
    monkeypatch.undo()
    with pytest.raises(DataError, check=mentions("filters", 20, path=tmp_path)):
        WebdatasetRecords(tmp_path, filters=Filters(equals={"language": "en"}))


@pytest.mark.parametrize(("cause", "first"), [("shard lost", "00001.tar: 000000005"), ("cut short", "00001.tar: 0")])
def test_unreadable_fields_are_counted_by_cause_and_retried_by_the_next_source(shards, monkeypatch, cause, first):
    tar(shards / "00002.tar", [("8.png", png(8)), ("8.txt", b"a"), ("8.json", b"{"), *members(range(9, 12))])
    WebdatasetRecords(shards)
    read = files.Files.read

    def failing(files, number, spans):
        if number == 1 and cause == "shard lost":
            raise OSError
        return [content[: -1 if number == 1 else None] for content in read(files, number, spans)]

    monkeypatch.setattr(files.Files, "read", failing)
    high = Filters(ranges={"number": (2, None)})
    records = WebdatasetRecords(shards, filters=high)
    assert len(records) == 3 + 3 and records.rejections.counts == {cause: 3, "broken JSON": 1}
    assert records.rejections.first[cause].startswith(f"{shards}/{first}")
    assert records.rejections.first["broken JSON"] == f"{shards}/00002.tar: 8"
    monkeypatch.setattr(files.Files, "read", read)
    records = WebdatasetRecords(shards, filters=high)
    assert len(records) == 3 + 3 + 3 and records.rejections.counts == {"broken JSON": 1}


def test_rejections_name_the_shard_and_the_record(tmp_path):
    path = tar(tmp_path / "0.tar", [("a.png", png(0)), ("a.json", b"{"), ("b.png", png(1)), ("b.json", b"{}")])
    records = WebdatasetRecords(path)
    for index, cause in ((0, "broken JSON"), (1, "no caption")):
        with pytest.raises(Rejected, check=mentions(cause=cause, notes=(f"{path}: {'ab'[index]}",))):
            records.read(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_in_the_middle_of_a_shard(shards, workers):
    def make(num_workers=0):
        return text_stream(ImageSource(WebdatasetRecords(shards), 8), None, 8, 2, seed=3, num_workers=num_workers)

    stream = make()
    uninterrupted = [next(stream)["image"][:, 0, 0, 0].tolist() for _ in range(12)]
    assert sorted(sum(uninterrupted[:6], [])) == list(range(12))
    resumed = make(workers)
    resumed.set_state({"global_next_index": 10})
    assert [next(resumed)["image"][:, 0, 0, 0].tolist() for _ in range(7)] == uninterrupted[5:]
    resumed.close()


def test_a_folder_and_its_shards_give_the_same_examples(tmp_path):
    rng = np.random.default_rng(0)
    folder, entries = tmp_path / "folder", []
    folder.mkdir()
    for number in range(9):
        content = cv2.imencode(".jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))[1].tobytes()
        text = f"one {number}\ntwo {number}\nthree {number}".encode()
        (folder / f"{number}.jpg").write_bytes(content)
        (folder / f"{number}.txt").write_bytes(text)
        entries += [(f"{number}.jpg", content), (f"{number}.txt", text)]
    tar(tmp_path / "0.tar", entries[:8])
    tar(tmp_path / "1.tar", entries[8:])
    one, other = FolderSource(folder, resolution=8, crop="random"), source_named(f"webdataset:{tmp_path}", "train", 8)
    other.crop = "random"
    for index in range(9):
        left, right = example(one, index), example(other, index)
        assert left["captions"] == right["captions"] and left["caption"] == right["caption"]
        np.testing.assert_array_equal(left["image"], right["image"])
        left, right = (sample(source, index, index) for source in (one, other))
        np.testing.assert_array_equal(left["image"], right["image"])
        assert left["caption"] == right["caption"]


def test_shards_at_a_url_are_read(shards):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        system.pipe_file(f"/data/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://data/{00000..00003}.tar", "memory://data/*.tar", "memory://data"):
            records = pickle.loads(pickle.dumps(WebdatasetRecords(pattern)))
            assert len(records) == 12 and records.read(11).image == png(11)
            assert records.rejections.counts["shard lost"] == (4 if "3}" in pattern else 0)
        system.rm_file("/data/00001.tar")
        with pytest.raises(Rejected, check=mentions(cause="shard lost")):
            records.read(6)
        with pytest.raises(UserError, check=mentions(".tar", "memory://data/9.tar")):
            WebdatasetRecords("memory://data/9.tar")
    finally:
        system.rm("/data", recursive=True)
    with pytest.raises(UserError, check=mentions("nosuch://data/9.tar", "[remote]")):
        WebdatasetRecords("nosuch://data/9.tar")


def test_a_url_without_a_prefix_is_read_as_shards(shards):
    signed = shards / "signed"
    tar(signed / "0.tar?sig={ab}", members(range(3)))  # as on a server that checks the query
    with served(signed) as site:
        assert len(source_named(f"{site.url}/0.tar?sig={{ab}}", "train", 8)) == 3
        requested = {name for _, name, _ in site.requests}
        assert "0.tar.index.npz?sig={ab}" in requested and not any("?" in name.rpartition("=")[2] for name in requested)
        with pytest.raises(UserError, check=mentions(".tar", f"{site.url}/")):
            source_named(f"{site.url}/", "train", 8)
    with served(shards) as site:
        assert len(source_named(f"{site.url}/", "train", 8)) == 12


def test_invalid_paths_raise_user_errors(tmp_path):
    with pytest.raises(DataError, check=mentions("webdataset", "config.data.path", path=None)):
        make_source(WebdatasetConfig(), "train")
    with pytest.raises(UserError, check=mentions(".tar", tmp_path)):
        WebdatasetRecords(tmp_path)
    with pytest.raises(UserError, check=mentions(".tar", tmp_path / "{0..3}.tar")):
        WebdatasetRecords(tmp_path / "{0..3}.tar")
    with pytest.raises(DataError, check=mentions(path=tmp_path / "0.tar")):
        WebdatasetRecords(tar(tmp_path / "0.tar", []))
    with pytest.raises(UserError, check=mentions("crop", "center", "'left'")):
        make_source(WebdatasetConfig(str(tmp_path), crop="left"), "train")
