import pickle

import numpy as np
import pytest
from raised import mentions
from streams import sample

from dalle2_jax.data import example
from dalle2_jax.data.synthetic import grammar, scenes, shapes
from dalle2_jax.data.synthetic.polygons import EXTENT
from dalle2_jax.data.synthetic.shapes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    ShapesSource,
    radius_of,
)
from dalle2_jax.errors import UserError


def _pairs(split):
    source = ShapesSource(split, 8, max_objects=2)
    return {(thing.colour, thing.shape) for index in range(1500) for thing in source.scene(index).objects}


def test_a_scene_depends_only_on_split_seed_and_index():
    source = ShapesSource("train", 32, max_objects=2, num_examples=50)
    again = ShapesSource("train", 32, max_objects=2, num_examples=60)
    assert [source.scene(i) for i in (7, 3)] == [again.scene(i) for i in (7, 3)]
    np.testing.assert_array_equal(example(source, 5)["image"], example(again, 5)["image"])
    assert source.scene(-1) == source.scene(49)
    assert source.caption(-1) == source.caption(49)
    others = [ShapesSource("val", 32, max_objects=2), ShapesSource("train", 32, seed=1, max_objects=2)]
    for other in others:
        assert [source.scene(i) for i in range(5)] != [other.scene(i) for i in range(5)]


def test_scenes_do_not_depend_on_resolution():
    scenes = [ShapesSource("train", side, max_objects=2).scene(11) for side in (8, 32, 100)]
    assert scenes[0] == scenes[1] == scenes[2]


def test_splits_hold_out_attribute_pairs():
    every = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert _pairs("train") == _pairs("val") == every - HELD_OUT
    assert _pairs("compositional") == HELD_OUT
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


@pytest.mark.parametrize("factor", [2, 4])
def test_an_averaged_image_matches_the_smaller_image(factor):
    large, small = (ShapesSource("train", side, max_objects=2) for side in (32 * factor, 32))
    for index in range(40):
        averaged = example(large, index)["image"].astype(float).reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
        assert np.abs(averaged - example(small, index)["image"]).max() <= 1.0  # both are rounded to uint8


def test_images_show_pure_colours_inside_and_background_at_the_edge():
    source = ShapesSource("train", 64, max_objects=2)
    for index in range(100):
        scene, image = source.scene(index), example(source, index)["image"]
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edge == shapes.BACKGROUNDS[scene.background]).all()
        for thing in scene.objects:
            assert tuple(image[int(thing.y * 64), int(thing.x * 64)]) == COLOURS[thing.colour]


def test_two_objects_do_not_overlap_in_any_relation():
    source = ShapesSource("train", 64, max_objects=2)
    scenes = [scene for scene in map(source.scene, range(600)) if len(scene.objects) == 2]
    assert 240 < len(scenes) < 360
    relations = [scene.relation for scene in scenes]
    for relation in grammar.RELATION_WORDS:
        assert 0.17 < relations.count(relation) / len(relations) < 0.33
    for scene in scenes:
        first, second = scene.objects
        distance, across = sorted([abs(first.x - second.x), abs(first.y - second.y)], reverse=True)
        assert distance - EXTENT * (SIZES[first.size] + SIZES[second.size]) > 0.04
        assert across <= 0.52 * distance


def test_the_relation_is_the_position_of_the_first_object():
    def place(x, y):
        return scenes.SceneObject("circle", "red", "small", x, y)

    assert scenes.relation_of(place(0.2, 0.5), place(0.8, 0.6)) == "left"
    assert scenes.relation_of(place(0.8, 0.5), place(0.2, 0.6)) == "right"
    assert scenes.relation_of(place(0.5, 0.1), place(0.6, 0.9)) == "above"
    assert scenes.relation_of(place(0.5, 0.9), place(0.6, 0.1)) == "below"


def test_the_source_samples_and_lists_captions():
    source = pickle.loads(pickle.dumps(ShapesSource("val", 16, num_examples=30)))
    found = example(source, 4)
    assert len(source) == 30
    assert found["image"].shape == (16, 16, 3) and found["image"].dtype == np.uint8
    assert found["caption"] in found["captions"]
    random = sample(source, 4, 0)
    image, caption = random["image"], random["caption"]
    np.testing.assert_array_equal(image, found["image"])
    assert caption in found["captions"]
    assert len(list(source.captions(1000))) == 30 and len(list(source.captions(3))) == 3
    assert len(repr(source)) < 100
    with pytest.raises(IndexError):
        source.fetch([30])


@pytest.mark.parametrize(
    ("wrong", "facts"),
    [
        ({"split": "test"}, ["'test'", "train"]),
        ({"max_objects": 3}, ["max_objects=3"]),
        ({"resolution": 4}, ["resolution 4", 8]),
        ({"num_examples": 0}, ["num_examples", 1, 0]),
        ({"seed": -1}, ["seed", -1]),
    ],
)
def test_invalid_arguments_raise_user_errors(wrong, facts):
    with pytest.raises(UserError, check=mentions("shapes", *facts)):
        ShapesSource(**{"split": "train", "resolution": 64} | wrong)


def test_jitter_bounds_the_position_of_a_single_object():
    for jitter in (0.0, 0.05):
        source = ShapesSource("train", 8, jitter=jitter, num_examples=50)
        away = [max(abs(thing.x - 0.5), abs(thing.y - 0.5)) for i in range(50) for thing in source.scene(i).objects]
        assert jitter / 2 <= max(away) <= jitter + 1 / 512
    crowded = ShapesSource("train", 8, num_examples=200)
    for scene in map(crowded.scene, range(200)):
        reach = EXTENT * radius_of(scene.objects[0].size, 1)
        assert all(reach < place < 1 - reach for place in (scene.objects[0].x, scene.objects[0].y))
    with pytest.raises(UserError, check=mentions("shapes", "jitter=0.3", 0.2)):
        ShapesSource("train", 8, jitter=0.3)
