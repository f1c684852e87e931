import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import Filters, PictureSource, Record, Records, Rejected, Source
from dalle2_jax.data.pictures import decoded
from dalle2_jax.data.records import LeftOut, caption_lines, captions_in, clean, json_object, text_of
from dalle2_jax.types import UserError


class Listed:
    """Records given one by one; a string among them is the cause of a bad one."""

    def __init__(self, *records, left_out=None):
        self.records, self.reads = records, 0
        if left_out is not None:
            self.left_out = LeftOut(left_out, {"lost": "b.tar"})

    def __len__(self):
        return len(self.records)

    def __repr__(self):
        return "Listed"

    def read(self, index):
        self.reads += 1
        if isinstance(self.records[index], str):
            raise Rejected(self.records[index])
        return self.records[index]

    def captions(self, limit):
        return (caption for record in self.records[:limit] for caption in record.captions)


def _record(level, shape=(10, 12, 3), captions=("a", "b"), **fields):
    return Record(f"{level:03d}", np.full(shape, level, np.uint8), captions, fields)


def _png(width, height):
    """A PNG that claims a size, and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def _jpeg(height, width, level=200, **options):
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(content, "JPEG", **options)
    return content.getvalue()


def test_records_become_examples():
    records = Listed(_record(0), _record(1))
    source = pickle.loads(pickle.dumps(PictureSource(records, 8)))
    assert isinstance(records, Records) and isinstance(source, Source)
    assert source[1]["image"].shape == (8, 8, 3) and (source[1]["image"] == 1).all()
    assert {source.draw(0, np.random.default_rng(seed))[1] for seed in range(20)} == {"a", "b"}
    assert list(source.captions(1)) == ["a", "b"]


_GOOD = _jpeg(20, 20)


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (None, "no picture"),
        (b"", "empty"),
        (b"GIF89a and nothing", "not a picture"),
        (_GOOD[: len(_GOOD) // 2], "not a picture"),
        (_GOOD[:20], "not a picture"),
        (_png(30_000, 30_000), "far too large"),
        (_png(10_000, 10_000), "far too large"),
        (_GOOD.replace(struct.pack(">HH", 20, 20), struct.pack(">HH", 60_000, 60_000), 1), "far too large"),
        (_png(2, 2), "not a picture"),
        (np.zeros((1, 60_000, 3), np.uint8), "far too long"),
        (_jpeg(2, 2000), "far too long"),
    ],
)
def test_a_bad_picture_is_refused_by_cause(image, cause):
    source = PictureSource(Listed(Record("x", image, ("a",), {}), _record(9)), 8)
    assert (source[0]["image"] == 9).all()
    assert source.rejected == {cause: 1}


def test_a_picture_turned_by_its_camera_is_turned_back_before_it_is_judged():
    exif = Image.Exif()
    exif[0x0112] = 6
    records = Listed(Record("x", _jpeg(20, 40, exif=exif.tobytes()), ("a",), {}), _record(9))
    assert PictureSource(records, 8, filters=Filters(min_height=30))[0]["image"][0, 0, 0] == 200
    assert PictureSource(records, 8, filters=Filters(min_width=30, min_height=9))._unwanted == set()
    with pytest.raises(UserError, match="2 not wanted by the filters"):
        PictureSource(records, 8, filters=Filters(min_width=30))[0]


@pytest.mark.parametrize(("size", "found"), [((64, 100), (16, 25)), ((65, 68), (65, 68)), ((31, 99), (31, 99))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_judged_by_its_whole_size(size, found, kind, orientation):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(content, kind, exif=exif.tobytes())
    picture, whole = decoded(content.getvalue(), 16)
    turn = slice(None, None, 1 if orientation == 1 else -1)
    assert whole == size[turn]
    assert picture.shape[:2] == (found if kind == "JPEG" else size)[turn]


def test_each_cause_is_logged_once_and_counted(caplog):
    source = PictureSource(Listed("torn", "torn", "lost", _record(1, captions=()), _record(2)), 8, max_rejected=1)
    for index in range(5):
        assert (source[index]["image"] == 2).all()
    assert source.rejected == {"torn": 2, "lost": 1, "no caption": 1}
    assert [message.count("refused (torn)") for message in caplog.messages] == [1, 0, 0]
    assert source.records.reads == 4 + 5  # a refused record is not read again


def _partly(count, *torn):
    torn = frozenset(torn)
    return Listed(*("torn" if number in torn else _record(number % 200) for number in range(count)))


def test_a_run_ends_when_too_many_are_bad():
    source = PictureSource(_partly(400, *range(0, 400, 4)), 8)
    with pytest.raises(UserError, match="26 of the last 101 records of Listed are bad .found so far: 26 torn., more"):
        for index in range(400):
            source[index]
    patient = PictureSource(_partly(400, *range(0, 400, 4)), 8, max_rejected=0.3)
    for index in range(400):
        patient[index]
    assert patient.rejected == {"torn": 100}
    with pytest.raises(UserError, match="30 of 130 records of Listed are bad .found so far: 30 lost .first b.tar.."):
        PictureSource(Listed(*[_record(1)] * 100, left_out={"lost": 30}), 8)
    both = PictureSource(Listed("torn", *[_record(1)] * 269, left_out={"lost": 30}), 8)
    assert both.rejected == {"lost": 30}
    with pytest.raises(UserError, match="31 of 300 records of Listed are bad"):
        both[0]


@pytest.mark.parametrize("seed", range(3))
def test_whether_a_run_ends_is_no_matter_of_chance(seed):
    """Just under the limit no order and no share of a worker ends it; just over it every order does."""
    noise = np.random.default_rng(seed)
    order, bad = noise.permutation(1000), noise.permutation(1000)
    for share in (slice(None), slice(0, None, 4), slice(3, None, 16)):
        source = PictureSource(_partly(1000, *bad[:98]), 8)
        for index in order[share].tolist() * 3:
            source[index]
    source = PictureSource(_partly(1000, *bad[:101]), 8)
    with pytest.raises(UserError, match="101 of 1000 records"):
        for index in order.tolist():
            source[index]


def test_most_of_a_large_data_set_need_not_be_read_to_see_that_it_is_bad():
    source = PictureSource(_partly(100_000, *range(0, 100_000, 2)), 8)
    with pytest.raises(UserError, match=r"\d\d of the last 1\d\d records of Listed are bad"):
        for index in np.random.default_rng(0).permutation(100_000).tolist():
            source[index]
    assert source.records.reads < 500


def test_pictures_that_vanish_end_a_long_run():
    source = PictureSource(_partly(200), 8)
    for index in [*range(200)] * 34:
        source[index]
    source.records = _partly(200, *range(170))
    with pytest.raises(UserError, match="21 of 200 records"):
        for index in range(200):
            source[index]


@pytest.mark.parametrize(("count", "bearable"), [(3, 1), (20, 6), (40, 10), (100, 10), (120, 12)])
def test_of_a_small_data_set_some_may_be_bad(count, bearable):
    for bad in (bearable, bearable + 1):
        source = PictureSource(_partly(count, *range(bad)), 8)
        ends = pytest.raises(UserError, match=f"{bad} of {count}") if bad > bearable else contextlib.nullcontext()
        with ends:
            for index in [*range(count)] * 3:
                source[index]
        strict = PictureSource(_partly(count, 0), 8, max_rejected=0)
        with pytest.raises(UserError, match=f"1 of {count}"):
            strict[0]


def test_stand_ins_of_neighbours_are_spread():
    torn = range(60, 120)
    source = PictureSource(Listed(*("torn" if n in torn else _record(n) for n in range(200))), 8, max_rejected=1)
    stand_ins = [int(source[index]["image"][0, 0, 0]) for index in torn]
    assert not set(stand_ins) & set(torn) and max(stand_ins.count(one) for one in stand_ins) <= 3
    assert len(source.rejected) == 1 and source.rejected["torn"] == 60


def test_filters_pass_over_records_without_counting_them():
    records = [_record(number, score=number / 10, lang="en" if number % 2 else "de") for number in range(10)]
    source = PictureSource(Listed(*records), 8, filters=Filters(ranges={"score": (0.3, 0.8)}, equals={"lang": "en"}))
    assert {int(source[index]["image"][0, 0, 0]) for index in range(10)} == {3, 5, 7}
    assert not source.rejected and len(source) == 10


@pytest.mark.parametrize(
    ("filters", "fields", "wanted"),
    [
        (Filters(ranges={"a": (1, 2)}), {"a": 1}, True),
        (Filters(ranges={"a": (1, 2)}), {"a": 2.0}, True),
        (Filters(ranges={"a": (1, None)}), {"a": 0.9}, False),
        (Filters(ranges={"a": (None, 0.8)}), {"a": 0.9}, False),
        (Filters(ranges={"a": [None, 1]}), {"a": "0.5"}, True),
        (Filters(ranges={"a": (None, 1)}), {"a": "much"}, False),
        (Filters(ranges={"a": (None, 1)}), {"a": float("nan")}, False),
        (Filters(ranges={"a": (None, 1)}), {"a": None}, False),
        (Filters(ranges={"a": (None, 1)}), {"a": True}, False),
        (Filters(ranges={"a": (None, None)}), {}, False),
        (Filters(equals={"l": "en"}), {"l": "en"}, True),
        (Filters(equals={"l": "en"}), {"l": "de"}, False),
        (Filters(equals={"l": ["en", "de"]}), {"l": "de"}, True),
        (Filters(equals={"l": None}), {}, False),
        (Filters(min_width=10), {"width": 9, "height": 99}, False),
        (Filters(min_width=10), {"width": 10, "height": 1}, True),
        (Filters(min_height=10), {"width": 99, "height": 9}, False),
        (Filters(max_aspect=2), {"width": 5, "height": 10}, True),
        (Filters(max_aspect=2), {"width": 5, "height": 11}, False),
        (Filters(max_aspect=2), {"width": None, "height": 11}, True),
    ],
)
def test_filters(filters, fields, wanted):
    assert filters.want_fields(fields) is wanted
    assert hash(filters) == hash(Filters(**{name: getattr(filters, name) for name in vars(filters)}))


def test_mistakes_are_answered():
    for arguments, message in (
        ({"crop": "left"}, "crop 'left'"),
        ({"resolution": 0}, "resolution must be"),
        ({"max_rejected": 10}, "max_rejected is a share"),
    ):
        with pytest.raises(UserError, match=message):
            PictureSource(Listed(_record(1)), **arguments)
    for arguments, message in (
        ({"max_aspect": 0.5}, "max_aspect is the longer side"),
        ({"ranges": {"a": 3}}, "ranges: a must be a pair"),
        ({"ranges": {"a": (1, "2")}}, "ranges: a must be a pair"),
        ({"ranges": {"a": (1, 2, 3)}}, "ranges: a must be a pair"),
    ):
        with pytest.raises(UserError, match=message):
            Filters(**arguments)
    with pytest.raises(IndexError):
        PictureSource(Listed(_record(1)))[1]


def test_text_from_the_world():
    assert text_of(b"\xef\xbb\xbfcaf\xe9") == "caf\ufffd" and clean("a\ud83d") == "a\ufffd"
    assert caption_lines(" a \n\n\u00fc\n") == ("a", "\u00fc") and caption_lines(" \n") == ("",)
    assert captions_in(["a", "b"]) == ("a", "b") and captions_in("a") == ("a",)
    for wrong in ([], None, 3, ["a", 3], {"a": "b"}):
        with pytest.raises(TypeError):
            captions_in(wrong)
    assert json_object(b'{"a": 1}') == {"a": 1}
    for wrong in (b"", b"{", b"[" * 100_000, b'{"a": \xff}', b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(ValueError, match="not JSON"):
            json_object(wrong)
    with pytest.raises(TypeError):
        json_object(b"[1]")
