import cv2
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.data.synthetic import digits
from dalle2_jax.evaluation.digits import digit_accuracy, train_digit_reader


@pytest.fixture(scope="module")
def reader():
    return train_digit_reader()


def test_reads_real_scans(reader):
    assert reader.val_accuracy > 0.97
    val = digits.load("val")
    measured = digit_accuracy(val.images, val.labels.tolist(), reader)
    assert measured["accuracy"] == measured["real_val"] == reader.val_accuracy
    assert measured["shuffled"] < 0.2
    assert measured["n"] == dict.fromkeys(("accuracy", "shuffled", "real_val"), len(val.labels))
    assert digit_accuracy(val.images, val.labels.tolist()) == measured


def test_reads_other_sizes_and_not_noise(reader):
    val = digits.load("val")
    grown = np.stack([cv2.resize(image, (64, 64), interpolation=cv2.INTER_CUBIC) for image in val.images])
    assert digit_accuracy(grown, val.labels.tolist(), reader)["accuracy"] > 0.95
    noise = np.random.default_rng(0).integers(0, 256, val.images.shape, dtype=np.uint8)
    assert digit_accuracy(noise, val.labels.tolist(), reader)["accuracy"] < 0.25


def test_lengths_must_agree(reader):
    with pytest.raises(ValueError, check=mentions("2 images", "3 labels")):
        digit_accuracy(np.zeros((2, 32, 32, 3), np.uint8), [0, 1, 2], reader)
