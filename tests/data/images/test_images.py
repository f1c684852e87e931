import io

import cv2
import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax.data.images import decoding


def _encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), (90, 60), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_decodes_rgb(photo, kind):
    image = decoding.decode(_encoded(Image.fromarray(photo), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.dtype == np.uint8 and image.shape == photo.shape
    assert np.abs(image.astype(int) - photo).mean() < (4 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(photo, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation 6: rotate by 90 degrees clockwise
    image = decoding.decode(_encoded(Image.fromarray(photo), kind, exif=exif.tobytes()))
    assert np.abs(image.astype(int) - np.rot90(photo, -1)).mean() < 4


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode):
    gray = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    if mode == "I;16":
        image, kind = Image.fromarray(gray.astype(np.uint16) * 257), "PNG"
    else:
        image, kind = Image.fromarray(gray).convert(mode), "JPEG" if mode == "CMYK" else "PNG"
    decoded = decoding.decode(_encoded(image, kind))
    assert decoded.shape == (16, 16, 3)
    if mode != "1":
        assert np.abs(decoded.astype(int) - gray[:, :, None]).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_levels_are_scaled_by_the_full_range(kind, order):
    for level, expected in ((200, 1), (255, 1), (128, 0), (51400, 200), (65535, 255)):
        decoded = decoding.decode(_encoded(Image.fromarray(np.full((4, 6), level, order)), kind))
        assert decoded.shape == (4, 6, 3) and (decoded == expected).all()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0, 0.25, 1], [0, 64, 255]),
        ([0, 0.25, 1.5], [0, 0, 2]),
        ([-0.25, 0.25, 1], [0, 0, 1]),
        ([0, 128, 255], [0, 128, 255]),
        ([-9, 128, 1e38], [0, 128, 255]),
    ],
)
def test_float_images_have_a_maximum_of_1_or_255(levels, expected):
    decoded = decoding.decode(_encoded(Image.fromarray(np.array([levels], np.float32)), "TIFF"))
    assert decoded[0].tolist() == [[level] * 3 for level in expected]


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf])
def test_images_with_levels_that_are_not_finite_are_rejected(level):
    with pytest.raises(decoding.ImageError, check=mentions(cause="not an image")):
        decoding.decode(_encoded(Image.fromarray(np.array([[0.5, level]], np.float32)), "TIFF"))


@pytest.mark.parametrize(("level", "expected"), [(200, 200), (51400, 200), (70_000, 255), (-1, 0)])
def test_a_32_bit_tiff_may_hold_8_or_16_bit_levels(level, expected):
    decoded = decoding.decode(_encoded(Image.fromarray(np.full((4, 6), level, np.int32)), "TIFF"))
    assert (decoded == expected).all()


def test_transparency_is_composited_on_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[0, 0] = (255, 0, 0, 255)
    decoded = decoding.decode(_encoded(Image.fromarray(clear), "PNG"))
    assert decoded[0, 0].tolist() == [255, 0, 0] and (decoded[1:] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_or_foreign_bytes_are_rejected(photo, kind):
    content = _encoded(Image.fromarray(photo), kind)
    for broken in (content[: len(content) // 2], content[:8], b"", b"not an image"):
        with pytest.raises(decoding.ImageError, check=mentions(cause="not an image" if broken else "empty")):
            decoding.decode(broken)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (5, 7), (32, 32), (33, 400)])
def test_fit_then_crop(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    fitted = decoding.fit(image, 32)
    assert min(fitted.shape[:2]) == 32
    assert fitted.shape[0] / fitted.shape[1] == pytest.approx(height / width, rel=0.03)
    assert decoding.crop(fitted, 32).shape == (32, 32, 3)


def test_fit_averages_and_crop_is_central():
    checks = np.indices((64, 128)).sum(axis=0) % 2 * np.uint8(255)
    fitted = decoding.fit(np.repeat(checks[:, :, None].astype(np.uint8), 3, axis=2), 16)
    assert np.abs(fitted.astype(int) - 127.5).max() <= 1  # no aliasing
    ramp = np.zeros((4, 10, 3), np.uint8) + np.arange(10, dtype=np.uint8)[:, None]
    assert decoding.crop(ramp, 4)[0, :, 0].tolist() == [3, 4, 5, 6]
    lefts = {int(decoding.crop(ramp, 4, np.random.default_rng(seed))[0, 0, 0]) for seed in range(100)}
    assert lefts == set(range(7))


_REDUCTIONS = [((64, 90), 2), ((63, 90), 1), ((128, 300), 4), ((255, 256), 4), ((512, 512), 8)]


@pytest.mark.parametrize(("size", "factor"), _REDUCTIONS)
def test_a_reduction_never_goes_below_the_target_side(size, factor):
    assert decoding.reduction(*size, 32) == factor
    assert min(size) // factor >= 32


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_decoded_at_a_fraction_matches_the_downscaled_full_image(photo, factor, subsampling):
    smooth = cv2.resize(photo, (512, 512), interpolation=cv2.INTER_CUBIC)
    content = _encoded(Image.fromarray(smooth), "JPEG", quality=90, subsampling=subsampling)
    full, small = decoding.decode(content), decoding.decode(content, factor)
    assert small.shape == (512 // factor, 512 // factor, 3)
    difference = np.abs(decoding.fit(full, 64).astype(int) - decoding.fit(small, 64))
    assert difference.max() <= 4 and difference.mean() < 1


def test_a_jpeg_decoded_at_a_fraction_is_upright_and_other_formats_are_decoded_in_full(photo):
    large = Image.fromarray(photo).resize((360, 240), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(np.asarray(large), -1)
    small = decoding.decode(_encoded(large, "JPEG", exif=exif.tobytes()), 4)
    assert small.shape == (90, 60, 3)
    assert np.abs(small.astype(int) - decoding.fit(np.ascontiguousarray(upright), 60)).mean() < 4
    assert decoding.decode(_encoded(large, "PNG"), 4).shape == (240, 360, 3)
