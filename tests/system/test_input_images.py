"""Images, masks and captions in every form that users have them, and what is rejected."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax.errors import DataError, UsageError
from dalle2_jax.system.inputs import InputImage, read_captions, read_image, read_images, read_mask, square

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "in.png")
    return tmp_path / "in.png"


FORMS = {
    "path": lambda file: file,
    "text": str,
    "open file": lambda file: io.BytesIO(file.read_bytes()),
    "bytes": lambda file: file.read_bytes(),
    "Pillow": Image.open,
    "array": lambda _: RGB,
    "jax array": lambda _: jnp.asarray(RGB),
    "opaque RGBA": lambda _: np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_pixels(form, file):
    image = read_image(FORMS[form](file))
    np.testing.assert_array_equal(image.pixels, RGB)
    assert image.pixels.dtype == np.uint8
    assert image.name == str(file) if form in ("path", "text") else "5x6 image, sha256" in image.name


def test_home_folder(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    np.testing.assert_array_equal(read_image("~/in.png").pixels, RGB)


def test_grey_and_transparent():
    grey = RGB[..., 0]
    for array in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(read_image(array).pixels, np.repeat(grey[..., None], 3, axis=2))
    clear = np.concatenate([RGB, np.zeros((6, 5, 1), np.uint8)], axis=2)
    assert (read_image(clear).pixels == 255).all()
    deep = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000)
    assert read_image(deep).pixels.max() == round(29 * 2000 / 257)


def test_every_mode_of_a_file(tmp_path):
    """Palettes, transparency, CMYK, 16 bits and EXIF's orientation; nothing is squashed."""
    image = Image.fromarray(RGB)
    palette, exif = image.quantize(16), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png").pixels, np.rot90(RGB, -1))
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png").pixels, np.asarray(palette.convert("RGB")))
    image.convert("CMYK").save(tmp_path / "inks.tif")
    assert np.abs(read_image(tmp_path / "inks.tif").pixels.astype(int) - RGB).max() <= 1
    half = Image.fromarray(np.stack([RGB[..., 0], np.full((6, 5), 128, np.uint8)], axis=-1), "LA")
    half.save(tmp_path / "half.png")
    expected = RGB[..., 0] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read_image(tmp_path / "half.png").pixels - expected[..., None]).max() <= 1
    Image.fromarray(RGB[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png").pixels[..., 0], RGB[..., 0])


def test_several(file):
    batch = np.stack([RGB, RGB[::-1]])
    for images in (batch, list(batch), (file, Image.fromarray(RGB[::-1]))):
        read = read_images(images)
        assert len(read) == 2
        np.testing.assert_array_equal(np.stack([image.pixels for image in read]), batch)
    assert len(read_images(RGB)) == len(read_images(str(file))) == 1


@pytest.mark.parametrize(
    ("array", "advice"),
    [
        (RGB / 255, "np.round(x * 255).astype(np.uint8)"),
        ((RGB / 127.5 - 1).astype(np.float32), "np.round((x + 1) * 127.5).astype(np.uint8)"),
        (RGB.astype(np.float32), "np.round(np.clip(x, 0, 255)).astype(np.uint8)"),
        (RGB.astype(np.int64), "x.astype(np.uint8)"),
        (jnp.asarray(RGB / 255, jnp.float32), "np.round(x * 255).astype(np.uint8)"),
    ],
    ids=["0 to 1", "-1 to 1", "0 to 255", "integers", "jax"],
)
def test_other_arrays_are_rejected_with_the_conversion(array, advice):
    """A float image would give a wrong embedding without any sign of it."""
    for images in (array, [array], array[None]):
        with pytest.raises(DataError, check=mentions(advice)):
            read_images(images)
    np.testing.assert_array_equal(eval(advice, {"np": np, "x": np.asarray(array)}), RGB)


@pytest.mark.parametrize(
    "image",
    [
        RGB.transpose(2, 0, 1),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 2, 2, 2, 3), np.uint8),
        np.zeros((1, 200, 3), np.uint8),
        np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)),
        Image.new("RGB", (1, 200)),
        b"no image",
        io.StringIO("text"),
        io.BytesIO(b""),
        None,
        3,
        [[1, 2], [3, 4]],
        [],
    ],
    ids=["CHW", "empty", "five axes", "too long", "too large", "long Pillow", "bytes", "text file", "empty file"]
    + ["None", "number", "numbers", "no images"],
)
def test_what_is_no_image(image):
    with pytest.raises(DataError, check=mentions()):
        read_images(image)


def test_errors_name_the_file(file):
    damaged = file.with_name("damaged.png")
    damaged.write_bytes(file.read_bytes()[:40])
    for path in (file.with_name("none.png"), file.parent, damaged):
        with pytest.raises(DataError, check=mentions(path, path=path)):
            read_image(path)


def test_masks():
    image = InputImage(RGB, "in.png")
    where = np.arange(5) >= 2
    white = np.where(where, np.uint8(255), np.uint8(0))[None].repeat(6, axis=0)
    for mask in (white == 255, white, Image.fromarray(white), white[..., None].repeat(3, axis=2)):
        np.testing.assert_array_equal(read_mask(mask, image), np.tile(where, (6, 1)))
    for wrong in (white[:5], np.zeros_like(white), np.zeros((6, 5), bool), white / 255):
        with pytest.raises(DataError):
            read_mask(wrong, image)


def test_captions():
    assert read_captions("red") == ["red"] and read_captions(("a", "")) == ["a", ""]
    for wrong in ([], ["a", 3], None, "x" * 10_001, "\udc80"):
        with pytest.raises(UsageError if wrong is not None else (UsageError, TypeError)):
            read_captions(wrong)


def test_images_are_cropped_to_their_central_square():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (square(wide, 4) == 200).all() and square(wide, 4).shape == (4, 4, 3)
