import json
import pickle

import cv2
import numpy as np
import pytest

from dalle2_jax.data import Filters, FolderSource, images, make_stream
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
    assert list(source.captions(2)) == ["a 0", "no 0", "a 1", "no 1"]
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
    source = FolderSource(folder, resolution=8)
    assert source.rejected == {"missing": 1} and len(source) == 4
    assert source[1]["caption"] == "a 2" and (source[1]["image"] == 2).all()
    assert source[3]["caption"] == "a 0"  # the next after the last is the first
    (folder / "2.png").unlink()
    assert source[1]["caption"] == "a 0"
    assert source.rejected == {"missing": 1, "unreadable": 1, "not a picture": 2}
    stream = make_stream(source, train_sentencepiece(source.captions(9), 300), 8, 8, seed=0)
    assert next(stream)["image"].shape == (8, 8, 8, 3)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="not one picture .*2 not a picture.* 1 empty"):
        source[0]


def test_a_refused_picture_is_not_read_again(folder, monkeypatch):
    broken = (folder / "1.png").read_bytes()[:60]
    (folder / "1.png").write_bytes(broken)
    source, read = FolderSource(folder, resolution=8), []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda content, factor=1: read.append(content) or decode(content, factor))
    assert source[1]["caption"] == source[1]["caption"]
    assert read.count(broken) == 1 and source.rejected == {"not a picture": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "0.png", "text"', "2: not JSON"),
        ('{"file_name": "0.png"}', "2: text is missing"),
        ('{"text": "a"}', "2: file_name is missing"),
        ('{"file_name": "0.png", "text": 3}', "2: file_name must be a string, and text"),
        ('{"file_name": "0.png", "text": []}', "2: file_name must be a string, and text"),
        ('["0.png", "a"]', "2: expected an object"),
    ],
)
def test_broken_metadata_names_file_and_line(folder, line, message):
    _metadata(folder, {"file_name": "0.png", "text": "a"}, line)
    with pytest.raises(UserError, match=f"metadata.jsonl:{message}"):
        FolderSource(folder)


def test_bytes_that_are_not_utf8_are_marked_and_counted(folder):
    lines = [b'{"file_name": "0.png", "text": "caf\xe9"}', b'{"file_name": "1.png", "text": "\\ud83d half"}']
    (folder / "metadata.jsonl").write_bytes(b"\n".join([*lines, '{"file_name": "2.png", "text": "é"}'.encode()]))
    source = FolderSource(folder, resolution=8)
    assert [source[index]["caption"] for index in range(3)] == ["caf\ufffd", "\ufffd half", "é"]
    assert source.marred == 2 and not source.rejected
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
    (folder / "metadata.csv").write_text("file_name,text\n0.png\n")
    with pytest.raises(UserError, match="metadata.csv:2: text is missing"):
        FolderSource(folder)
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"' + "a" * 200_000)
    with pytest.raises(UserError, match="metadata.csv:1: field larger"):
        FolderSource(folder)


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
    with pytest.raises(UserError, match="names no picture"):
        FolderSource(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("zero")
    with pytest.raises(UserError, match=r"3 of 4 pictures .* the first 1.png: write 1.txt"):
        FolderSource(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no pictures in"):
        FolderSource(tmp_path / "empty")
