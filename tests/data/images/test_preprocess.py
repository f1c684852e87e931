"""Preprocessing of images for CLIP matches the published pipelines exactly, also when the data package does it."""

import dataclasses

import cv2
import numpy as np
import pytest
from PIL import Image
from raised import mentions
from streams import sample

from dalle2_jax import data
from dalle2_jax.data.images.decoding import crop, fit, preprocess
from dalle2_jax.errors import UserError
from dalle2_jax.types import Preprocessing

SIZES = ((224, 224), (57, 93), (93, 57), (300, 301), (20, 31), (31, 20), (640, 480), (9, 200), (33, 32), (1, 3))
SIDE = 32


def photograph(height, width, seed=0):
    """Returns smooth noise, which is neither constant nor white."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.ascontiguousarray(cv2.GaussianBlur(levels, (0, 0), 1.0))


def published(image, side, margin):
    """Resizes with PIL's bicubic, truncating the longer side as torchvision and transformers, and crops the centre."""
    resized = Image.fromarray(image)
    width, height = resized.size
    shorter, longer = min(width, height), max(width, height)
    longer = int(side * longer / shorter)
    resized = resized.resize((side, longer) if width <= height else (longer, side), Image.Resampling.BICUBIC)
    left, top = (margin(spare / 2) for spare in (resized.width - side, resized.height - side))
    return np.asarray(resized.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rounding", "margin"), [("floor", int), ("even", round)])
def test_pixels_match_the_published_pipeline(size, rounding, margin):
    """transformers rounds half a margin down, torchvision (OpenAI's code, OpenCLIP) to even."""
    image = photograph(*size)
    how = Preprocessing("bicubic", "shortest", SIDE, SIDE, rounding)
    np.testing.assert_array_equal(preprocess(image, how, SIDE), published(image, SIDE, margin))


def test_odd_margins_are_rounded_differently():
    image = photograph(32, 39)  # a margin of 7
    cuts = [preprocess(image, Preprocessing("bicubic", crop_rounding=name), SIDE) for name in ("floor", "even")]
    np.testing.assert_array_equal(cuts[0], image[:, 3:35])
    np.testing.assert_array_equal(cuts[1], image[:, 4:36])


def test_area_interpolation_matches_the_data_package():
    image = photograph(57, 93)
    np.testing.assert_array_equal(preprocess(image, Preprocessing(), SIDE), crop(fit(image, SIDE), SIDE))
    np.testing.assert_array_equal(preprocess(image, Preprocessing(size=20), SIDE), crop(fit(image, 20), 20))


def test_a_larger_size_is_cropped_and_an_exact_one_is_squashed():
    image = photograph(57, 93)
    enlarged = np.asarray(Image.fromarray(image).resize((65, 40), Image.Resampling.BILINEAR))
    how = Preprocessing("bilinear", size=40, crop=SIDE)
    np.testing.assert_array_equal(preprocess(image, how, SIDE), enlarged[4:36, 16:48])
    squashed = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(preprocess(image, Preprocessing("lanczos", "exact"), SIDE), squashed)
    assert preprocess(image, Preprocessing(resize="exact"), SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"resample": "cubic"}, "preprocessing.resample"),
        ({"resize": "longest"}, "preprocessing.resize"),
        ({"crop_rounding": "up"}, "preprocessing.crop_rounding"),
        ({"size": 0}, "preprocessing.size"),
        ({"size": 8, "crop": 9}, "preprocessing.crop"),
        ({"crop": 9}, "preprocessing.crop"),
    ],
)
def test_an_unknown_preprocessing_is_rejected(fields, named):
    with pytest.raises(UserError, check=mentions(named, *fields.values())):
        Preprocessing(**fields)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of one JPEG, much larger than the resolution of the source, and its caption."""
    image = photograph(600, 907)
    Image.fromarray(image).save(tmp_path / "0.jpg", quality=95)
    (tmp_path / "0.txt").write_text("noise")
    return tmp_path


def test_a_source_preprocesses_images_as_clip_does(folder):
    """The JPEG is decoded at full size, not at a fraction of it as for training."""
    source = data.FolderSource(str(folder), "train", SIDE)
    full = np.asarray(Image.open(folder / "0.jpg").convert("RGB"))
    how = Preprocessing("bicubic", size=SIDE, crop=SIDE, crop_rounding="even")
    own = source.preprocessed(how)
    # cv2 and Pillow decode a JPEG to within two levels of each other
    assert np.abs(data.example(own, 0)["image"].astype(int) - published(full, SIDE, round)).max() <= 2
    assert np.abs(data.example(source, 0)["image"].astype(int) - published(full, SIDE, round)).max() > 2
    np.testing.assert_array_equal(sample(own, 0, 0)["image"], data.example(own, 0)["image"])
    assert source.preprocessing == Preprocessing() and own.preprocessing == how


def test_a_source_of_another_resolution_uses_the_same_interpolation(folder):
    source = data.FolderSource(str(folder), "train", 20)
    how = Preprocessing("bicubic", size=40, crop=SIDE)
    own = data.MixtureSource({"a": (source, 1.0)}).preprocessed(how)
    assert own.parts["a"].preprocessing == dataclasses.replace(how, size=None, crop=None)
    assert data.example(own, 0)["image"].shape == (20, 20, 3)
    assert data.example(data.ShapesSource("train", 20).preprocessed(how), 0)["image"].shape == (20, 20, 3)
