import numpy as np
import pytest

from dalle2_jax.data import ShapesSource, example
from dalle2_jax.data.synthetic.scene_reader import ATTRIBUTES
from dalle2_jax.evaluation.attributes import attribute_accuracy


def _examples(count, max_objects):
    source = ShapesSource("train", 64, max_objects=max_objects)
    images = np.stack([example(source, index)["image"] for index in range(count)])
    return images, [source.scene(index) for index in range(count)], [source.caption(index) for index in range(count)]


def test_rendered_images_score_one_and_shuffled_captions_chance():
    images, scenes, captions = _examples(200, 2)
    measured = attribute_accuracy(images, scenes, captions)
    assert measured["matched"] == dict.fromkeys([*ATTRIBUTES, "one_object", "two_objects"], 1.0)
    assert measured["n"].keys() == measured["matched"].keys() and measured["n"]["all"] == 200
    assert measured["n"]["one_object"] + measured["n"]["two_objects"] == 200
    assert measured["n"]["two_objects"] == measured["n"]["relation"]
    assert 0 < measured["n"]["relation"] < 200 and 0 < measured["n"]["background"] < 200  # where the caption names it
    shuffled = measured["shuffled"]
    assert shuffled.keys() == measured["matched"].keys()
    assert shuffled["all"] < 0.03 and shuffled["colour"] < 0.2 and 0.3 < shuffled["count"] < 0.7
    assert attribute_accuracy(images, scenes, captions) == measured
    assert attribute_accuracy(images, scenes, captions, seed=1)["shuffled"] != shuffled


def test_one_object_has_no_relation_and_chance_rates():
    images, scenes, _ = _examples(300, 1)
    measured = attribute_accuracy(images, scenes)
    assert not {"relation", "two_objects"} & measured["matched"].keys()
    assert measured["n"] == dict.fromkeys(measured["matched"], 300)
    assert measured["shuffled"]["colour"] == pytest.approx(1 / 8, abs=0.06)
    assert measured["shuffled"]["shape"] == pytest.approx(1 / 5, abs=0.07)
    assert measured["shuffled"]["background"] == pytest.approx(1 / 3, abs=0.09)


def test_half_wrong_images_score_half():
    images, scenes, captions = _examples(20, 1)
    images[10:] = images[:10]
    assert 0.5 <= attribute_accuracy(images, scenes, captions)["matched"]["all"] <= 0.6


def test_no_image_keeps_its_caption_in_the_shuffle():
    images, scenes, _ = _examples(2, 1)
    assert scenes[0].attributes != scenes[1].attributes
    for seed in range(4):
        assert attribute_accuracy(images, scenes, seed=seed)["shuffled"]["all"] == 0


def test_lengths_must_agree():
    images, scenes, captions = _examples(2, 1)
    for wrong in [(images[:1], scenes, captions), (images, scenes, captions[:1]), (images[:0], [], [])]:
        with pytest.raises(ValueError, match="images"):
            attribute_accuracy(*wrong)
