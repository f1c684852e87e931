import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from raised import mentions
from streams import sample

from dalle2_jax.data import example
from dalle2_jax.data.synthetic import grammar, scenes, shapes
from dalle2_jax.data.synthetic.polygons import EXTENT
from dalle2_jax.data.synthetic.shapes import (
    COLOURS,
    HELD_OUT_LOOKS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    ShapesSource,
    radius_of,
)
from dalle2_jax.errors import UserError


def _looks(split):
    source = ShapesSource(split, 8)
    return {thing.look for index in range(1500) for thing in source.scene(index).objects}


def test_a_scene_depends_only_on_split_seed_and_index():
    source = ShapesSource("train", 32, num_examples=50)
    again = ShapesSource("train", 32, num_examples=60)
    assert [source.scene(i) for i in (7, 3)] == [again.scene(i) for i in (7, 3)]
    np.testing.assert_array_equal(example(source, 5)["image"], example(again, 5)["image"])
    assert source.scene(-1) == source.scene(49)
    assert source.caption(-1) == source.caption(49)
    others = [ShapesSource("val", 32), ShapesSource("train", 32, seed=1)]
    for other in others:
        assert [source.scene(i) for i in range(5)] != [other.scene(i) for i in range(5)]


def test_scenes_do_not_depend_on_resolution():
    scenes = [ShapesSource("train", side).scene(11) for side in (8, 32, 100)]
    assert scenes[0] == scenes[1] == scenes[2]


def test_splits_hold_out_pairs_and_looks():
    every = {(colour, shape, size) for colour in COLOURS for shape in SHAPES for size in SIZES}
    compositional = {look for look in every if look[:2] in HELD_OUT_PAIRS}
    assert _looks("compositional") == compositional
    assert _looks("val") == HELD_OUT_LOOKS
    assert _looks("train") == every - compositional - HELD_OUT_LOOKS
    for held_out in (compositional, HELD_OUT_LOOKS):
        for place, values in enumerate((COLOURS, SHAPES, SIZES)):
            assert {look[place] for look in held_out} == set(values)
    assert {look[:2] for look in HELD_OUT_LOOKS} <= {look[:2] for look in _looks("train")}  # in the other size


def test_no_caption_of_val_occurs_in_train_but_all_of_its_words():
    train, val = (ShapesSource(split, 8, num_examples=3000) for split in ("train", "val"))
    known, held_out = set(train.captions(3000)), set(val.captions(3000))
    assert len(held_out) > 1500 and not known & held_out
    assert {word for text in held_out for word in text.split()} <= {word for text in known for word in text.split()}
    for index in range(50):
        scene = val.scene(index)
        assert not {*grammar.captions(scene)} & {*grammar.captions(scene, held_out=True)}
        assert sample(val, index, 0)["caption"] in grammar.captions(scene, held_out=True)
        assert example(val, index)["captions"] == grammar.captions(scene, held_out=True)


@pytest.mark.parametrize("factor", [2, 4])
def test_an_averaged_image_matches_the_smaller_image(factor):
    large, small = (ShapesSource("train", side) for side in (32 * factor, 32))
    for index in range(40):
        averaged = example(large, index)["image"].astype(float).reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
        assert np.abs(averaged - example(small, index)["image"]).max() <= 1.0  # both are rounded to uint8


def test_images_show_pure_colours_inside_and_background_at_the_edge():
    source = ShapesSource("train", 64)
    for index in range(100):
        scene, image = source.scene(index), example(source, index)["image"]
        edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edge == shapes.BACKGROUNDS[scene.background]).all()
        for thing in scene.objects:
            assert tuple(image[int(thing.y * 64), int(thing.x * 64)]) == COLOURS[thing.colour]


def test_two_objects_do_not_overlap_in_any_relation():
    source = ShapesSource("train", 64)
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
    assert len(repr(source)) < 120
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
        ({"unnamed_colours": 1.5}, ["unnamed_colours", 1.5]),
        ({"hard_negatives": True, "max_objects": 1}, ["hard_negatives", "max_objects=1"]),
        ({"hard_negatives": True, "num_examples": 6}, ["hard_negatives", "num_examples=6", 4]),
    ],
)
def test_invalid_arguments_raise_user_errors(wrong, facts):
    with pytest.raises(UserError, check=mentions("shapes", *facts)):
        ShapesSource(**{"split": "train", "resolution": 64} | wrong)


def test_colours_without_a_name_are_rendered_and_left_out_of_captions():
    plain, mixed = ShapesSource("train", 64), ShapesSource("train", 64, unnamed_colours=0.3)
    unnamed = 0
    for index in range(300):
        scene, text, own = mixed.scene(index), mixed.caption(index), plain.scene(index)
        if scene == own:
            assert text == plain.caption(index)
            continue
        unnamed += 1
        assert scene.background == own.background
        assert [replace(thing, colour="red") for thing in scene.objects] == [
            replace(thing, colour="red") for thing in own.objects
        ]
        assert not {*COLOURS} & {*text.replace(",", " ").split()}
        assert all(thing.shape in text for thing in scene.objects)
        image = example(mixed, index)["image"]
        for thing in scene.objects:
            seen = image[int(thing.y * 64), int(thing.x * 64)]
            assert "#" + bytes(seen).hex() == thing.colour
            assert np.linalg.norm(seen - np.array(shapes.BACKGROUNDS[scene.background])) > 100
    assert 60 < unnamed < 120
    for split in ("val", "compositional"):
        assert ShapesSource(split, 8, unnamed_colours=1.0).scene(3) == ShapesSource(split, 8).scene(3)


def things(scene, *fields):
    return [tuple(getattr(thing, field) for field in fields) for thing in scene.objects]


def test_hard_negatives_come_in_fours_that_differ_in_what_belongs_to_what():
    source, plain = ShapesSource("train", 32, hard_negatives=True), ShapesSource("train", 32)
    whole = 0
    for first in range(0, 400, 4):
        scene, mirrored, *exchanged = map(source.scene, range(first, first + 4))
        assert scene == plain.scene(first)
        if len(scene.objects) == 1:
            assert [mirrored, *exchanged] == [*map(plain.scene, range(first + 1, first + 4))]
            continue
        looks = ("colour", "shape", "size")
        assert things(mirrored, *looks) == things(scene, *looks)
        assert mirrored.relation == grammar.CONVERSE[scene.relation]
        if things(exchanged[0], "x", "y") != things(scene, "x", "y"):
            continue  # another scene: the colours and shapes of this one cannot be exchanged
        whole += 1
        assert exchanged[0] != scene
        assert [things(exchanged[1], *looks), exchanged[1].relation] == [
            things(exchanged[0], *looks),
            mirrored.relation,
        ]
        for field in looks:
            assert sorted(things(exchanged[0], field)) == sorted(things(scene, field))
        assert not shapes.HELD_OUT_LOOKS & {*things(exchanged[0], *looks)}
        assert not shapes.HELD_OUT_PAIRS & {*things(exchanged[0], "colour", "shape")}
    assert whole > 20


def test_hard_negatives_are_read_together():
    order = ShapesSource("train", 32, num_examples=40, hard_negatives=True).order(3)
    passes = np.array([[order[place] for place in range(40 * n, 40 * n + 40)] for n in range(3)])
    assert (np.sort(passes) == np.arange(40)).all() and (passes[0] != passes[1]).any()
    fours = passes.reshape(-1, 4)
    assert (fours == fours[:, :1] + np.arange(4)).all() and (fours[:, 0] % 4 == 0).all()
    for split in ("val", "compositional"):
        source = ShapesSource(split, 32, hard_negatives=True)
        assert source.scene(5) == ShapesSource(split, 32).scene(5)
        assert [source.order(0)[i] for i in range(8)] == [ShapesSource(split, 32).order(0)[i] for i in range(8)]


def test_jitter_bounds_the_position_of_a_single_object():
    for jitter in (0.0, 0.05):
        source = ShapesSource("train", 8, max_objects=1, jitter=jitter, num_examples=50)
        away = [max(abs(thing.x - 0.5), abs(thing.y - 0.5)) for i in range(50) for thing in source.scene(i).objects]
        assert jitter / 2 <= max(away) <= jitter + 1 / 512
    crowded = ShapesSource("train", 8, max_objects=1, num_examples=200)
    for scene in map(crowded.scene, range(200)):
        reach = EXTENT * radius_of(scene.objects[0].size, 1)
        assert all(reach < place < 1 - reach for place in (scene.objects[0].x, scene.objects[0].y))
    with pytest.raises(UserError, check=mentions("shapes", "jitter=0.3", 0.2)):
        ShapesSource("train", 8, jitter=0.3)


def test_jitter_bounds_the_position_of_two_objects():
    """Two objects of the same sizes and relation are where they are without jitter, to about the jitter."""

    def places(jitter):
        source = ShapesSource("train", 8, jitter=jitter, num_examples=400)
        found = {}
        for scene in map(source.scene, range(400)):
            if len(scene.objects) == 2:
                key = (scene.relation, *(thing.size for thing in scene.objects))
                found.setdefault(key, []).append([(thing.x, thing.y) for thing in scene.objects])
        return {key: np.array(values) for key, values in found.items()}

    still = places(0.0)
    assert len(still) == 4 * 4
    for key, values in still.items():
        assert np.ptp(values, axis=0).max() == 0, key
        moved = np.abs(places(0.05)[key] - values[:1])
        assert 0.01 < moved.max() <= 0.1, key


def test_contrasts_are_captions_of_other_scenes_in_the_same_words():
    source = ShapesSource("val", 32, num_examples=200)
    for index in range(200):
        scene, contrasts = source.scene(index), source.contrasts(index)
        looks = [thing.look for thing in scene.objects]
        own = {"caption": source.caption(index), **contrasts}
        assert len({*own.values()}) == len(own) and not {*contrasts.values()} & {*grammar.captions(scene, True)}
        if len({*looks}) == 1:
            assert not contrasts
            continue
        differing = {
            name
            for name, pair in zip(("colour", "shape", "size"), zip(*looks, strict=True), strict=True)
            if len({*pair}) == 2
        }
        assert contrasts.keys() == {*differing, "place"}
        if "shape" in differing:
            texts = (source.caption(index), contrasts["shape"])
            words, exchanged = (re.findall("|".join(SHAPES), text) for text in texts)
            assert words == exchanged[::-1]
