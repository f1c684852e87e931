import os
import pickle
import tarfile
import tempfile
import types

import cv2
import numpy as np
import pytest
from tar_files import levels, members, png, tar
from web_server import served

from dalle2_jax import files
from dalle2_jax.data import (
    Filters,
    FolderSource,
    PictureSource,
    Records,
    Rejected,
    WebdatasetConfig,
    WebdatasetRecords,
    make_source,
    make_stream,
    shard_index,
    source_named,
    storage,
)
from dalle2_jax.types import UserError

pytestmark = pytest.mark.usefixtures("alone")


def test_records_of_shards(shards):
    records = pickle.loads(pickle.dumps(WebdatasetRecords(shards)))
    assert isinstance(records, Records) and len(records) == 12 and not records.left_out.counts
    for index in (11, 0, 4, 5, 7, 8):
        record = records.read(index)
        assert (record.key, record.captions, record.fields["number"]) == (f"{index:09d}", (f"caption {index}",), index)
        assert record.image == png(index)
    assert list(records.captions(3)) == ["caption 0", "caption 5", "caption 11"]
    assert len(list(records.captions(100))) == 12
    assert levels(PictureSource(records, 8)) == list(range(12))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00002}.tar", "/0000{0,1,2}.tar", "/{00000..00001}.tar"])
def test_patterns(shards, pattern):
    assert len(WebdatasetRecords(f"{shards}{pattern}")) == (8 if "1}" in pattern and ".." in pattern else 12)


def test_braces():
    assert storage.expand_braces("a{08..10}b{x,y}.tar")[:3] == ["a08bx.tar", "a08by.tar", "a09bx.tar"]
    assert storage.expand_braces("{split}.tar") == ["{split}.tar"]
    assert len(storage.expand_braces("{000000..009999}.tar")) == 10_000
    for wrong in ("{b..a}", "{3..1}", "{..3}"):
        with pytest.raises(UserError, match="not a range"):
            storage.expand_braces(wrong)


def test_splits(tmp_path):
    tar(tmp_path / "train" / "0.tar", members(range(3)))
    tar(tmp_path / "val" / "0.tar", members(range(2)))
    assert [len(WebdatasetRecords(tmp_path, split)) for split in ("train", "val")] == [3, 2]
    assert [len(WebdatasetRecords(f"{tmp_path}/{{split}}/*.tar", split)) for split in ("train", "val")] == [3, 2]
    with pytest.raises(UserError, match="has no split 'val': write {split}"):
        WebdatasetRecords(f"{tmp_path}/train/0.tar", "val")
    with pytest.raises(UserError, match="no sub-folder 'test'"):
        WebdatasetRecords(tmp_path, "test")


@pytest.mark.parametrize("name", ["a{b,c}", "a[b]", "{3..1}", "a*", "{split}"])
def test_a_folder_that_is_named_like_a_pattern_is_none(tmp_path, name):
    for split, count in (("train", 3), ("val", 2)):
        tar(tmp_path / name / split / "0[1].tar", members(range(count)))
        for pattern in ("", "/{split}", "/{split}/*.tar", "/{split}/{0,}0[[]1].tar"):
            assert len(WebdatasetRecords(f"{tmp_path}/{name}{pattern}", split)) == count
        assert len(WebdatasetRecords(f"{tmp_path}/{name}/{split}/0[1].tar")) == count
    with pytest.raises(UserError, match=r"has no sub-folder 'test' \(it has train, val\)"):
        WebdatasetRecords(tmp_path / name, "test")


def test_a_path_may_begin_at_home(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    for pattern in ("", "/*.tar", "/{00000..00002}.tar"):
        assert len(WebdatasetRecords(f"~/{shards.name}{pattern}")) == 12


def test_the_headers_are_read_once(shards, monkeypatch):
    WebdatasetRecords(shards)
    assert len(list(shards.glob("*.tar.index.npz"))) == 3 and len(list(shards.glob(".*.index"))) == 1
    scanned, opened = [], storage.Files.scan
    monkeypatch.setattr(
        storage.Files, "scan", lambda self, number: scanned.append(self.paths[number]) or opened(self, number)
    )
    assert len(WebdatasetRecords(shards)) == 12 and not scanned
    tar(shards / "00001.tar", members(range(50, 56)))
    assert WebdatasetRecords(shards).read(7).key == "000000052" and scanned == [str(shards / "00001.tar")]
    for path in (*shards.glob("*.npz"), *shards.glob(".*.index")):
        path.write_bytes(path.read_bytes()[:90])
    assert len(WebdatasetRecords(shards)) == 15 and len(scanned) == 4


def test_an_index_in_another_folder_where_shards_cannot_be_written(shards, monkeypatch):
    def refuse(prefix, dir):
        if str(dir).startswith(str(refused)):
            raise PermissionError(dir)
        return tempfile.mkstemp(prefix=prefix, dir=dir)

    refused = shards
    monkeypatch.setattr(files, "tempfile", types.SimpleNamespace(mkstemp=refuse))
    assert len(WebdatasetRecords(shards)) == 12
    assert sorted(path.suffix for path in shards.iterdir()) == [".tar"] * 3
    scan = shard_index.scan
    monkeypatch.setattr(shard_index, "scan", None)
    assert WebdatasetRecords(shards).read(11).captions == ("caption 11",)
    monkeypatch.setattr(shard_index, "scan", scan)
    refused = "/"
    (shards / "x").mkdir()
    os.rename(shards / "00000.tar", shards / "x" / "00000.tar")
    nowhere = pickle.loads(pickle.dumps(WebdatasetRecords(shards / "x")))
    assert nowhere.read(4).captions == ("caption 4",)


def test_a_shard_cut_short_anywhere_keeps_the_whole_records_before(tmp_path):
    whole = tar(tmp_path / "whole" / "0.tar", members(range(3))).read_bytes()
    with tarfile.open(tmp_path / "whole" / "0.tar") as file:
        ends = [member.offset_data + member.size for member in file]
        starts = [member.offset for member in file]
    complete = starts[-1] + 1024
    for size in {*range(256, complete + 513, 256), *ends, *starts[1:], *(end - 1 for end in ends)}:
        (tmp_path / "0.tar").write_bytes(whole[:size])
        try:
            records = WebdatasetRecords(tmp_path / "0.tar")
        except UserError as error:
            assert "not one record" in str(error) and size < ends[2]
            continue
        kept = sum(size >= ends[3 * number + 2] for number in range(3))
        headless = len(records) - kept  # picture and text were whole, and nothing tells that there was more
        assert headless == any(ends[3 * n + 1] <= size < starts[3 * n + 2] + 512 for n in range(3))
        assert records.left_out.counts["shard cut short"] == (size < complete + 512)
        for index in range(len(records)):
            assert records.read(index).image == png(index)


def test_a_shard_damaged_in_the_middle_or_no_shard_at_all(shards):
    content = bytearray((shards / "00000.tar").read_bytes())
    with tarfile.open(shards / "00000.tar") as file:
        start = file.getmembers()[6].offset
    content[start : start + 512] = b"\xff" * 512
    (shards / "00000.tar").write_bytes(content)
    (shards / "00001.tar").write_bytes(b"<html>no such shard</html>" * 100)
    records = WebdatasetRecords(shards)
    assert len(records) == 2 + 4 and records.left_out.counts == {"shard damaged": 4 - 2, "not a tar": 4}
    (shards / "00001.tar").write_bytes(b"")
    (shards / "00002.tar").unlink()
    records = WebdatasetRecords(f"{shards}/{{00000..00002}}.tar")
    assert len(records) == 2 and records.left_out.counts == {"shard damaged": 1, "not a tar": 2, "shard lost": 2}


def test_names_from_the_world(tmp_path):
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
        assert records.left_out.counts == {"unsafe name": 3, "no picture": 1}
        assert [int(level) for level in levels(PictureSource(records, 8, max_rejected=1.0))] == [5, 7, 8, 9, 10]
        assert records.read(2).captions == ("\u732b",) and records.read(4).captions == ("coff\ufffde",)


def test_bad_records_are_refused_by_cause(tmp_path):
    entries = [
        *(("0.png", png(0)), ("0.txt", b" one \n\n two\n")),
        *(("1.png", b""), ("1.txt", b"empty")),
        *(("2.png", png(2)[:50]), ("2.txt", b"torn")),
        *(("3.png", png(3)), ("3.json", b'{"caption": ')),
        *(("4.png", png(4)), ("4.txt", b"x"), ("4.json", b"[" * 100_000)),
        *(("5.png", png(5)), ("5.json", b'{"caption": null}')),
        *(("6.png", png(6)), ("6.json", b'{"caption": "by json"}')),
        *(("7.txt", b"no picture"),),
        *(("8.png", png(8)),),
        *(("9.png", png(9)), ("9.png", png(99)), ("9.txt", b"first"), ("9.txt", b"second")),
        *(("10.txt", b"apart"), ("11.png", png(11)), ("11.txt", b""), ("10.png", png(10))),
        *(("12.mp4", b"film"), ("12.wav", b"sound")),
    ]
    source = PictureSource(WebdatasetRecords(tar(tmp_path / "0.tar", entries)), 8, max_rejected=1.0)
    assert len(source) == 10
    assert [source[index]["captions"] for index in (0, 6, 7, 8, 9)] == [
        ("one", "two"),
        ("by json",),
        ("first",),
        ("apart",),
        ("",),
    ]
    levels(source)
    assert source.rejected == {
        **{"no picture": 1, "no caption": 2, "named twice": 1},
        **{"empty": 1, "not a picture": 1, "broken JSON": 2},
    }
    assert "".join(source.captions(99)) == "onetwoemptytornby jsonfirstapart"


def test_filters_choose_by_json_once(tmp_path, monkeypatch):
    for shard in range(2):
        entries = list(members(range(shard * 10, shard * 10 + 10), LANGUAGE="en" if shard else "de"))
        entries[2] = (entries[2][0], b"{")
        tar(tmp_path / f"{shard}.tar", entries)
    config = {"path": str(tmp_path), "resolution": 8}
    source = make_source(WebdatasetConfig(**config, filters=Filters(ranges={"number": (5, 14)})), "train")
    assert levels(source) == list(range(5, 10)) + list(range(11, 15)) and source.rejected == {"broken JSON": 2}
    english = Filters(ranges={"number": (None, 14)}, equals={"LANGUAGE": "en"})
    assert len(WebdatasetRecords(tmp_path, filters=english)) == 4
    assert len(WebdatasetRecords(tmp_path, filters=Filters(min_width=13))) == 18  # the JSON says nothing of sizes
    monkeypatch.setattr(WebdatasetRecords, "_choose", None)
    again = pickle.loads(pickle.dumps(WebdatasetRecords(tmp_path, filters=english)))
    assert [again.read(index).fields["number"] for index in range(4)] == [11, 12, 13, 14]
    monkeypatch.undo()
    with pytest.raises(UserError, match="leave not one of the 20 records"):
        WebdatasetRecords(tmp_path, filters=Filters(equals={"language": "en"}))


@pytest.mark.parametrize(("cause", "first"), [("shard lost", "00001.tar: 000000005"), ("cut short", "00001.tar: 0")])
def test_what_cannot_be_read_for_its_fields_is_counted_by_cause_and_asked_for_again(shards, monkeypatch, cause, first):
    tar(shards / "00002.tar", [("8.png", png(8)), ("8.txt", b"a"), ("8.json", b"{"), *members(range(9, 12))])
    WebdatasetRecords(shards)
    read = storage.Files.read

    def failing(files, number, spans):
        if number == 1 and cause == "shard lost":
            raise OSError
        return [content[: -1 if number == 1 else None] for content in read(files, number, spans)]

    monkeypatch.setattr(storage.Files, "read", failing)
    high = Filters(ranges={"number": (2, None)})
    records = WebdatasetRecords(shards, filters=high)
    assert len(records) == 3 + 3 and records.left_out.counts == {cause: 3, "broken JSON": 1}
    assert records.left_out.first[cause].startswith(f"{shards}/{first}")
    assert records.left_out.first["broken JSON"] == f"{shards}/00002.tar: 8"
    monkeypatch.setattr(storage.Files, "read", read)
    records = WebdatasetRecords(shards, filters=high)
    assert len(records) == 3 + 3 + 3 and records.left_out.counts == {"broken JSON": 1}


def test_a_refused_record_is_named(tmp_path):
    path = tar(tmp_path / "0.tar", [("a.png", png(0)), ("a.json", b"{"), ("b.png", png(1)), ("b.json", b"{}")])
    records = WebdatasetRecords(path)
    for index, cause in ((0, "broken JSON"), (1, "no caption")):
        with pytest.raises(Rejected, match=cause) as told:
            records.read(index)
        assert told.value.__notes__ == [f"{path}: {'ab'[index]}"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_in_the_middle_of_a_shard(shards, workers):
    def make(num_workers=0):
        return make_stream(PictureSource(WebdatasetRecords(shards), 8), None, 8, 2, seed=3, num_workers=num_workers)

    stream = make()
    whole = [next(stream)["image"][:, 0, 0, 0].tolist() for _ in range(12)]
    assert sorted(sum(whole[:6], [])) == list(range(12))
    resumed = make(workers)
    resumed.set_state({"global_next_index": 10})
    assert [next(resumed)["image"][:, 0, 0, 0].tolist() for _ in range(7)] == whole[5:]
    resumed.close()


def test_a_folder_and_its_shards_give_the_same_examples(tmp_path):
    rng = np.random.default_rng(0)
    folder, entries = tmp_path / "folder", []
    folder.mkdir()
    for number in range(9):
        content = cv2.imencode(".jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))[1].tobytes()
        spoken = f"one {number}\ntwo {number}\nthree {number}".encode()
        (folder / f"{number}.jpg").write_bytes(content)
        (folder / f"{number}.txt").write_bytes(spoken)
        entries += [(f"{number}.jpg", content), (f"{number}.txt", spoken)]
    tar(tmp_path / "0.tar", entries[:8])
    tar(tmp_path / "1.tar", entries[8:])
    one, other = FolderSource(folder, resolution=8, crop="random"), source_named(f"webdataset:{tmp_path}", "train", 8)
    other.crop = "random"
    for index in range(9):
        assert one[index]["captions"] == other[index]["captions"] and one[index]["caption"] == other[index]["caption"]
        np.testing.assert_array_equal(one[index]["image"], other[index]["image"])
        left, right = (source.draw(index, np.random.default_rng(index)) for source in (one, other))
        np.testing.assert_array_equal(left[0], right[0])
        assert left[1] == right[1]


def test_shards_below_a_url(shards):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        system.pipe_file(f"/data/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://data/{00000..00003}.tar", "memory://data/*.tar", "memory://data"):
            records = pickle.loads(pickle.dumps(WebdatasetRecords(pattern)))
            assert len(records) == 12 and records.read(11).image == png(11)
            assert records.left_out.counts["shard lost"] == (4 if "3}" in pattern else 0)
        system.rm_file("/data/00001.tar")
        with pytest.raises(Rejected, match="shard lost"):
            records.read(6)
        with pytest.raises(UserError, match="there are no .tar files at memory://data/9"):
            WebdatasetRecords("memory://data/9.tar")
    finally:
        system.rm("/data", recursive=True)
    with pytest.raises(UserError, match="install the extra"):
        WebdatasetRecords("nosuch://data/9.tar")


def test_a_url_alone_is_of_shards(shards):
    signed = shards / "signed"
    tar(signed / "0.tar?sig={ab}", members(range(3)))  # as a server that looks at the query has it
    with served(signed) as site:
        assert len(source_named(f"{site.url}/0.tar?sig={{ab}}", "train", 8)) == 3
        asked = {name for _, name, _ in site.asked}
        assert "0.tar.index.npz?sig={ab}" in asked and not any("?" in name.rpartition("=")[2] for name in asked)
        with pytest.raises(UserError, match="there are no .tar files at http://"):
            source_named(f"{site.url}/", "train", 8)
    with served(shards) as site:
        assert len(source_named(f"{site.url}/", "train", 8)) == 12


def test_mistakes_are_answered(tmp_path):
    with pytest.raises(UserError, match="has no path"):
        make_source(WebdatasetConfig(), "train")
    with pytest.raises(UserError, match="there are no .tar files at"):
        WebdatasetRecords(tmp_path)
    with pytest.raises(UserError, match="there are no .tar files at"):
        WebdatasetRecords(tmp_path / "{0..3}.tar")
    with pytest.raises(UserError, match=r"not one record in the shards .* \(they are empty\)"):
        WebdatasetRecords(tar(tmp_path / "0.tar", []))
    with pytest.raises(UserError, match="crop 'left'"):
        make_source(WebdatasetConfig(str(tmp_path), crop="left"), "train")
