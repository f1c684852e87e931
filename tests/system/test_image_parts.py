"""Parts of images: inpainting of any shape, outpainting by windows, and a word pasted on an image."""

import dataclasses

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.system.editing.inpainting import Margins, windows
from dalle2_jax.system.editing.typography import probabilities, with_word

DECODER = {"decoder": {"steps": 2}, "upsampler_1": {"steps": 2}}


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (16, 8), (4, 16)])
def test_inpainting_keeps_shape_and_pixels(system, shape):
    """An image whose longer side is that of the result has the same pixels there, bit for bit."""
    image, mask = noise(*shape), np.zeros(shape, bool)
    mask[: shape[0] // 2] = True
    [result] = system.inpaint(image, mask, num=1, **DECODER).numpy
    assert result.shape == image.shape
    np.testing.assert_array_equal(result[~mask], image[~mask])
    assert (result[mask] != image[mask]).any()


def test_inpainting_of_a_large_image(system):
    assert system.inpaint(noise(48, 96), np.tile(np.arange(96) < 40, (48, 1)), num=1, **DECODER).numpy.shape[1:3] == (
        8,
        16,
    )


@pytest.mark.parametrize("margins", [(3, 0, 0, 0), (5, 20, 0, 9), (0, 0, 40, 1), (17, 16, 15, 33)])
@pytest.mark.parametrize("inner", [(16, 16), (16, 37), (23, 16)])
def test_windows_cover_the_margins_from_the_inside_out(margins, inner):
    side = 16
    margins = Margins(*margins)
    shape = inner[0] + margins.top + margins.bottom, inner[1] + margins.left + margins.right
    known = np.zeros(shape, bool)
    known[margins.top : margins.top + inner[0], margins.left : margins.left + inner[1]] = True
    for top, left in windows(shape, margins, side):
        assert 0 <= top <= shape[0] - side and 0 <= left <= shape[1] - side
        window = known[top : top + side, left : left + side]
        assert window.mean() >= 0.5
        window[:] = True
    assert known.all()


def test_outpainting(system):
    """The image is inside, its pixels are unchanged, and samples differ."""
    image = noise(16, 16)
    result = system.outpaint(image, margins=(5, 0, 0, 3), num=2, **DECODER)
    assert result.numpy.shape == (2, 19, 21, 3) and result.provenance["margins"] == [5, 0, 0, 3]
    np.testing.assert_array_equal(result.numpy[:, :16, 5:], np.stack([image, image]))
    assert (result.numpy[0] != result.numpy[1]).any()
    again = system.outpaint(image, margins=(5, 0, 0, 3), num=1, **DECODER)
    np.testing.assert_array_equal(again.numpy[0], result.numpy[0])
    prompted = system.outpaint(image, "a red circle", margins=(5, 0, 0, 0), num=1, prior={"steps": 2}, **DECODER)
    assert "prior" in prompted.provenance["checkpoints"] and prompted.numpy.shape == (1, 16, 21, 3)


@pytest.mark.parametrize(
    ("margins", "field"),
    [((0, 0, 0, 0), "margins"), ((1, 2, 3), "margins"), ((-1, 0, 0, 0), "left"), ((0, 0, 1e9, 0), "top")],
)
def test_margins_that_are_rejected(system, margins, field):
    with pytest.raises(ConfigError, check=mentions(field=field)):
        system.outpaint(noise(16, 16), margins=margins)


def test_a_canvas_that_is_too_large(system):
    with pytest.raises(UsageError, check=mentions("margins")):
        system.outpaint(noise(16, 16), margins=(8192, 8192, 8192, 8192))


def test_the_probe_shows_both_images(system):
    image, labels = noise(20, 24), ["an apple", "a pipe", "an ipod"]
    small = dataclasses.replace(system, stages={k: v for k, v in system.stages.items() if k != "upsampler_1"})
    result = small.typographic_probe(image, "ipod", labels, num=2, decoder={"steps": 2})
    assert len(result) == 6 and result.columns == 3
    given = [about for about in result.provenance["pictures"] if about["sample"] == 0]
    for about in given:
        assert about["probabilities"].keys() == {*labels}
        np.testing.assert_allclose(sum(about["probabilities"].values()), 1, rtol=1e-6)
    assert given[0]["probabilities"] != given[1]["probabilities"]
    assert (result.numpy[0] != result.numpy[3]).any() and (result.numpy[1] != result.numpy[2]).any()
    assert result.captions[1] == "variation 1" and result.captions[0].count("%") == 3
    for word, several in (
        ("", labels),
        ("x" * 101, labels),
        ("a\nb", labels),
        ("ipod", ["an apple"]),
        ("ipod", "apple"),
    ):
        with pytest.raises(UsageError):
            small.typographic_probe(image, word, several)


@pytest.mark.parametrize("word", ["i", "ipod", "a long word of many letters"])
def test_a_pasted_word_is_inside_and_centred(word):
    grey = np.full((60, 80, 3), 128, np.uint8)
    changed = (with_word(grey, word, 0.9) != grey).any(axis=2)
    rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
    assert changed.any() and columns[-1] - columns[0] <= 0.9 * 80 + 2 and rows[-1] - rows[0] <= 40
    assert abs(columns[0] + columns[-1] - 79) <= 2 and abs(rows[0] + rows[-1] - 59) <= 2


def test_zero_shot_probabilities():
    emb, labels = np.array([[2.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    np.testing.assert_allclose(probabilities(emb, labels, np.log(2)), [[np.e**2 / (1 + np.e**2), 1 / (1 + np.e**2)]])
