import json
import os
import pickle

import cv2
import numpy as np
import pytest
from raised import mentions
from streams import sample, text_stream

from dalle2_jax.data import (
    Filters,
    FolderConfig,
    FolderRecords,
    FolderSource,
    Rejected,
    example,
    make_source,
)
from dalle2_jax.data.formats import folder_index
from dalle2_jax.data.images import decoding
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.text import train_sentencepiece


def _write_image(path, level, shape=(20, 30, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(shape, level, np.uint8))


def _metadata(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        _write_image(tmp_path / f"{number}.png", number)
    records = [{"file_name": f"{number}.png", "text": [f"a {number}", f"no {number}"]} for number in range(4)]
    _metadata(tmp_path, *records)
    return tmp_path


def test_captions_are_read_from_metadata(folder):
    source = pickle.loads(pickle.dumps(FolderSource(folder, resolution=8)))
    assert len(source) == 4 and len(repr(source)) < 60 + len(str(folder))
    found = example(source, 2)
    assert found["image"].shape == (8, 8, 3) and (found["image"] == 2).all()
    assert found["captions"] == ("a 2", "no 2") and found["caption"] in found["captions"]
    sampled = {sample(source, 2, seed)["caption"] for seed in range(20)}
    assert sampled == {"a 2", "no 2"}
    assert list(source.captions(2)) == ["a 0", "no 0", "a 3", "no 3"]
    with pytest.raises(IndexError):
        source.fetch([4])


def test_caption_files_in_nested_folders_are_read(tmp_path):
    _write_image(tmp_path / "cats" / "a.jpg", 200)
    (tmp_path / "cats" / "a.txt").write_text("eine Katze ü\n\n a cat \n", encoding="utf-8")
    _write_image(tmp_path / "b.PNG", 10)
    (tmp_path / "b.txt").write_text("")
    _write_image(tmp_path / ".cache" / "c.png", 10)
    source = FolderSource(tmp_path, resolution=8)
    assert [example(source, index)["captions"] for index in range(2)] == [("",), ("eine Katze ü", "a cat")]


def test_folders_divided_into_splits_are_read(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            _write_image(tmp_path / split / f"{number}.png", number)
            (tmp_path / split / f"{number}.txt").write_text(split)
    assert len(FolderSource(tmp_path, "train")) == 3 and len(FolderSource(tmp_path, "val")) == 2
    assert example(FolderSource(tmp_path, "val"), 0)["caption"] == "val"
    with pytest.raises(DataError, check=mentions("'test'", "train", "val", path=tmp_path)):
        FolderSource(tmp_path, "test")


@pytest.mark.parametrize(("stored", "requested"), [("validation", "val"), ("val", "validation")])
def test_validation_and_val_name_the_same_folder_split(tmp_path, stored, requested):
    for split in ("train", stored):
        _write_image(tmp_path / split / "0.png", 0)
        (tmp_path / split / "0.txt").write_text(split)
    assert example(FolderSource(tmp_path, requested), 0)["caption"] == stored


def test_unusual_file_names_and_links_are_read(tmp_path):
    """Names that are not UTF-8, and links to folders, one of them circular."""
    content = cv2.imencode(".png", np.full((8, 8, 3), 7, np.uint8))[1].tobytes()
    for name in (b"caf\xe9", "\u65e5\u672c".encode(), b"a.b", b"-"):
        for ending, what in ((b".png", content), (b".txt", name)):
            with open(os.fsencode(tmp_path / "x") + name + ending, "wb") as file:
                file.write(what)
    (tmp_path / "more").mkdir()
    _write_image(tmp_path / "more" / "y.png", 9)
    (tmp_path / "more" / "y.txt").write_text("y")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path)
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path, resolution=8)))
    captions = {example(source, index)["key"]: example(source, index)["caption"] for index in range(len(source))}
    assert (
        len(source) == len(captions) == 5
        and captions["xa.b.png"] == "a.b"
        and captions["xcaf\ufffd.png"] == "caf\ufffd"
    )
    assert "\u65e5\u672c" in captions.values() and "y" in captions.values() and not source.rejections.counts


@pytest.fixture
def cached_index(monkeypatch, tmp_path_factory):
    """Enables the cache of indices for folders of any size; returns the folder of the cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(folder_index, "_LARGE", 1)
    return cache / "dalle2_jax" / "folders"


def test_the_index_of_a_large_folder_is_cached_until_the_folder_changes(folder, cached_index, monkeypatch):
    read, read_again = folder_index._read, []
    monkeypatch.setattr(folder_index, "_read", lambda path: read_again.append(path) or read(path))
    first = FolderSource(folder, resolution=8)
    again = FolderSource(folder, resolution=8)
    assert len(read_again) == 1 and len([*cached_index.iterdir()]) == 1
    sent = pickle.dumps(again)
    assert isinstance(again.records._index.names, np.memmap) and b"a 0" not in sent
    for index in range(4):
        for other in (again, pickle.loads(sent)):
            assert example(other, index)["captions"] == example(first, index)["captions"]
    changes = [
        lambda: _write_image(folder / "new" / "4.png", 4),
        lambda: _write_image(folder / "new" / "5.png", 5),
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
    assert [*found.captions(9)] == ["zero"] and found.rejections.counts == {"no caption": 4}
    (folder / "0.txt").write_text("a text is read with its image")
    assert example(FolderSource(folder, max_rejected=1.0), 0)["caption"] == "a text is read with its image"
    [home] = cached_index.iterdir()
    home.write_bytes(home.read_bytes()[:200])
    assert FolderSource(folder, max_rejected=1.0).rejections.counts == {"no caption": 4}


def test_the_result_of_filters_is_cached_with_the_index(folder, cached_index, monkeypatch):
    _metadata(folder, *({"file_name": f"{number}.png", "text": "a", "score": number} for number in range(4)))
    high = Filters(ranges={"score": (2, None)})
    assert len(FolderSource(folder, filters=high)) == 2 and len([*cached_index.iterdir()]) == 2
    monkeypatch.setattr(FolderRecords, "_choose", None)
    source = pickle.loads(pickle.dumps(FolderSource(folder, resolution=8, filters=high)))
    assert [int(example(source, index)["image"][0, 0, 0]) for index in range(2)] == [2, 3]


def test_an_image_deleted_after_indexing_is_missing_when_it_is_read(folder, cached_index):
    source = FolderSource(folder, resolution=8)
    (folder / "2.png").unlink()
    assert example(source, 2)["substitute"] and source.rejections.counts == {"missing": 1}


def test_random_crops_differ_and_follow_the_rng(tmp_path):
    ramp = np.zeros((8, 64, 3), np.uint8) + np.arange(64, dtype=np.uint8)[:, None]
    cv2.imwrite(str(tmp_path / "a.png"), ramp)
    (tmp_path / "a.txt").write_text("a ramp")
    source = FolderSource(tmp_path, resolution=8, crop="random")
    crops = [sample(source, 0, seed)["image"] for seed in (0, 1, 0)]
    assert (crops[0] != crops[1]).any() and (crops[0] == crops[2]).all()
    assert example(source, 0)["image"][0, 0, 0] == 28
    fixed = FolderSource(tmp_path, resolution=8)
    assert (sample(fixed, 0, 0)["image"] == example(source, 0)["image"]).all()


def test_a_damaged_image_does_not_stop_the_run(folder):
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    _metadata(folder, *({"file_name": f"{number}.png", "text": f"a {number}"} for number in range(5)))
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert source.rejections.counts == {"missing": 1} and len(source) == 4
    assert example(source, 1)["caption"] == "a 2" and (example(source, 1)["image"] == 2).all()
    assert example(source, 3)["caption"] == "a 0"  # the search for a substitute wraps around to the first record
    (folder / "2.png").unlink()
    assert example(source, 1)["caption"] == "a 0"
    assert source.rejections.counts == {"missing": 2, "not an image": 2}
    stream = text_stream(source, train_sentencepiece(source.captions(9), 300), 8, 8, seed=0)
    assert next(stream)["image"].shape == (8, 8, 8, 3)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(UserError, check=mentions("no image", "2 not an image", "1 empty")):
        source.fetch([0])


def test_files_that_cannot_be_images_are_rejected(folder):
    """A sparse file of 1 GiB, a pipe that would block forever, a dangling link and a folder."""
    os.truncate(folder / "1.png", 2**30)
    (folder / "2.png").unlink()
    os.mkfifo(folder / "2.png")
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to("nothing")
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [example(source, index)["caption"].split()[1] for index in range(len(source))] == ["0"] * 3
    assert source.rejections.counts == {"missing": 2, "far too large": 1}


def test_links_are_followed_to_regular_files_only(folder, tmp_path_factory):
    """Links to pipes and devices, whose reads never end, and circular links are rejected."""
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
    assert records.rejections.counts == {"unreadable": 1} and records.rejections.first == {"unreadable": "3.png"}
    with pytest.raises(Rejected, check=mentions(cause="missing")):
        records.read(1)
    (folder / "4.png").unlink()
    for number in (0, 4):
        _write_image(folder / f"{number}.png", number)
    for number, target in ((0, pipe), (4, "nothing")):
        (folder / f"{number}.txt").unlink()
        (folder / f"{number}.txt").symlink_to(target)
    records = FolderRecords(folder)
    assert len(records) == 1 and records.rejections.counts == {"unreadable": 1, "no caption": 1}
    with pytest.raises(Rejected, check=mentions(cause="no caption")):
        records.read(0)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_link_redirected_after_the_index_was_cached_is_rejected(folder, cached_index, tmp_path_factory, kind):
    target = tmp_path_factory.mktemp("elsewhere") / "0.png"
    (folder / "0.png").rename(target)
    (folder / "0.png").symlink_to(target)
    assert FolderRecords(folder).read(0).image
    target.unlink()
    os.mkfifo(target) if kind == "pipe" else target.symlink_to("/dev/null")
    with pytest.raises(Rejected, check=mentions(cause="unreadable")):
        FolderRecords(folder).read(0)


def test_a_rejected_image_is_not_read_again(folder, monkeypatch):
    broken = (folder / "1.png").read_bytes()[:60]
    (folder / "1.png").write_bytes(broken)
    source, read = FolderSource(folder, resolution=8), []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda content, *rest: read.append(content) or decode(content, *rest))
    assert example(source, 1)["caption"] == example(source, 1)["caption"]
    assert read.count(broken) == 1 and source.rejections.counts == {"not an image": 1}


@pytest.mark.parametrize(
    ("line", "cause", "fault"),
    [
        ('{"file_name": "0.png", "text"', "broken metadata", "not JSON"),
        ("[" * 100_000, "broken metadata", "not JSON"),
        ('{"file_name": "0.png"}', "broken metadata", "text is missing"),
        ('{"text": "a"}', "broken metadata", "file_name is missing"),
        ('{"file_name": 3, "text": "a"}', "broken metadata", "file_name"),
        ('{"file_name": "0.png", "text": 3}', "broken metadata", "text"),
        ('["0.png", "a"]', "broken metadata", "object"),
        ('{"file_name": "0.png", "text": null}', "no caption", ""),
        ('{"file_name": "0.png", "text": []}', "no caption", ""),
        ('{"file_name": "../0.png", "text": "a"}', "missing", "../0.png"),
    ],
)
def test_invalid_metadata_lines_are_rejected_and_the_first_is_named(folder, caplog, line, cause, fault):
    _metadata(folder, {"file_name": "0.png", "text": "a"}, line, {"file_name": "1.png", "text": "b"}, line)
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [example(source, index)["caption"] for index in range(2)] == ["a", "b"] and len(source) == 2
    count = 1 if cause == "missing" else 2  # a missing image counts once, however often it is named
    assert source.rejections.counts == {cause: count}
    assert mentions(f"{count} {cause}", "metadata.jsonl:2", fault)(caplog.messages[-1])
    with pytest.raises(UserError, check=mentions(f"{count} {cause}", "metadata.jsonl:2", "max_rejected=0")):
        FolderSource(folder, max_rejected=0.0)
    _metadata(folder, line)
    with pytest.raises(DataError, check=mentions(f"1 {cause}", "metadata.jsonl:1", path=folder / "metadata.jsonl")):
        FolderSource(folder)


def test_images_without_a_caption_file_are_rejected(folder):
    (folder / "metadata.jsonl").unlink()
    for number in (1, 3):
        (folder / f"{number}.txt").write_text(f"a {number}")
    source = FolderSource(folder, resolution=8, max_rejected=1.0)
    assert [example(source, index)["caption"] for index in range(len(source))] == ["a 1", "a 3"]
    assert source.rejections.counts == {"no caption": 2} and source.records.rejections.first == {"no caption": "0.png"}
    (folder / "3.txt").unlink()
    assert example(source, 1)["caption"] == "a 1" and source.rejections.counts == {"no caption": 3}
    assert [*source.captions(9)] == ["a 1"]


def test_invalid_utf8_is_replaced_and_counted(folder):
    lines = [b'{"file_name": "0.png", "text": "caf\xe9"}', b'{"file_name": "1.png", "text": "\\ud83d half"}']
    (folder / "metadata.jsonl").write_bytes(b"\n".join([*lines, '{"file_name": "2.png", "text": "é"}'.encode()]))
    source = FolderSource(folder, resolution=8)
    assert [example(source, index)["caption"] for index in range(3)] == ["caf\ufffd", "\ufffd half", "é"]
    assert source.rejections.flawed == {f"{place}, caption": "not UTF-8 (used)" for place in (0, 1)}
    assert not source.rejections.counts
    train_sentencepiece(source.captions(3), 300).encode(["\ufffd half"], 8)
    (folder / "metadata.jsonl").unlink()
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbfa\n\xff\xfe")
    assert example(FolderSource(folder), 0)["captions"] == ("a", "\ufffd\ufffd")


def test_captions_are_read_from_metadata_csv(folder):
    (folder / "metadata.jsonl").unlink()
    rows = ["file_name,text,score", '0.png,"a, and ""b""",0.5', '1.png,"two\nlines",0.9', "0.png,c,0.1", "3.png,d,"]
    (folder / "metadata.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    source = FolderSource(folder, resolution=8)
    assert [example(source, index)["captions"] for index in range(3)] == [('a, and "b"', "c"), ("two\nlines",), ("d",)]
    assert source.records.read(0).fields == {"score": "0.5"}
    assert list(FolderSource(folder, filters=Filters(ranges={"score": (0.6, None)})).captions(9)) == ["two\nlines"]
    (folder / "metadata.csv").write_text("file_name,text\n0.png\n1.png,b\n")
    records = FolderSource(folder).records
    assert len(records) == 1 and records.rejections.first == {"broken metadata": "metadata.csv:2, text is missing"}
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"' + "a" * 200_000 + "\n1.png,b\n2.png,c")
    records = FolderSource(folder).records  # rows inside an unclosed quotation mark are lost
    assert [*records.captions(9)][-1] == "c"
    assert "field larger" in records.rejections.first["broken metadata"]


def test_filters_on_fields_exclude_records(folder):
    tags = zip(range(4), "abab", strict=True)
    entries = [{"file_name": f"{number}.png", "text": "a", "score": number, "tag": tag} for number, tag in tags]
    _metadata(folder, *entries)
    source = FolderSource(folder, resolution=8, filters=Filters(ranges={"score": (1, None)}, equals={"tag": "b"}))
    assert [int(example(source, index)["image"][0, 0, 0]) for index in range(len(source))] == [1, 3]
    with pytest.raises(DataError, check=mentions(path=folder)):
        FolderSource(folder, filters=Filters(ranges={"socre": (1, None)}))


def test_an_image_named_twice_has_both_captions(folder):
    _metadata(folder, {"file_name": "0.png", "text": "a"}, "", {"file_name": "./0.png", "text": "b"})
    assert example(FolderSource(folder), 0)["captions"] == ("a", "b")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_images_missing_from_metadata_are_reported_each_time(folder, cached_index, caplog, name):
    (folder / "metadata.jsonl").unlink()
    for more in ("sub/a.png", "3.bmp"):
        _write_image(folder / more, 9)
    lines = {
        "metadata.jsonl": '{"file_name": "./0.png", "text": "a"}\n{"file_name": "1.png", "text": []}\n',
        "metadata.csv": "file_name,text\n./0.png,a\n1.png\n1.png,b\n",
    }
    (folder / name).write_text(lines[name])
    for _ in range(2):
        caplog.clear()
        records = FolderRecords(folder)
        [message] = caplog.messages
        assert mentions("4 images", folder, name, "2.png")(message)
        assert records.rejections.counts.total() == 1  # a line is broken or has no caption
    (folder / name).unlink()
    caplog.clear()
    (folder / "0.txt").write_text("a")
    assert len(FolderRecords(folder)) == 1 and not caplog.messages


def test_a_path_may_start_with_a_tilde_or_be_the_current_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(FolderRecords(f"~/{folder.name}")) == 4
    monkeypatch.chdir(folder)
    assert len(make_source(FolderConfig("."), "train")) == 4
    with pytest.raises(DataError, check=mentions("folder", "config.data.path", path=None)):
        make_source(FolderConfig(), "train")


def test_invalid_arguments_raise_user_errors(folder, tmp_path):
    with pytest.raises(DataError, check=mentions(path=tmp_path / "none")):
        FolderSource(tmp_path / "none")
    with pytest.raises(DataError, check=mentions("'val'", path=folder)):
        FolderSource(folder, "val")
    with pytest.raises(UserError, check=mentions("crop", "center", "'left'")):
        FolderSource(folder, crop="left")
    with pytest.raises(UserError, check=mentions("resolution", 1, 0)):
        FolderSource(folder, resolution=0)
    _metadata(folder, {"file_name": "images/0.png", "text": "a"})
    with pytest.raises(DataError, check=mentions("1 missing", "images/0.png", path=folder / "metadata.jsonl")):
        FolderSource(folder)
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, check=mentions(path=folder / "metadata.jsonl")):
        FolderSource(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError, check=mentions("0.png", "0.txt", path=folder)):
        FolderSource(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, check=mentions(path=tmp_path / "empty")):
        FolderSource(tmp_path / "empty")
