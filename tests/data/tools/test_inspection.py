"""The inspection of a data set finds the planted defects in real files and never aborts."""

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

from dalle2_jax.cli import main
from dalle2_jax.data import FolderSource, ImageSource, Record, RejectionCounts, source_named
from dalle2_jax.data.tools.inspection import difference_hash, inspect, summary, write
from dalle2_jax.text import clip_tokenizer, train_sentencepiece


def scene(seed, height=60, width=80):
    """Returns an image of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(folder, name, pixels, caption="a scene", **options):
    """Writes an image file and its caption file."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def bomb():
    """Returns a PNG whose header claims 40,000 x 40,000 pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of three scenes, one of them three times, a flat image and four invalid files."""
    folder = tmp_path / "images"
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


def test_a_folder_with_invalid_images_is_inspected_completely(folder):
    report = found_in(source_named(f"folder:{folder}", "train", 64, max_rejected=1.0)).report
    assert (report["records"], report["read"], report["good"]) == (10, 10, 6)
    assert {cause: (bad["count"], bad["first"]) for cause, bad in report["bad"].items()} == {
        "not an image": (2, ["cut.jpg", "cut.png"]),
        "empty": (1, ["none.png"]),
        "far too large": (1, ["bomb.png"]),
    }
    assert (report["width"]["min"], report["width"]["max"]) == (20, 120)
    assert (report["height"]["min"], report["height"]["max"]) == (20, 100)
    assert (report["shorter_side"]["min"], report["shorter_side"]["max"]) == (20, 60)
    assert (report["aspect"]["min"], report["aspect"]["median"], report["aspect"]["max"]) == (0.5, 1.333, 3.0)
    assert report["bad"].keys().isdisjoint(report["rejected_at_opening"])


def test_duplicates_are_found_across_sizes_and_formats_and_flat_images_are_excluded(folder):
    save(folder, "flat2.png", np.full((20, 20, 3), 200, np.uint8))
    duplicates = found_in(FolderSource(folder, max_rejected=1.0)).report["duplicates"]
    assert duplicates == {
        "groups": 1,
        "surplus": 2,
        "largest": [{"count": 3, "first": ["0.png", "again.jpg", "small.webp"]}],
        "flat": 2,
    }


def test_the_hash_has_a_bit_where_brightness_increases():
    ramp = np.repeat(np.arange(0, 90, 10, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    assert difference_hash(ramp) == 2**64 - 1 and difference_hash(ramp[:, ::-1].copy()) == 0
    ramp[0] = 7  # row 0 holds the eight highest bits
    assert difference_hash(ramp) == 2**56 - 1
    assert difference_hash(scene(0)) != difference_hash(scene(1))
    assert difference_hash(np.zeros((1, 1, 3), np.uint8)) == 0


def test_captions_are_measured_before_truncation(tmp_path):
    lines = {"fits": "red " * 75, "cut": "red " * 76, "long": "red " * 1000, "empty": "", "odd": b"\xff\n\x00 \xf0"}
    for number, (name, caption) in enumerate(lines.items()):
        save(tmp_path, f"{name}.png", scene(number), caption)
    captions = found_in(FolderSource(tmp_path)).report["captions"]
    assert captions["count"] == 6 and captions["per_image"]["max"] == 2
    assert captions["tokens"]["min"] == 2 and captions["tokens"]["max"] == 1002
    assert captions["tokens"]["75%"] == 78
    assert captions["cut_share"] == pytest.approx(2 / 6)
    assert captions["empty"] == 1 and captions["not_utf8"] == 2


def test_a_limit_samples_records_evenly(tmp_path):
    for number in range(10):
        save(tmp_path, f"{number}.png", scene(number, 8 + number, 30))
    found = found_in(FolderSource(tmp_path), limit=4)
    assert (found.report["records"], found.report["read"], found.report["good"]) == (10, 4, 4)
    assert found.report["height"]["min"] == 8 and found.report["height"]["max"] == 17
    assert found_in(FolderSource(tmp_path), limit=40).report["read"] == 10


def test_the_sheet_shows_uncropped_images_from_the_complete_data_set():
    class Tall:
        """400 images of increasing gray level, of which the first is invalid."""

        rejections = RejectionCounts()

        def __len__(self):
            return 400

        def read(self, index):
            pixels = np.full((288, 144, 3), index // 4, np.uint8)
            return Record(f"{index}", pixels if index else b"bad", ("a",), {})

        def captions(self, limit):
            return iter(())

    sheet = found_in(ImageSource(Tall(), max_rejected=1.0)).sheet
    cells = sheet[6 + 72 :: 144 + 52 + 6, 6 + 72 :: 150, 0][:6, :8].ravel()
    assert len(cells) == 48 and (np.diff(cells.astype(int)) > 0).all() and cells[0] == 0 and cells[-1] > 95
    assert (sheet[6 + 72, 6 : 6 + 30] == 200).all()  # background next to an image that is half as wide as tall


def test_a_data_set_without_valid_images_is_reported(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    found = found_in(FolderSource(tmp_path, max_rejected=1.0))
    assert found.report["good"] == 0 and found.sheet.ndim == 3
    assert summary(found.report) == "0 good of 1 records read, of 1 in the data set\nbad: 1 empty"


def test_names_that_are_not_utf8_are_replaced_in_the_report(tmp_path):
    save(tmp_path / "in", "a.png", scene(0))
    for name in (b"\xff.png", b"\xff.txt"):
        source = tmp_path / "in" / ("a" + name[1:].decode())
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(source.read_bytes())
    write(found_in(FolderSource(tmp_path / "in")), tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert report["duplicates"]["largest"][0]["first"] == ["a.png", "\ufffd.png"]


def test_the_command_writes_a_report_and_a_sheet(folder, tmp_path, capsys):
    assert main(["data", "inspect", f"folder:{folder}", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    for part in ("6 good of 10 records read", "2 not an image", "2 images look like an earlier one, in 1 groups"):
        assert part in output
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert report["good"] == 6 and "ClipTokenizer" in report["captions"]["tokenizer"]
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.size == (6 * 150 + 6, 144 + 52 + 12)
    (tmp_path / "out2.model").write_bytes(train_sentencepiece(["a scene", "the same in other words"], 300).to_bytes())
    assert main(["data", "inspect", f"folder:{folder}", "--tokenizer", str(tmp_path / "out2.model"), "--num", "2"]) == 0
    assert "of 2 records read, of 10" in capsys.readouterr().out
    assert main(["data", "inspect", f"folder:{folder}", "--tokenizer", str(tmp_path / "no.model")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["data", "inspect", "shapes", "--num", "3"]) == 0


def test_mostly_invalid_shards_are_reported(tmp_path, capsys):
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
    assert main(["data", "inspect", f"webdataset:{tmp_path}", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["good"] == 1 and report["bad"]["broken JSON"]["count"] == 20
    assert report["rejected_at_opening"] == {"no caption": 1, "shard cut short": 21, "not a tar": 21}
    assert "20 broken JSON" in capsys.readouterr().out
