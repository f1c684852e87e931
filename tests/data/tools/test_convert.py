"""Conversion to tar shards preserves records and names, and reports rejected records and full disks."""

import errno
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax.cli import main
from dalle2_jax.data import FolderRecords, ImageSource, Record, RejectionCounts, ShapesSource
from dalle2_jax.data.formats.webdataset import WebdatasetRecords
from dalle2_jax.data.tools import convert as convert_module
from dalle2_jax.data.tools.convert import convert
from dalle2_jax.errors import UserError


def image_file(level=0, kind="PNG", **options):
    """Returns an image file of one gray level."""
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(content, kind, **options)
    return content.getvalue()


def header(width, height):
    """Returns a PNG that consists of its header only."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


class InMemoryRecords:
    """Records in memory; implements `Records`."""

    def __init__(self, *records):
        self.records, self.rejections = records, RejectionCounts()

    def __len__(self):
        return len(self.records)

    def read(self, index):
        record = self.records[index]
        return record if isinstance(record, Record) else Record(str(index), record, ("a",), {})

    def captions(self, limit):
        return iter(())


def through_tars(records, tmp_path):
    """Writes records as tar shards, and returns the records that are read back."""
    convert({"train": ImageSource(records, 4)}, tmp_path / "out", "webdataset")
    read = WebdatasetRecords(str(tmp_path / "out"))
    return [read.read(index) for index in range(len(read))]


PRESERVED = [
    "a",
    "b c (1)",
    "[x]",
    "Blüte ß",
    "日本/猫",
    "v1.0/e",
    ".hidden/f",
    "a\nb\t",
    "a/" + "long" * 60,
    "-n",
    "{g,h}",
]
CHANGED = {
    # original name: prefix of the name in the shard
    "x.y": "x_y_",
    "c/../d": "c/d_",
    "/abs": "abs_",
    ".dot": "_dot_",
    "e//f": "e/f_",
    "./g": "g_",
    "n\0ul": "n_ul_",
    "": "record_",
    "../..": "record_",
    "h/": "h_",
}


def test_names_are_preserved_unless_readers_would_truncate_them(tmp_path):
    keys = [f"{name}.png" if number % 2 else name for number, name in enumerate(PRESERVED)] + [*CHANGED]
    found = through_tars(InMemoryRecords(*(Record(key, image_file(), ("a",), {}) for key in keys)), tmp_path)
    assert [record.name for record in found[: len(PRESERVED)]] == PRESERVED
    for record, start in zip(found[len(PRESERVED) :], CHANGED.values(), strict=True):
        assert record.name.startswith(start) and len(record.name) == len(start) + 8
    assert len({record.name for record in found}) == len(keys)


def test_a_name_does_not_depend_on_earlier_names():
    for key in ("x.y.png", "../d.png", ""):
        assert convert_module._name(key, set()) == convert_module._name(key, {"new", "another"})


def test_names_are_unique(tmp_path):
    keys = ["a.png", "a.jpg", "a.png", "a.png", "x.y.png", "x.y.png", "x_y.png"]
    found = through_tars(InMemoryRecords(*(Record(key, image_file(), ("a",), {}) for key in keys)), tmp_path)
    assert len({record.name for record in found}) == len(keys)
    assert found[0].name == "a" and found[-1].name == "x_y"


CAPTIONS = [
    ("a dog",),
    ("",),
    ("", "a dog"),
    ("a\tdog  runs", "two"),
    ("one\ntwo",),
    (" a dog ",),
    ("\ufeffmarked",),
    ("a\u2028b\x0cc",),
    ("ein Bär", ""),
]


def test_captions_are_preserved_exactly(tmp_path):
    records = InMemoryRecords(
        *(Record(f"{number}.png", image_file(), captions, {}) for number, captions in enumerate(CAPTIONS))
    )
    assert [record.captions for record in through_tars(records, tmp_path)] == CAPTIONS
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        texts = [name for name in tar.getnames() if name.endswith(".txt")]
        assert texts == ["0.txt", "1.txt", "3.txt"], "a .txt file is written only if its lines are the captions"
        assert json.load(tar.extractfile("8.json")) == {"caption": ["ein Bär", ""]}


FIELDS = [
    # captions, fields of the record, fields that are read back
    (("a",), {"key": 7, "captions": "mine"}, {"key": 7, "captions": "mine", "caption": "a"}),
    (("a",), {"caption": None}, {"caption": None}),
    (("a", ""), {"caption": ["a", ""]}, {"caption": ["a", ""]}),
    (("a", ""), {"caption": "mine"}, {"caption": ["a", ""], "caption_field": "mine"}),
    (
        ("", "a"),
        {"caption": 3, "caption_field": 4},
        {"caption": ["", "a"], "caption_field": 4, "caption_field_": 3},
    ),
]


@pytest.mark.parametrize(("captions", "fields", "read_back"), FIELDS)
def test_fields_are_preserved_whatever_their_names(tmp_path, captions, fields, read_back):
    [record] = through_tars(InMemoryRecords(Record("a.png", image_file(), captions, fields)), tmp_path)
    assert record == Record("a", image_file(), captions, read_back)


def test_a_folder_is_preserved_by_repeated_conversion(tmp_path):
    """Names, images, captions and fields are preserved; the field ``caption`` is added."""
    folder, lines = tmp_path / "in", []
    (folder / "d.e").mkdir(parents=True)
    for number, name in enumerate(["ü (1).png", "d.e/f.png", "g.webp", "h.jpg"]):
        (folder / name).write_bytes(image_file(number, Image.registered_extensions()["." + name.rpartition(".")[2]]))
        entry = {
            "text": [f"  spaced {number}", ""][: 1 + number % 2],
            "key": number,
            "caption": "own",
            "in": {"a": [1]},
        }
        lines.append(json.dumps({"file_name": name, **entry}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    plain = FolderRecords(folder)
    first = through_tars(plain, tmp_path)
    for index, record in enumerate(first):
        one = plain.read(index)
        assert (record.name, record.image, record.captions) == (one.name, one.image, one.captions)
        own = {name: value for name, value in record.fields.items() if name not in ("caption", "caption_field")}
        assert own == {name: value for name, value in one.fields.items() if name != "caption"}
        assert "own" in (record.fields.get("caption_field"), record.fields["caption"])
    convert({"train": ImageSource(WebdatasetRecords(str(tmp_path / "out")), 4)}, tmp_path / "again", "webdataset")
    again = WebdatasetRecords(str(tmp_path / "again"))
    assert [again.read(index) for index in range(4)] == first


def test_rejected_records_are_reported_by_cause(tmp_path, capsys, recwarn):
    folder = tmp_path / "in"
    folder.mkdir()
    contents = {"good": image_file(), "empty": b"", "none": b"no image", "long": header(501, 10)}
    contents |= {"large": header(9_500, 9_500), "bomb": header(40_000, 40_000)}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text("a")
    for form in convert_module.FORMATS:
        words = ["convert", f"folder:{folder}", str(tmp_path / form), "--to", form]
        assert main(["data", *words, "--max_rejected", "1"]) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"{tmp_path / form}: 1 images of train") and "2 far too large" in output
        assert "1 empty" in output and "1 not an image" in output and "1 far too long" in output
    assert not [*recwarn], "not even Pillow's warning about large images"


def test_too_many_rejected_records_end_the_conversion(tmp_path, capsys):
    contents = [image_file()] * 90 + [b"bad"] * 11
    source = ImageSource(InMemoryRecords(*contents))
    with pytest.raises(UserError, check=mentions("11 of 101 records", "11 not an image", "max_rejected=0.1")):
        convert({"train": source}, tmp_path / "out", "webdataset")
    assert not [*tmp_path.iterdir()]
    found = convert(
        {"train": ImageSource(InMemoryRecords(*contents), max_rejected=0.2)}, tmp_path / "out", "webdataset"
    )
    assert found.counts == {"train": 90} and found.rejections.counts == {"not an image": 11}
    assert main(["data", "convert", "shapes", "out", "--to", "webdataset", "--max_rejected", "2"]) == 2
    assert "--max_rejected" in capsys.readouterr().err


def test_multi_frame_camera_files_are_converted(tmp_path):
    content = io.BytesIO()
    one = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    one.save(content, "MPO", save_all=True, append_images=[one])
    [record] = through_tars(InMemoryRecords(content.getvalue()), tmp_path)
    assert record.image == content.getvalue()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("form", convert_module.FORMATS)
def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch, form):
    if form == "webdataset":
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    else:
        from array_record.python import array_record_module

        class Writer:
            """Fails as array_record's writer does on a full disk."""

            def __init__(self, *_):
                pass

            def write(self, _):
                pass

            def close(self):
                raise RuntimeError(f"write() failed: {os.strerror(errno.ENOSPC)}; writing x; at byte 307200")

        monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(UserError, check=mentions(tmp_path / "out", os.strerror(errno.ENOSPC))):
        convert({"train": ShapesSource("train", 8, num_examples=3)}, tmp_path / "out", form)
    assert not [*tmp_path.iterdir()]


def test_a_string_is_accepted_as_a_path(tmp_path):
    found = convert({"train": ShapesSource("train", 8, num_examples=3)}, str(tmp_path / "out"), "webdataset")
    assert found.counts == {"train": 3} and len(WebdatasetRecords(str(tmp_path / "out"))) == 3
    assert len(WebdatasetRecords(tmp_path / "out")) == 3
