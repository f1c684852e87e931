import json
import os
import pickle

import cv2
import numpy as np
import pytest

from dalle2_jax.data import (
    Filters,
    FolderConfig,
    FolderRecords,
    FolderSource,
    Rejected,
    folder_index,
    images,
    make_source,
    make_stream,
)
from dalle2_jax.text import train_sentencepiece
from dalle2_jax.types import UserError


def _picture(path, level, shape=(20, 30, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(shape, level, np.uint8))


def _metadata(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        _picture(tmp_path / f"{number}.png", number)
    records = [{"file_name": f"{number}.png", "text": [f"a {number}", f"no {number}"]} for number in range(4)]
    _metadata(tmp_path, *records)
    return tmp_path


def test_metadata(folder):
    source = pickle.loads(pickle.dumps(FolderSource(folder, resolution=8)))
    assert len(source) == 4 and len(repr(source)) < 60 + len(str(folder))
    example = source[2]
    assert example["image"].shape == (8, 8, 3) and (example["image"] == 2).all()
    assert example["captions"] == ("a 2", "no 2") and example["caption"] in example["captions"]
    drawn = {source.draw(2, np.random.default_rng(seed))[1] for seed in range(20)}
    assert drawn == {"a 2", "no 2"}
    assert list(source.captions(2)) == ["a 0", "no 0", "a 3", "no 3"]
    with pytest.raises(IndexError):
        source[4]


def test_sidecars_in_nested_folders(tmp_path):
    _picture(tmp_path / "cats" / "a.jpg", 200)
    (tmp_path / "cats" / "a.txt").write_text("eine Katze ü\n\n a cat \n", encoding="utf-8")
    _picture(tmp_path / "b.PNG", 10)
    (tmp_path / "b.txt").write_text("")
    _picture(tmp_path / ".cache" / "c.png", 10)
    source = FolderSource(tmp_path, resolution=8)
    assert [source[index]["captions"] for index in range(2)] == [("",), ("eine Katze ü", "a cat")]


def test_divided_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            _picture(tmp_path / split / f"{number}.png", number)
            (tmp_path / split / f"{number}.txt").write_text(split)
    assert len(FolderSource(tmp_path, "train")) == 3 and len(FolderSource(tmp_path, "val")) == 2
    assert FolderSource(tmp_path, "val")[0]["caption"] == "val"
    with pytest.raises(UserError, match=r"no sub-folder 'test' \(it has train, val\)"):
        FolderSource(tmp_path, "test")


@pytest.mark.parametrize(("there", "asked"), [("validation", "val"), ("val", "validation")])
def test_a_held_out_split_has_two_names(tmp_path, there, asked):
    for split in ("train", there):
        _picture(tmp_path / split / "0.png", 0)
        (tmp_path / split / "0.txt").write_text(split)
    assert FolderSource(tmp_path, asked)[0]["caption"] == there


def test_names_from_the_world(tmp_path):
    """Bytes that are not UTF-8, and links to folders, one of which leads back."""
    content = cv2.imencode(".png", np.full((8, 8, 3), 7, np.uint8))[1].tobytes()
    for name in (b"caf\xe9", "\u65e5\u672c".encode(), b"a.b", b"-"):
        for ending, what in ((b".png", content), (b".txt", name)):
            with open(os.fsencode(tmp_path / "x") + name + ending, "wb") as file:
                file.write(what)
    (tmp_path / "more").mkdir()
    _picture(tmp_path / "more" / "y.png", 9)
    (tmp_path / "more" / "y.txt").write_text("y")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path)
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path, resolution=8)))
    told = {source[index]["key"]: source[index]["caption"] for index in range(len(source))}
    assert len(source) == len(told) == 5 and told["xa.b.png"] == "a.b" and told["xcaf\ufffd.png"] == "caf\ufffd"
    assert "\u65e5\u672c" in told.values() and "y" in told.values() and not source.rejected


@pytest.fixture
def kept(monkeypatch, tmp_path_factory):
    """Keeps the index of a folder, however small; returns where."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(folder_index, "_LARGE", 1)
    return cache / "dalle2_jax" / "folders"


def test_the_index_of_a_large_folder_is_kept_until_something_changes(folder, kept, monkeypatch):
    read, read_again = folder_index._read, []
    monkeypatch.setattr(folder_index, "_read", lambda path: read_again.append(path) or read(path))
    first = FolderSource(folder, resolution=8)
    again = FolderSource(folder, resolution=8)
    assert len(read_again) == 1 and len([*kept.iterdir()]) == 1
    sent = pickle.dumps(again)
    assert isinstance(again.records._index.names, np.memmap) and b"a 0" not in sent
    for index in range(4):
        for other in (again, pickle.loads(sent)):
            assert other[index]["captions"] == first[index]["captions"]
    changes = [
        lambda: _picture(folder / "new" / "4.png", 4),
        lambda: _picture(folder / "new" / "5.png", 5),
        lambda: (folder / "1.png").unlink(),
        lambda: _metadata(folder, *({"file_name": f"new/{number}.png", "text": "new"} for number in (4, 5))),
        lambda: (folder / "metadata.jsonl").rename(folder / "new" / "metadata.jsonl"),
    ]
    for place, change in enumerate(changes, 2):
        if place == len(changes) + 1:
            (folder / "0.txt").write_text("zero")
        change()
        found = FolderSource(folder, resolution=8, max_rejected=1.0)
        assert len(read_again) == place
    assert [*found.captions(9)] == ["zero"] and found.rejected == {"no caption": 4}
    (folder / "0.txt").write_text("a text is read with its picture")
    assert FolderSource(folder, max_rejected=1.0)[0]["caption"] == "a text is read with its picture"
    [home] = kept.iterdir()
    home.write_bytes(home.read_bytes()[:200])
    assert FolderSource(folder, max_rejected=1.0).rejected == {"no caption": 4}


def test_a_choice_is_kept_with_the_index(folder, kept, monkeypatch):
    _metadata(folder, *({"file_name": f"{number}.png", "text": "a", "score": number} for number in range(4)))
    high = Filters(ranges={"score": (2, None)})
    assert len(FolderSource(folder, filters=high)) == 2 and len([*kept.iterdir()]) == 2
    monkeypatch.setattr(FolderRecords, "_choose", None)
    source = pickle.loads(pickle.dumps(FolderSource(folder, resolution=8, filters=high)))
    assert [int(source[index]["image"][0, 0, 0]) for index in range(2)] == [2, 3]


def test_a_picture_deleted_behind_a_kept_index_is_missed_when_it_is_read(folder, kept):
    source = FolderSource(folder, resolution=8)
    (folder / "2.png").unlink()
    assert source[2]["stands_in"] and source.rejected == {"missing": 1}


def test_random_crops_differ_and_follow_the_rng(tmp_path):
    ramp = np.zeros((8, 64, 3), np.uint8) + np.arange(64, dtype=np.uint8)[:, None]
    cv2.imwrite(str(tmp_path / "a.png"), ramp)
    (tmp_path / "a.txt").write_text("a ramp")
    source = FolderSource(tmp_path, resolution=8, crop="random")
    crops = [source.draw(0, np.random.default_rng(seed))[0] for seed in (0, 1, 0)]
    assert (crops[0] != crops[1]).any() and (crops[0] == crops[2]).all()
    assert source[0]["image"][0, 0, 0] == 28
    fixed = FolderSource(tmp_path, resolution=8)
    assert (fixed.draw(0, np.random.default_rng(0))[0] == source[0]["image"]).all()


def test_a_bad_picture_does_not_stop_the_run(folder):
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    _metadata(folder, *({"file_name": f"{number}.png", "text": f"a {number}"} for number in range(5)))
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert source.rejected == {"missing": 1} and len(source) == 4
    assert source[1]["caption"] == "a 2" and (source[1]["image"] == 2).all()
    assert source[3]["caption"] == "a 0"  # the next after the last is the first
    (folder / "2.png").unlink()
    assert source[1]["caption"] == "a 0"
    assert source.rejected == {"missing": 2, "not a picture": 2}
    stream = make_stream(source, train_sentencepiece(source.captions(9), 300), 8, 8, seed=0)
    assert next(stream)["image"].shape == (8, 8, 8, 3)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="not one picture .*2 not a picture.* 1 empty"):
        source[0]


def test_files_that_are_no_pictures_to_read(folder):
    """One of a gigabyte, most of it a hole; a pipe, which would never end; a link to nothing; a folder."""
    os.truncate(folder / "1.png", 2**30)
    (folder / "2.png").unlink()
    os.mkfifo(folder / "2.png")
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to("nothing")
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [source[index]["caption"].split()[1] for index in range(len(source))] == ["0"] * 3
    assert source.rejected == {"missing": 2, "far too large": 1}


def test_a_link_leads_to_a_file_or_to_nothing(folder, tmp_path_factory):
    """Not to a pipe or a device, of which reading has no end; one that leads to itself is no reason to stop."""
    pipe = tmp_path_factory.mktemp("elsewhere") / "pipe"
    os.mkfifo(pipe)
    for number, target in enumerate((pipe, "/dev/zero", "3.png", "nothing"), 1):
        (folder / f"{number}.png").unlink(missing_ok=True)
        (folder / f"{number}.png").symlink_to(target)
    (folder / "metadata.jsonl").unlink()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"a {number}")
    records = FolderRecords(folder)
    assert [*records.captions(9)] == ["a 0", "a 4"]
    assert records.left_out.counts == {"unreadable": 1} and records.left_out.first == {"unreadable": "3.png"}
    with pytest.raises(Rejected, match="missing"):
        records.read(1)
    (folder / "4.png").unlink()
    for number in (0, 4):
        _picture(folder / f"{number}.png", number)
    for number, target in ((0, pipe), (4, "nothing")):
        (folder / f"{number}.txt").unlink()
        (folder / f"{number}.txt").symlink_to(target)
    records = FolderRecords(folder)
    assert len(records) == 1 and records.left_out.counts == {"unreadable": 1, "no caption": 1}
    with pytest.raises(Rejected, match="no caption"):
        records.read(0)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_link_that_leads_elsewhere_since_the_index_was_kept(folder, kept, tmp_path_factory, kind):
    target = tmp_path_factory.mktemp("elsewhere") / "0.png"
    (folder / "0.png").rename(target)
    (folder / "0.png").symlink_to(target)
    assert FolderRecords(folder).read(0).image
    target.unlink()
    os.mkfifo(target) if kind == "pipe" else target.symlink_to("/dev/null")
    with pytest.raises(Rejected, match="unreadable"):
        FolderRecords(folder).read(0)


def test_a_refused_picture_is_not_read_again(folder, monkeypatch):
    broken = (folder / "1.png").read_bytes()[:60]
    (folder / "1.png").write_bytes(broken)
    source, read = FolderSource(folder, resolution=8), []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda content, factor=1: read.append(content) or decode(content, factor))
    assert source[1]["caption"] == source[1]["caption"]
    assert read.count(broken) == 1 and source.rejected == {"not a picture": 1}


@pytest.mark.parametrize(
    ("line", "cause", "where"),
    [
        ('{"file_name": "0.png", "text"', "broken metadata", "metadata.jsonl:2, not JSON"),
        ("[" * 100_000, "broken metadata", "metadata.jsonl:2, not JSON"),
        ('{"file_name": "0.png"}', "broken metadata", "metadata.jsonl:2, text is missing"),
        ('{"text": "a"}', "broken metadata", "metadata.jsonl:2, file_name is missing"),
        ('{"file_name": 3, "text": "a"}', "broken metadata", "metadata.jsonl:2, file_name must be a string, and text"),
        ('{"file_name": "0.png", "text": 3}', "broken metadata", "metadata.jsonl:2, file_name must be a string"),
        ('["0.png", "a"]', "broken metadata", "metadata.jsonl:2, expected an object"),
        ('{"file_name": "0.png", "text": null}', "no caption", "metadata.jsonl:2"),
        ('{"file_name": "0.png", "text": []}', "no caption", "metadata.jsonl:2"),
        ('{"file_name": "../0.png", "text": "a"}', "missing", "metadata.jsonl:2, ../0.png"),
    ],
)
def test_a_broken_line_is_left_out_and_the_first_is_named(folder, caplog, line, cause, where):
    _metadata(folder, {"file_name": "0.png", "text": "a"}, line, {"file_name": "1.png", "text": "b"}, line)
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [source[index]["caption"] for index in range(2)] == ["a", "b"] and len(source) == 2
    count = 1 if cause == "missing" else 2  # a picture that is not there is one, however often it is named
    assert source.rejected == {cause: count} and f"{count} {cause} (first {where}" in caplog.text
    with pytest.raises(UserError, match=r"are bad \(found so far: . .* \(first metadata.jsonl:2.* max_rejected=0"):
        FolderSource(folder, max_rejected=0.0)
    _metadata(folder, line)
    with pytest.raises(UserError, match=rf"has no caption of .* \(1 {cause} \(first metadata.jsonl:1") as told:
        FolderSource(folder)
    assert "\n" not in str(told.value)


def test_pictures_without_a_text_beside_them_are_left_out(folder):
    (folder / "metadata.jsonl").unlink()
    for number in (1, 3):
        (folder / f"{number}.txt").write_text(f"a {number}")
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [source[index]["caption"] for index in range(len(source))] == ["a 1", "a 3"]
    assert source.rejected == {"no caption": 2} and source.records.left_out.first == {"no caption": "0.png"}
    (folder / "3.txt").unlink()
    assert source[1]["caption"] == "a 1" and source.rejected == {"no caption": 3}
    assert [*source.captions(9)] == ["a 1"]


def test_bytes_that_are_not_utf8_are_marked_and_counted(folder):
    lines = [b'{"file_name": "0.png", "text": "caf\xe9"}', b'{"file_name": "1.png", "text": "\\ud83d half"}']
    (folder / "metadata.jsonl").write_bytes(b"\n".join([*lines, '{"file_name": "2.png", "text": "é"}'.encode()]))
    source = FolderSource(folder, resolution=8)
    assert [source[index]["caption"] for index in range(3)] == ["caf\ufffd", "\ufffd half", "é"]
    assert source.refusals() == {f"{place}, caption": "not UTF-8 (used)" for place in (0, 1)} and not source.rejected
    train_sentencepiece(source.captions(3), 300).encode(["\ufffd half"], 8)
    (folder / "metadata.jsonl").unlink()
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbfa\n\xff\xfe")
    assert FolderSource(folder)[0]["captions"] == ("a", "\ufffd\ufffd")


def test_a_table_of_captions(folder):
    (folder / "metadata.jsonl").unlink()
    rows = ["file_name,text,score", '0.png,"a, and ""b""",0.5', '1.png,"two\nlines",0.9', "0.png,c,0.1", "3.png,d,"]
    (folder / "metadata.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    source = FolderSource(folder, resolution=8)
    assert [source[index]["captions"] for index in range(3)] == [('a, and "b"', "c"), ("two\nlines",), ("d",)]
    assert source.records.read(0).fields == {"score": "0.5"}
    assert list(FolderSource(folder, filters=Filters(ranges={"score": (0.6, None)})).captions(9)) == ["two\nlines"]
    (folder / "metadata.csv").write_text("file_name,text\n0.png\n1.png,b\n")
    told = FolderSource(folder).records
    assert len(told) == 1 and told.left_out.first == {"broken metadata": "metadata.csv:2, text is missing"}
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"' + "a" * 200_000 + "\n1.png,b\n2.png,c")
    told = FolderSource(folder).records  # what an open quotation mark swallows is gone
    assert [*told.captions(9)][-1] == "c"
    assert "field larger" in told.left_out.first["broken metadata"]


def test_filters_on_fields_leave_records_out(folder):
    tags = zip(range(4), "abab", strict=True)
    said = [{"file_name": f"{number}.png", "text": "a", "score": number, "tag": tag} for number, tag in tags]
    _metadata(folder, *said)
    kept = FolderSource(folder, resolution=8, filters=Filters(ranges={"score": (1, None)}, equals={"tag": "b"}))
    assert [int(kept[index]["image"][0, 0, 0]) for index in range(len(kept))] == [1, 3]
    with pytest.raises(UserError, match="leave not one of the 4"):
        FolderSource(folder, filters=Filters(ranges={"socre": (1, None)}))


def test_a_picture_named_twice_has_both_captions(folder):
    _metadata(folder, {"file_name": "0.png", "text": "a"}, "", {"file_name": "./0.png", "text": "b"})
    assert FolderSource(folder)[0]["captions"] == ("a", "b")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_pictures_that_metadata_does_not_name_are_told_of_each_time(folder, kept, caplog, name):
    (folder / "metadata.jsonl").unlink()
    for more in ("sub/a.png", "3.bmp"):
        _picture(folder / more, 9)
    lines = {
        "metadata.jsonl": '{"file_name": "./0.png", "text": "a"}\n{"file_name": "1.png", "text": []}\n',
        "metadata.csv": "file_name,text\n./0.png,a\n1.png\n1.png,b\n",
    }
    (folder / name).write_text(lines[name])
    for _ in range(2):
        caplog.clear()
        records = FolderRecords(folder)
        assert caplog.messages == [f"4 pictures in {folder} are not named in {name}, the first 2.png"]
        assert records.left_out.counts.total() == 1  # a line is broken or has no caption
    (folder / name).unlink()
    caplog.clear()
    (folder / "0.txt").write_text("a")
    assert len(FolderRecords(folder)) == 1 and not caplog.messages


def test_a_path_may_begin_at_home_or_be_this_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(FolderRecords(f"~/{folder.name}")) == 4
    monkeypatch.chdir(folder)
    assert len(make_source(FolderConfig("."), "train")) == 4
    with pytest.raises(UserError, match="a folder has no path: set config.data.path"):
        make_source(FolderConfig(), "train")


def test_mistakes_are_answered(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UserError, match="undivided, so all of it is train"):
        FolderSource(folder, "val")
    with pytest.raises(UserError, match="crop 'left'"):
        FolderSource(folder, crop="left")
    with pytest.raises(UserError, match="resolution must be"):
        FolderSource(folder, resolution=0)
    _metadata(folder, {"file_name": "pictures/0.png", "text": "a"})
    with pytest.raises(UserError, match="has no caption of .*1 missing .first metadata.jsonl:1, pictures/0.png"):
        FolderSource(folder)
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="it is empty"):
        FolderSource(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"not one of 4 pictures .* the first 0.png: write 0.txt or a metadata.jsonl"):
        FolderSource(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no pictures in"):
        FolderSource(tmp_path / "empty")
