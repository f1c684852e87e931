"""Untrusted image files: formats other than the six supported ones are rejected by the header, before decoding."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile
from raised import mentions

from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.records import Rejected
from dalle2_jax.data.images.source import decoded, header

NOISE = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)


def encoded(kind, mode="RGB", **options):
    content = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(content, kind, **options)
    return content.getvalue()


FOREIGN = {
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
    "ppm": b"P6 1 1 255\n\0\0\0",
    "pfm": b"PF\n1 1\n-1.0\n" + bytes(12),
    "sun raster": struct.pack(">8I", 0x59A66A95, 1, 1, 24, 4, 1, 0, 0) + bytes(4),
    "jpeg 2000": bytes.fromhex("0000000c6a5020200d0a870a") + bytes(20),
    "openexr": bytes.fromhex("762f310102000000") + bytes(20),
    "radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4),
    "avif": b"\0\0\0\x1cftypavif" + bytes(20),
    "icon": b"\0\0\1\0\1\0\1\1" + bytes(20),
    "another riff": b"RIFF\x24\0\0\0WAVEfmt " + bytes(20),
    "text": b"not an image",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_unsupported_formats_never_reach_a_decoder(kind, monkeypatch):
    for module, name in ((Image, "open"), (cv2, "imdecode")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a decoder saw it"))
    for read in (decoding.decode, decoding.header):
        with pytest.raises(decoding.ImageError):
            read(FOREIGN[kind])
    with pytest.raises(Rejected, check=mentions(cause="not an image")):
        decoded(FOREIGN[kind])


def _tiff(width, height):
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (262, 3, 1), (273, 4, 8), (278, 4, height), (279, 4, 9)]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(1000)


def _claiming(kind, width, height):
    """Returns a file of about 1 KiB whose header claims a size."""
    if kind == "TIFF":
        return _tiff(width, height)
    if kind == "WEBP":
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\0\4\0\0WEBPVP8X" + struct.pack("<II", 10, 0) + size + bytes(1000)
    content = bytearray(encoded(kind, "P" if kind == "GIF" else "RGB"))
    place, form = {"PNG": (16, ">II"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}.get(kind, (0, ">HH"))
    if kind == "JPEG":
        place, width, height = content.index(b"\xff\xc0") + 5, height, width
    struct.pack_into(form, content, place, width, height)
    if kind == "PNG":  # update the checksum of the changed header
        struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow's own limit rejects only the second
@pytest.mark.parametrize("kind", decoding.FORMATS)
def test_an_enormous_image_is_rejected_by_its_header(kind, side, monkeypatch):
    content = _claiming(kind, side, side)
    assert len(content) < 2_100
    if kind == "WEBP":  # Pillow allocates the pixels of a WebP when it opens the file
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    for read in (decoding.decode, decoding.header):
        with pytest.raises(decoding.ImageError, check=mentions(cause="far too large")):
            read(content)
    with pytest.raises(Rejected, check=mentions(cause="far too large")):
        header(content)


def test_the_size_of_every_webp_variant_is_read_without_decoding():
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0" + bytes(8)}):
        assert decoding.header(encoded("WEBP", **options)) == ("WEBP", 12, 18)
    for content in (encoded("WEBP")[:24], b"RIFF\0\0\0\0WEBPVP9 " + bytes(20)):
        with pytest.raises(decoding.ImageError):
            decoding.header(content)


@pytest.mark.parametrize(("width", "height", "cause"), [(65_500, 65_500, "far too large"), (65_500, 8, "far too long")])
def test_a_jpeg_with_a_side_of_maximum_length_is_rejected(width, height, cause):
    with pytest.raises(decoding.ImageError) as caught:
        decoding.decode(_claiming("JPEG", width, height))
    assert caught.value.cause == cause


def test_a_jpeg_with_too_many_scans_is_rejected():
    content = encoded("JPEG", progressive=True)
    scan = content.index(b"\xff\xda")
    large = bytearray(content[:scan] + content[scan:-2] * 1_000 + b"\xff\xd9")
    struct.pack_into(">HH", large, large.index(b"\xff\xc2") + 5, 4_000, 4_000)
    with pytest.raises(decoding.ImageError) as caught:
        decoding.decode(bytes(large))
    assert caught.value.cause == "far too large"


def _mutated(content, rng):
    changed = bytearray(content)
    match rng.integers(4):
        case 0:
            return bytes(changed[: rng.integers(1, len(changed))])
        case 1:
            changed[rng.integers(min(64, len(changed)))] = rng.integers(256)
        case 2:
            at = rng.integers(len(changed))
            changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x30\x75\0\0"])
        case _:
            at = rng.integers(len(changed))
            del changed[at : at + rng.integers(1, 30)]
    return bytes(changed)


def test_randomly_damaged_files_raise_one_error_type():
    rng = np.random.default_rng(1)
    sound = [encoded(kind) for kind in decoding.FORMATS if kind != "GIF"]
    sound += [encoded("GIF", "P"), encoded("JPEG", "CMYK"), encoded("PNG", "P"), encoded("JPEG", progressive=True)]
    for content in sound:
        assert decoding.decode(content).shape == (12, 18, 3)
    outcomes = set()
    for number in range(150):
        content = _mutated(sound[number % len(sound)], rng)
        if number % 15 == 0:
            content = content[:8] + rng.bytes(200)
        try:
            assert decoding.decode(content).dtype == np.uint8
        except decoding.ImageError as error:
            outcomes.add(error.cause)
    assert "not an image" in outcomes


@pytest.mark.parametrize("error", [struct.error("short"), IndexError(), MemoryError(), TypeError(), cv2.error("bad")])
def test_any_exception_of_a_decoder_becomes_an_image_error(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(decoding, "_decoded", fail)
    with pytest.raises(decoding.ImageError, check=mentions(cause="not an image")):
        decoding.decode(encoded("JPEG"))
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(decoding.ImageError, check=mentions(cause="not an image")):
        decoding.header(encoded("JPEG"))
