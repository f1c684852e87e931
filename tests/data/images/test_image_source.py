import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from raised import mentions
from streams import sample

from dalle2_jax.data import Filters, ImageSource, Record, Records, Rejected, Source, example
from dalle2_jax.data.images.records import (
    RejectionCounts,
    caption_lines,
    captions_in,
    clean,
    json_object,
    text_of,
)
from dalle2_jax.data.images.source import decoded
from dalle2_jax.errors import UserError


class Listed:
    """Records from a list; a string in place of a record is the cause with which it is rejected."""

    def __init__(self, *records, rejected=None):
        self.records, self.reads = records, 0
        self.rejections = RejectionCounts(rejected or {}, {"lost": "b.tar"} if rejected else {})

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
    """Returns a PNG whose header claims a size and that has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def _jpeg(height, width, level=200, **options):
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(content, "JPEG", **options)
    return content.getvalue()


def test_records_become_examples():
    records = Listed(_record(0), _record(1))
    source = pickle.loads(pickle.dumps(ImageSource(records, 8)))
    assert isinstance(records, Records) and isinstance(source, Source)
    assert example(source, 1)["image"].shape == (8, 8, 3) and (example(source, 1)["image"] == 1).all()
    assert {sample(source, 0, seed)["caption"] for seed in range(20)} == {"a", "b"}
    assert list(source.captions(1)) == ["a", "b"]


_GOOD = _jpeg(20, 20)


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (None, "no image"),
        (b"", "empty"),
        (b"GIF89a and nothing", "not an image"),
        (_GOOD[: len(_GOOD) // 2], "not an image"),
        (_GOOD[:20], "not an image"),
        (_png(30_000, 30_000), "far too large"),
        (_png(10_000, 10_000), "far too large"),
        (_GOOD.replace(struct.pack(">HH", 20, 20), struct.pack(">HH", 60_000, 60_000), 1), "far too large"),
        (_png(2, 2), "not an image"),
        (np.zeros((1, 60_000, 3), np.uint8), "far too long"),
        (_jpeg(2, 2000), "far too long"),
    ],
)
def test_an_invalid_image_is_rejected_by_cause(image, cause):
    source = ImageSource(Listed(Record("x", image, ("a",), {}), _record(9)), 8)
    assert (example(source, 0)["image"] == 9).all()
    assert source.rejections.counts == {cause: 1}


def test_exif_rotation_is_undone_before_the_size_is_checked():
    exif = Image.Exif()
    exif[0x0112] = 6
    records = Listed(Record("x", _jpeg(20, 40, exif=exif.tobytes()), ("a",), {}), _record(9))
    assert example(ImageSource(records, 8, filters=Filters(min_height=30)), 0)["image"][0, 0, 0] == 200
    assert ImageSource(records, 8, filters=Filters(min_width=30, min_height=9))._filtered == set()
    with pytest.raises(UserError, check=mentions("no image", "2 excluded")):
        ImageSource(records, 8, filters=Filters(min_width=30)).fetch([0])


@pytest.mark.parametrize(("size", "found"), [((64, 100), (16, 25)), ((65, 68), (65, 68)), ((31, 99), (31, 99))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_checked_at_full_size(size, found, kind, orientation):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(content, kind, exif=exif.tobytes())
    pixels, full_size = decoded(content.getvalue(), 16)
    turn = slice(None, None, 1 if orientation == 1 else -1)
    assert full_size == size[turn]
    assert pixels.shape[:2] == (found if kind == "JPEG" else size)[turn]


def test_each_cause_is_logged_once_and_counted(caplog):
    source = ImageSource(Listed("torn", "torn", "lost", _record(1, captions=()), _record(2)), 8, max_rejected=1)
    for index in range(5):
        assert (example(source, index)["image"] == 2).all()
    assert source.rejections.counts == {"torn": 2, "lost": 1, "no caption": 1}
    assert [message.count("rejected (torn)") for message in caplog.messages] == [1, 0, 0]
    assert source.records.reads == 4 + 5  # a rejected record is not read again


def _partly(count, *torn):
    torn = frozenset(torn)
    return Listed(*("torn" if number in torn else _record(number % 200) for number in range(count)))


def test_a_run_ends_when_too_many_records_are_rejected():
    source = ImageSource(_partly(400, *range(0, 400, 4)), 8)
    with pytest.raises(UserError, check=mentions(26, "101 records", "Listed", "26 torn", "max_rejected=0.1")):
        for index in range(400):
            source.fetch([index])
    tolerant = ImageSource(_partly(400, *range(0, 400, 4)), 8, max_rejected=0.3)
    for index in range(400):
        tolerant.fetch([index])
    assert tolerant.rejections.counts == {"torn": 100}
    with pytest.raises(UserError, check=mentions("30 of 130 records", "Listed", "30 lost", "b.tar")):
        ImageSource(Listed(*[_record(1)] * 100, rejected={"lost": 30}), 8)
    both = ImageSource(Listed("torn", *[_record(1)] * 269, rejected={"lost": 30}), 8)
    assert both.rejections.counts == {"lost": 30}
    with pytest.raises(UserError, check=mentions("31 of 300 records", "30 lost", "1 torn")):
        both.fetch([0])


@pytest.mark.parametrize("seed", range(3))
def test_the_decision_to_end_a_run_does_not_depend_on_the_order(seed):
    """Just below the limit no order and no worker's subset ends the run; just above it every order does."""
    noise = np.random.default_rng(seed)
    order, bad = noise.permutation(1000), noise.permutation(1000)
    for subset in (slice(None), slice(0, None, 4), slice(3, None, 16)):
        source = ImageSource(_partly(1000, *bad[:98]), 8)
        for index in order[subset].tolist() * 3:
            source.fetch([index])
    source = ImageSource(_partly(1000, *bad[:101]), 8)
    with pytest.raises(UserError, check=mentions("101 of 1000 records", "101 torn")):
        for index in order.tolist():
            source.fetch([index])


def test_a_large_bad_data_set_is_rejected_after_few_reads():
    source = ImageSource(_partly(100_000, *range(0, 100_000, 2)), 8)
    with pytest.raises(UserError, match=r"\d\d of .* 1\d\d records of Listed"):
        for index in np.random.default_rng(0).permutation(100_000).tolist():
            source.fetch([index])
    assert source.records.reads < 500


def test_images_that_vanish_during_a_long_run_end_it():
    source = ImageSource(_partly(200), 8)
    for index in [*range(200)] * 34:
        source.fetch([index])
    source.records = _partly(200, *range(170))
    with pytest.raises(UserError, check=mentions("21 of 200 records", "21 torn")):
        for index in range(200):
            source.fetch([index])


@pytest.mark.parametrize(("count", "allowed"), [(3, 1), (20, 6), (40, 10), (100, 10), (120, 12)])
def test_a_small_data_set_tolerates_a_few_rejections(count, allowed):
    for bad in (allowed, allowed + 1):
        source = ImageSource(_partly(count, *range(bad)), 8)
        rejected = pytest.raises(UserError, check=mentions(f"{bad} of {count} records", f"{bad} torn"))
        ends = rejected if bad > allowed else contextlib.nullcontext()
        with ends:
            for index in [*range(count)] * 3:
                source.fetch([index])
        strict = ImageSource(_partly(count, 0), 8, max_rejected=0)
        with pytest.raises(UserError, check=mentions(f"1 of {count} records", "max_rejected=0")):
            strict.fetch([0])


def test_substitutes_of_adjacent_records_differ():
    torn = range(60, 120)
    source = ImageSource(Listed(*("torn" if n in torn else _record(n) for n in range(200))), 8, max_rejected=1)
    substitutes = [int(example(source, index)["image"][0, 0, 0]) for index in torn]
    assert not set(substitutes) & set(torn) and max(substitutes.count(one) for one in substitutes) <= 3
    assert len(source.rejections.counts) == 1 and source.rejections.counts["torn"] == 60


def test_filtered_records_are_not_counted_as_rejections():
    records = [_record(number, score=number / 10, lang="en" if number % 2 else "de") for number in range(10)]
    source = ImageSource(Listed(*records), 8, filters=Filters(ranges={"score": (0.3, 0.8)}, equals={"lang": "en"}))
    assert {int(example(source, index)["image"][0, 0, 0]) for index in range(10)} == {3, 5, 7}
    assert not source.rejections.counts and len(source) == 10


@pytest.mark.parametrize(
    ("filters", "fields", "accepted"),
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
def test_filters(filters, fields, accepted):
    assert filters.accept_fields(fields) is accepted
    assert hash(filters) == hash(Filters(**{name: getattr(filters, name) for name in vars(filters)}))


def test_a_shifted_image_keeps_its_scale_and_repeats_its_edge():
    square = np.full((16, 16, 3), 255, np.uint8)
    square[4:12, 4:12] = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    source = ImageSource(Listed(Record("a", square, ("a",), {})), 16, "shift")
    np.testing.assert_array_equal(example(source, 0)["image"], square)
    found = [source.fetch([0], [np.random.default_rng(seed)])["image"][0] for seed in range(60)]
    places = set()
    for image in found:
        rows, columns = np.nonzero((image < 255).all(-1))
        top, left = rows.min(), columns.min()
        np.testing.assert_array_equal(image[top : top + 8, left : left + 8], square[4:12, 4:12])
        places.add((top, left))
    assert {top for top, _ in places} == {left for _, left in places} == {2, 3, 4, 5, 6}


def test_invalid_arguments_raise_user_errors():
    for arguments, facts in (
        ({"crop": "left"}, ["crop", "center", "'left'"]),
        ({"resolution": 0}, ["resolution", 1, 0]),
        ({"max_rejected": 10}, ["max_rejected", 0, 1, 10]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            ImageSource(Listed(_record(1)), **arguments)
    for arguments, facts in (
        ({"max_aspect": 0.5}, ["max_aspect", 1, 0.5]),
        ({"ranges": {"a": 3}}, ["ranges", "a", "pair", 3]),
        ({"ranges": {"a": (1, "2")}}, ["ranges", "a", "pair", (1, "2")]),
        ({"ranges": {"a": (1, 2, 3)}}, ["ranges", "a", "pair", (1, 2, 3)]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            Filters(**arguments)
    with pytest.raises(IndexError):
        ImageSource(Listed(_record(1))).fetch([1])


def test_captions_in_unusual_encodings_are_decoded():
    assert text_of(b"\xef\xbb\xbfcaf\xe9") == "caf\ufffd" and clean("a\ud83d") == "a\ufffd"
    assert caption_lines(" a \n\n\u00fc\n") == ("a", "\u00fc") and caption_lines(" \n") == ("",)
    assert captions_in(["a", "b"]) == ("a", "b") and captions_in("a") == ("a",)
    for wrong in ([], None, 3, ["a", 3], {"a": "b"}):
        with pytest.raises(TypeError):
            captions_in(wrong)
    assert json_object(b'{"a": 1}') == {"a": 1}
    for wrong in (b"", b"{", b"[" * 100_000, b'{"a": \xff}', b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(ValueError, check=mentions("JSON")):
            json_object(wrong)
    with pytest.raises(TypeError):
        json_object(b"[1]")
