from dataclasses import replace

import cv2
import numpy as np
import pytest

from dalle2_jax.data import example
from dalle2_jax.data.synthetic.polygons import CENTROIDS
from dalle2_jax.data.synthetic.scene_reader import UNKNOWN, matches, read_scene
from dalle2_jax.data.synthetic.scenes import Scene, SceneObject
from dalle2_jax.data.synthetic.shapes import ShapesSource, radius_of, render


def _accuracy(side, count, spoil=lambda levels: levels, split="val"):
    source = ShapesSource(split, side)
    hits = []
    for index in range(count):
        scene = source.scene(index)
        pixels = np.rint(spoil(render(scene, side).astype(np.float32)).clip(0, 255)).astype(np.uint8)
        hits.append(matches(read_scene(pixels), scene)["all"])
    return np.mean(hits)


def _noise(sigma):
    rng = np.random.default_rng(0)
    return lambda levels: levels + 255 * sigma * rng.standard_normal(levels.shape)


@pytest.mark.parametrize("split", ["val", "compositional"])
def test_the_reader_reads_clean_images(split):
    assert _accuracy(64, 300, split=split) >= 0.995


def test_the_reader_reads_noisy_images():
    assert _accuracy(64, 300, _noise(0.05)) >= 0.98


@pytest.mark.parametrize(("side", "minimum"), [(32, 0.995), (48, 0.995), (256, 0.995)])
def test_the_reader_reads_other_sizes(side, minimum):
    assert _accuracy(side, 100, _noise(0.02)) >= minimum


def test_the_reader_reads_blurred_and_rescaled_images():
    assert _accuracy(64, 100, lambda levels: cv2.GaussianBlur(levels, (0, 0), 1.0)) >= 0.99
    grow = np.float32([[1.12, 0, -0.12 * 32], [0, 1.12, -0.12 * 32]])
    grown = lambda levels: cv2.warpAffine(levels, grow, (64, 64), borderMode=cv2.BORDER_REPLICATE)  # noqa: E731
    assert _accuracy(64, 100, grown) >= 0.97


def test_positions_are_read():
    source = ShapesSource("val", 64, max_objects=1)
    for index in range(30):
        (seen,), (expected,) = read_scene(example(source, index)["image"]).objects, source.scene(index).objects
        lower = CENTROIDS[expected.shape][1] * radius_of(expected.size, 1)  # a triangle's centroid is below its centre
        assert abs(seen.x - expected.x) < 0.02 and abs(seen.y - expected.y - lower) < 0.02


def test_the_reader_finds_nothing_in_an_empty_image_and_no_shape_in_a_blob():
    assert read_scene(np.full((64, 64, 3), 255, np.uint8)) == Scene((), "white")
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[30:34, 6:58] = (220, 25, 35)
    (thing,) = read_scene(bar).objects
    assert (thing.shape, thing.colour) == (UNKNOWN, "red")
    brown = render(Scene((_thing(),), "white"), 64)
    brown[(brown != 255).any(axis=2)] = (110, 70, 90)
    assert read_scene(brown).objects[0].colour == UNKNOWN


def test_counts_three_objects_and_ignores_specks():
    places = ((0.2, 0.2), (0.8, 0.2), (0.5, 0.8))
    pixels = render(Scene(tuple(_thing(x=x, y=y) for x, y in places), "gray"), 64)
    pixels[32:34, 2:4] = 255
    assert len(read_scene(pixels).objects) == 3


def _thing(shape="star", colour="blue", size="small", x=0.3, y=0.5):
    return SceneObject(shape, colour, size, x, y)


ONE = Scene((_thing(),), "white")
TWO = Scene((_thing(), _thing("circle", "pink", "large", x=0.7)), "black")


def _changed(scene, index, **change):
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **change)
    return replace(scene, objects=tuple(objects))


@pytest.mark.parametrize("scene", [ONE, TWO])
@pytest.mark.parametrize("wrong", ["colour", "shape", "size"])
def test_each_attribute_is_compared_separately(scene, wrong):
    value = {"colour": "green", "shape": "cross", "size": "large"}[wrong]
    judged = matches(_changed(scene, 0, **{wrong: value}), scene)
    assert [name for name, held in judged.items() if not held] == [wrong, "all"]


def test_a_colour_without_a_name_agrees_with_every_colour():
    unnamed, other = (_changed(ONE, 0, colour=colour) for colour in ("#a1b2c3", "#112233"))
    assert all(matches(ONE, unnamed).values())
    assert unnamed.attributes == other.attributes != ONE.attributes


def test_matches_ignores_the_order_of_objects_but_not_their_relation():
    swapped = replace(TWO, objects=TWO.objects[::-1])
    assert swapped.relation != TWO.relation
    assert all(matches(swapped, TWO).values())
    mirrored = replace(TWO, objects=tuple(replace(thing, x=1 - thing.x) for thing in TWO.objects))
    assert [name for name, held in matches(mirrored, TWO).items() if not held] == ["relation", "all"]


def test_identical_thumbnails_in_either_order_keep_the_relation():
    twins = Scene((_thing(x=0.3), _thing(x=0.7)), "black")
    assert all(matches(replace(twins, objects=twins.objects[::-1]), twins).values())


def test_too_many_and_too_few_objects_do_not_match():
    judged = matches(TWO, ONE, caption="a small blue star")
    assert [name for name, held in judged.items() if not held] == ["count", "all"]
    crowd = replace(TWO, objects=(*TWO.objects, _thing("square", x=0.5, y=0.9)))
    assert [name for name, held in matches(crowd, TWO).items() if not held] == ["count", "relation", "all"]
    judged = matches(ONE, replace(TWO, background="white"))
    assert [name for name, held in judged.items() if held] == ["background"]


def test_the_background_is_compared_if_the_caption_names_it():
    reading = replace(ONE, background="black")
    assert not matches(reading, ONE)["all"]
    assert not matches(reading, ONE, "a small blue star on a white background")["background"]
    assert matches(reading, ONE, "a small blue star")["all"]
