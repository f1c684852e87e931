"""Concepts and styles of emoji: which real image is nearest to a sample."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from evaluated_system import pixel_distance
from raised import mentions

from dalle2_jax import data
from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.measures import captions
from dalle2_jax.evaluation.options import Options

CONCEPTS, STYLES, SIDE = [f"concept {number}" for number in range(12)], ("noto", "twemoji"), 32


def images():
    """An image for each concept and style: the concept is its pattern, the style its frame."""
    noise = np.random.default_rng(0)
    patterns = noise.integers(0, 256, (len(CONCEPTS), 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    for concept, pattern in zip(CONCEPTS, patterns, strict=True):
        for style, level in zip(STYLES, (0, 255), strict=True):
            image = pattern.astype(np.uint8)
            image[:6] = image[-6:] = level
            yield concept, style, image


@pytest.fixture
def folder(tmp_path):
    """All images but those of the first three concepts in the first style, which are the split ``val``."""
    lines = {"train": [], "val": []}
    for number, (concept, style, image) in enumerate(images()):
        split = "val" if style == STYLES[0] and concept in CONCEPTS[:3] else "train"
        (tmp_path / split).mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / split / f"{number}.png"), image[..., ::-1])
        fields = {"concept": concept, "style": style}
        lines[split].append(json.dumps({"file_name": f"{number}.png", "text": f"{concept}, {style} emoji", **fields}))
    for split, each in lines.items():
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(each))
    return tmp_path


def measure(folder, generate, num=3, lpips=None):
    """The figures of generated images, given the source and the number of images."""
    source = data.FolderSource(folder, "val", SIDE)
    train = data.FolderSource(folder, "train", SIDE)
    context = SimpleNamespace(
        source=source,
        split="val",
        size=SIDE,
        options=Options(),
        lpips=lpips,
        open=lambda stage, split, size: train,
        indices=lambda num: [*range(num)],
        samples=lambda num: SimpleNamespace(images=lambda num: generate(source, num)),
    )
    captions.check_emoji(context, num)
    return captions.emoji(context, num)


def real(source, num):
    return source.fetch(range(num))["image"]


@pytest.mark.parametrize("lpips", [None, pixel_distance()], ids=["pixels", "lpips"])
def test_real_images_are_found(folder, lpips):
    figures = measure(folder, real, lpips=lpips)
    assert {figures[name].value for name in ("top_1", "top_10", "style", "exact")} == {1.0}
    assert figures["exact"].baseline.value == 0
    assert figures["top_1"].n == 3 and figures["top_1"].baseline.value == 0  # no caption is its own in the shuffle


def test_the_other_style_is_the_wrong_style(folder):
    def swapped(source, num):
        return np.stack([image for concept, style, image in images() if style == STYLES[1]][:num])

    figures = measure(folder, swapped)
    assert figures["style"].value == figures["exact"].value == 0
    assert figures["wrong_style_top_1"].value == figures["top_1"].value and figures["wrong_style_top_1"].n == 3


def test_noise_is_nothing(folder):
    noise = np.random.default_rng(1)
    figures = measure(folder, lambda source, num: noise.integers(0, 256, (num, SIDE, SIDE, 3), np.uint8))
    assert figures["top_1"].value < 1


def test_data_without_concepts_are_rejected(folder):
    for split in ("train", "val"):
        path = folder / split / "metadata.jsonl"
        path.write_text(path.read_text().replace('"concept"', '"name"'))
    with pytest.raises(DataError, check=mentions("'concept'")):
        measure(folder, real)
