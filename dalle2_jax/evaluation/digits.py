"""Which digit an image shows, as read by a support vector classifier trained on real scans."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from sklearn.svm import SVC

from dalle2_jax.data.synthetic import digits

_SIDE = 16


@dataclass(frozen=True)
class DigitReader:
    """A trained classifier, and its accuracy on ``val_count`` real scans of split val, an upper bound."""

    classifier: SVC
    val_accuracy: float
    val_count: int

    def read(self, images: UInt8[np.ndarray, "B H W 3"]) -> Int[np.ndarray, "B"]:
        """Returns the digit in each image; the side of images is at least 8."""
        return self.classifier.predict(_features(images))


def train_digit_reader() -> DigitReader:
    """Trains a classifier (radial kernel, C = 10) on the real ``train`` scans; deterministic, under a second."""
    train, val = digits.load("train"), digits.load("val")
    classifier = SVC(C=10.0).fit(_features(train.images), train.labels)
    return DigitReader(classifier, float(classifier.score(_features(val.images), val.labels)), len(val.labels))


def digit_accuracy(
    images: UInt8[np.ndarray, "B H W 3"],
    labels: Sequence[int] | np.ndarray,
    reader: DigitReader | None = None,
    seed: int = 0,
) -> dict[str, float | dict[str, int]]:
    """Measures how many images show the digit of their caption.

    Args:
        images: uint8[B, H, W, 3], ``labels`` the digit that each should show.
        reader: None trains one.
        seed: of the shuffle.

    Returns:
        ``accuracy``, ``shuffled`` (against the digits of other images; near 0.1 for evenly distributed digits), and
        ``real_val``, the classifier's own accuracy on real scans; and ``n``, the number of images of each.

    Raises:
        ValueError: the lengths differ, or there are no images.
    """
    if not len(images) == len(labels) > 0:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    reader = reader or train_digit_reader()
    read = reader.read(images)
    shown = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(shown)
    return {
        "accuracy": float(np.mean(read == shown)),
        "shuffled": float(np.mean(read == shuffled)),
        "real_val": reader.val_accuracy,
        "n": {"accuracy": len(labels), "shuffled": len(labels), "real_val": reader.val_count},
    }


def _features(images: np.ndarray) -> Float[np.ndarray, "B 256"]:
    """Gray levels in [0, 1] at 16x16."""
    size = (_SIDE, _SIDE)
    gray = [cv2.resize(image.mean(axis=2) / 255, size, interpolation=cv2.INTER_AREA) for image in images]
    return np.stack(gray).reshape(len(images), -1)
