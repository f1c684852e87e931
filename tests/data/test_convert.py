"""What is converted to tar shards comes back as it was, under its own name; bad records and full disks are told."""

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

from dalle2_jax.data import FolderRecords, FolderSource, PictureSource, Record, ShapesSource
from dalle2_jax.data import convert as convert_module
from dalle2_jax.data.__main__ import main
from dalle2_jax.data.convert import convert
from dalle2_jax.data.records import Rejected
from dalle2_jax.data.webdataset import WebdatasetRecords
from dalle2_jax.types import UserError


def picture(level=0, kind="PNG", **options):
    """A picture file of one gray level."""
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(content, kind, **options)
    return content.getvalue()


def header(width, height):
    """A PNG that has no more than its header."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


class Held:
    """Records in memory; a `Records`."""

    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def read(self, index):
        record = self.records[index]
        return record if isinstance(record, Record) else Record(str(index), record, ("a",), {})

    def captions(self, limit):
        return iter(())


def through_tars(records, tmp_path):
    """Writes records as tar shards, and returns what is read of them."""
    convert({"train": PictureSource(records, 4)}, tmp_path / "out", "webdataset")
    read = WebdatasetRecords(str(tmp_path / "out"))
    return [read.read(index) for index in range(len(read))]


KEPT = ["a", "b c (1)", "[x]", "Blüte ß", "日本/猫", "v1.0/e", ".hidden/f", "a\nb\t", "a/" + "long" * 60, "-n", "{g,h}"]
CHANGED = {
    # name in the folder: how the name that it gets begins
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


def test_names_come_back_but_those_that_readers_cut(tmp_path):
    keys = [f"{name}.png" if number % 2 else name for number, name in enumerate(KEPT)] + [*CHANGED]
    found = through_tars(Held(*(Record(key, picture(), ("a",), {}) for key in keys)), tmp_path)
    assert [record.name for record in found[: len(KEPT)]] == KEPT
    for record, start in zip(found[len(KEPT) :], CHANGED.values(), strict=True):
        assert record.name.startswith(start) and len(record.name) == len(start) + 8
    assert len({record.name for record in found}) == len(keys)


def test_a_name_does_not_depend_on_those_before():
    for key in ("x.y.png", "../d.png", ""):
        assert convert_module._name(key, set()) == convert_module._name(key, {"new", "another"})


def test_no_two_records_have_one_name(tmp_path):
    keys = ["a.png", "a.jpg", "a.png", "a.png", "x.y.png", "x.y.png", "x_y.png"]
    found = through_tars(Held(*(Record(key, picture(), ("a",), {}) for key in keys)), tmp_path)
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


def test_captions_come_back_exactly(tmp_path):
    records = Held(*(Record(f"{number}.png", picture(), captions, {}) for number, captions in enumerate(CAPTIONS)))
    assert [record.captions for record in through_tars(records, tmp_path)] == CAPTIONS
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        texts = [name for name in tar.getnames() if name.endswith(".txt")]
        assert texts == ["0.txt", "1.txt", "3.txt"], "where lines give them back"
        assert json.load(tar.extractfile("8.json")) == {"caption": ["ein Bär", ""]}


FIELDS = [
    # captions, the record's own fields, those that come back
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


@pytest.mark.parametrize(("captions", "fields", "back"), FIELDS)
def test_fields_come_back_whatever_they_are_called(tmp_path, captions, fields, back):
    [record] = through_tars(Held(Record("a.png", picture(), captions, fields)), tmp_path)
    assert record == Record("a", picture(), captions, back)


def test_a_folder_comes_back_from_tars_and_from_tars_again(tmp_path):
    """Names, pictures, captions and fields, with ``caption`` beside them."""
    folder, lines = tmp_path / "in", []
    (folder / "d.e").mkdir(parents=True)
    for number, name in enumerate(["ü (1).png", "d.e/f.png", "g.webp", "h.jpg"]):
        (folder / name).write_bytes(picture(number, Image.registered_extensions()["." + name.rpartition(".")[2]]))
        told = {"text": [f"  spaced {number}", ""][: 1 + number % 2], "key": number, "caption": "own", "in": {"a": [1]}}
        lines.append(json.dumps({"file_name": name, **told}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    plain = FolderRecords(folder)
    first = through_tars(plain, tmp_path)
    for index, record in enumerate(first):
        one = plain.read(index)
        assert (record.name, record.image, record.captions) == (one.name, one.image, one.captions)
        own = {name: value for name, value in record.fields.items() if name not in ("caption", "caption_field")}
        assert own == {name: value for name, value in one.fields.items() if name != "caption"}
        assert "own" in (record.fields.get("caption_field"), record.fields["caption"])
    convert({"train": PictureSource(WebdatasetRecords(str(tmp_path / "out")), 4)}, tmp_path / "again", "webdataset")
    again = WebdatasetRecords(str(tmp_path / "again"))
    assert [again.read(index) for index in range(4)] == first


def test_every_left_out_record_is_told_by_its_cause(tmp_path, capsys, recwarn):
    folder = tmp_path / "in"
    folder.mkdir()
    contents = {"good": picture(), "empty": b"", "none": b"no picture", "long": header(501, 10)}
    contents |= {"large": header(9_500, 9_500), "bomb": header(40_000, 40_000)}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text("a")
    for form in convert_module.FORMATS:
        words = ["convert", f"folder:{folder}", str(tmp_path / form), "--to", form]
        assert main([*words, "--max_rejected", "1"]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{tmp_path / form}: 1 pictures of train; left out are 2 far too large (first record ")
        assert "1 empty" in told and "1 not a picture" in told and "1 far too long" in told
    assert not [*recwarn], "Pillow's of large pictures among them"


def test_too_many_bad_records_end_it(tmp_path, capsys):
    held = [picture()] * 90 + [b"bad"] * 11
    source = PictureSource(Held(*held))
    with pytest.raises(UserError, match=r"11 of 101 records of .* are bad \(11 not a picture .*max_rejected=0.1:"):
        convert({"train": source}, tmp_path / "out", "webdataset")
    assert not [*tmp_path.iterdir()]
    found = convert({"train": PictureSource(Held(*held), max_rejected=0.2)}, tmp_path / "out", "webdataset")
    assert found.counts == {"train": 90} and found.left_out.counts == {"not a picture": 11}
    assert main(["convert", "shapes", "out", "--to", "webdataset", "--max_rejected", "2"]) == 2
    assert "2 is not from 0 to 1" in capsys.readouterr().err


def test_camera_pictures_that_hold_several_are_kept(tmp_path):
    content = io.BytesIO()
    one = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    one.save(content, "MPO", save_all=True, append_images=[one])
    [record] = through_tars(Held(content.getvalue()), tmp_path)
    assert record.image == content.getvalue()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("form", convert_module.FORMATS)
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, form):
    if form == "webdataset":
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    else:
        from array_record.python import array_record_module

        class Writer:
            """Fails as array_record's does."""

            def __init__(self, *_):
                pass

            def write(self, _):
                pass

            def close(self):
                raise RuntimeError(f"write() failed: {os.strerror(errno.ENOSPC)}; writing x; at byte 307200")

        monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(UserError) as caught:
        convert({"train": ShapesSource("train", 8, num_examples=3)}, tmp_path / "out", form)
    assert str(caught.value) == f"{tmp_path / 'out'} cannot be written (No space left on device)"
    assert not [*tmp_path.iterdir()]
