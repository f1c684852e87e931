"""A look at a data set finds in real files what was put there, and nothing stops it."""

import io
import json
import os
import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import FolderSource, PictureSource, Record, source_named
from dalle2_jax.data.__main__ import main
from dalle2_jax.data.inspection import difference_hash, inspect, summary, write
from dalle2_jax.text import clip_tokenizer, train_sentencepiece


def scene(seed, height=60, width=80):
    """A picture of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(folder, name, picture, caption="a scene", **options):
    """Writes a picture file and the captions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def bomb():
    """A PNG whose header promises 40,000 x 40,000 pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def folder(tmp_path):
    """Three scenes, one of them three times, a flat picture, and four that cannot be used."""
    folder = tmp_path / "pictures"
    for number, (height, width) in enumerate([(60, 80), (40, 120), (100, 50)]):
        save(folder, f"{number}.png", scene(number, height, width), f"scene {number}")
    save(folder, "again.jpg", scene(0), "the same\nthe same in other words", quality=90)
    save(folder, "small.webp", cv2.resize(scene(0), (40, 30), interpolation=cv2.INTER_AREA), "", lossless=True)
    save(folder, "flat.png", np.full((20, 20, 3), 90, np.uint8), b"caf\xe9")
    for name, content in {
        "cut.png": (folder / "1.png").read_bytes()[:-300],
        "cut.jpg": (folder / "again.jpg").read_bytes()[:-300],
        "none.png": b"",
        "bomb.png": bomb(),
    }.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("bad")
    return folder


def found_in(source, **options):
    return inspect(source, clip_tokenizer(), **options)


def test_a_folder_with_bad_pictures_is_told_to_its_end(folder):
    report = found_in(source_named(f"folder:{folder}", "train", 64, max_rejected=1.0)).report
    assert (report["records"], report["read"], report["good"]) == (10, 10, 6)
    assert {cause: (bad["count"], bad["first"]) for cause, bad in report["bad"].items()} == {
        "not a picture": (2, ["cut.jpg", "cut.png"]),
        "empty": (1, ["none.png"]),
        "far too large": (1, ["bomb.png"]),
    }
    assert (report["width"]["least"], report["width"]["most"]) == (20, 120)
    assert (report["height"]["least"], report["height"]["most"]) == (20, 100)
    assert (report["shorter_side"]["least"], report["shorter_side"]["most"]) == (20, 60)
    assert (report["aspect"]["least"], report["aspect"]["median"], report["aspect"]["most"]) == (0.5, 1.333, 3.0)
    assert report["bad"].keys().isdisjoint(report["left_out_at_opening"])


def test_duplicates_are_found_across_size_and_format_and_flat_pictures_are_none(folder):
    save(folder, "flat2.png", np.full((20, 20, 3), 200, np.uint8))
    duplicates = found_in(FolderSource(folder, max_rejected=1.0)).report["duplicates"]
    assert duplicates == {
        "groups": 1,
        "surplus": 2,
        "largest": [{"count": 3, "first": ["0.png", "again.jpg", "small.webp"]}],
        "flat": 2,
    }


def test_the_hash_is_where_brightness_rises():
    ramp = np.repeat(np.arange(0, 90, 10, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    assert difference_hash(ramp) == 2**64 - 1 and difference_hash(ramp[:, ::-1].copy()) == 0
    ramp[0] = 7  # the first row is the first eight bits
    assert difference_hash(ramp) == 2**56 - 1
    assert difference_hash(scene(0)) != difference_hash(scene(1))
    assert difference_hash(np.zeros((1, 1, 3), np.uint8)) == 0


def test_captions_are_measured_whole(tmp_path):
    lines = {"fits": "red " * 75, "cut": "red " * 76, "long": "red " * 1000, "empty": "", "odd": b"\xff\n\x00 \xf0"}
    for number, (name, caption) in enumerate(lines.items()):
        save(tmp_path, f"{name}.png", scene(number), caption)
    captions = found_in(FolderSource(tmp_path)).report["captions"]
    assert captions["count"] == 6 and captions["a_picture"]["most"] == 2
    assert captions["tokens"]["least"] == 2 and captions["tokens"]["most"] == 1002
    assert captions["tokens"]["75%"] == 78
    assert captions["cut_share"] == pytest.approx(2 / 6)
    assert captions["empty"] == 1 and captions["not_utf8"] == 2


def test_a_limit_reads_records_from_all_over(tmp_path):
    for number in range(10):
        save(tmp_path, f"{number}.png", scene(number, 8 + number, 30))
    found = found_in(FolderSource(tmp_path), limit=4)
    assert (found.report["records"], found.report["read"], found.report["good"]) == (10, 4, 4)
    assert found.report["height"]["least"] == 8 and found.report["height"]["most"] == 17
    assert found_in(FolderSource(tmp_path), limit=40).report["read"] == 10


def test_the_sheet_shows_whole_pictures_from_all_over():
    class Tall:
        """400 pictures, each of its own level, and a bad one among the first."""

        def __len__(self):
            return 400

        def read(self, index):
            picture = np.full((288, 144, 3), index // 4, np.uint8)
            return Record(f"{index}", picture if index else b"bad", ("a",), {})

        def captions(self, limit):
            return iter(())

    sheet = found_in(PictureSource(Tall(), max_rejected=1.0)).sheet
    cells = sheet[6 + 72 :: 144 + 52 + 6, 6 + 72 :: 150, 0][:6, :8].ravel()
    assert len(cells) == 48 and (np.diff(cells.astype(int)) > 0).all() and cells[0] == 0 and cells[-1] > 95
    assert (sheet[6 + 72, 6 : 6 + 30] == 200).all()  # beside a picture half as wide as tall


def test_a_data_set_without_a_good_picture_is_told_too(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    found = found_in(FolderSource(tmp_path, max_rejected=1.0))
    assert found.report["good"] == 0 and found.sheet.ndim == 3
    assert summary(found.report) == "0 good of 1 records read, of 1 in the data set\nbad: 1 empty"


def test_names_that_are_not_utf8_are_written(tmp_path):
    save(tmp_path / "in", "a.png", scene(0))
    for name in (b"\xff.png", b"\xff.txt"):
        source = tmp_path / "in" / ("a" + name[1:].decode())
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(source.read_bytes())
    write(found_in(FolderSource(tmp_path / "in")), tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert report["duplicates"]["largest"][0]["first"] == ["a.png", "\ufffd.png"]


def test_the_command_writes_a_report_and_a_sheet(folder, tmp_path, capsys):
    assert main(["inspect", f"folder:{folder}", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for part in ("6 good of 10 records read", "2 not a picture", "2 pictures look like an earlier one, in 1 groups"):
        assert part in said
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert report["good"] == 6 and "ClipTokenizer" in report["captions"]["tokenizer"]
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.size == (6 * 150 + 6, 144 + 52 + 12)
    (tmp_path / "out2.model").write_bytes(train_sentencepiece(["a scene", "the same in other words"], 300).to_bytes())
    assert main(["inspect", f"folder:{folder}", "--tokenizer", str(tmp_path / "out2.model"), "--num", "2"]) == 0
    assert "of 2 records read, of 10" in capsys.readouterr().out
    assert main(["inspect", f"folder:{folder}", "--tokenizer", str(tmp_path / "no.model")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect", "shapes", "--num", "3"]) == 0


def test_shards_that_are_mostly_bad_are_told(tmp_path, capsys):
    content = io.BytesIO()
    Image.fromarray(scene(0)).save(content, "PNG")
    members = {"a.png": content.getvalue(), "a.txt": b"good", "b.png": content.getvalue()}
    members |= {f"{n}.{end}": one for n in range(20) for end, one in (("png", content.getvalue()), ("json", b"{"))}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, one in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(one)
            tar.addfile(member, io.BytesIO(one))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    (tmp_path / "2.tar").write_bytes(b"no tar" * 200)
    assert main(["inspect", f"webdataset:{tmp_path}", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["good"] == 1 and report["bad"]["broken JSON"]["count"] == 20
    assert report["left_out_at_opening"] == {"no caption": 1, "shard cut short": 21, "not a tar": 21}
    assert "20 broken JSON" in capsys.readouterr().out
