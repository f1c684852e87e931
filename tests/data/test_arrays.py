"""In-memory images and captions form a data set; values that are not images raise a clear error."""

import pickle

import numpy as np
import pytest
from PIL import Image
from raised import mentions
from streams import sample, text_stream

from dalle2_jax.data import ArraySource, FolderSource, ImageSource, Source, as_source, example
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.testing import WordTokenizer


def images(count=5, side=8):
    return np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8)


CAPTIONS = ["red", "green", ["blue", "a blue one"], "", "é"]


class Dataset:
    """A map-style data set as in PyTorch or Hugging Face: examples are mappings, accessed by index."""

    def __init__(self, *examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        assert type(index) is int
        return self.examples[index]


def test_arrays_are_returned_bit_for_bit():
    data = images()
    source = as_source({"image": data, "caption": CAPTIONS})
    assert isinstance(source, ArraySource) and isinstance(source, Source) and len(source) == 5
    found = source.fetch(range(-5, 0))
    np.testing.assert_array_equal(found["image"], data)
    assert found["caption"].tolist()[:2] == ["red", "green"] and found["captions"][2] == ("blue", "a blue one")
    assert found["key"].tolist() == ["0", "1", "2", "3", "4"] and not found["substitute"].any()
    assert {sample(source, 2, seed)["caption"] for seed in range(20)} == {"blue", "a blue one"}
    assert [*source.captions(9)] == ["red", "green", "blue", "a blue one", "", "é"]
    assert as_source(source, 64) is source


@pytest.mark.parametrize("kind", ["pil", "arrays", "list of mappings", "data set", "other names"])
def test_pil_images_arrays_and_mappings_give_the_same_data_set(kind):
    data = images()
    pil_images = [Image.fromarray(image) for image in data]
    examples = [{"image": image, "caption": text} for image, text in zip(pil_images, CAPTIONS, strict=True)]
    given = {
        "pil": {"image": pil_images, "caption": CAPTIONS},
        "arrays": {"image": list(data), "caption": tuple(CAPTIONS)},
        "list of mappings": examples,
        "data set": Dataset(*examples),
        "other names": Dataset(*({"img": one["image"], "text": one["caption"], "id": 3} for one in examples)),
    }[kind]
    for source in (as_source(given), pickle.loads(pickle.dumps(as_source(given)))):
        assert isinstance(source, ImageSource) and source.resolution == 8
        found = source.fetch(np.arange(5))
        np.testing.assert_array_equal(found["image"], data)
        assert found["captions"].tolist() == [("red",), ("green",), ("blue", "a blue one"), ("",), ("é",)]


def test_images_of_any_size_are_resized_and_cropped():
    noise = np.random.default_rng(0)
    mixed = [noise.integers(256, size=(height, width, 3), dtype=np.uint8) for height, width in ((9, 20), (30, 12))]
    source = as_source({"image": mixed, "caption": ["a", "b"]}, 6, crop="random")
    assert source.fetch([0, 1])["image"].shape == (2, 6, 6, 3)
    crops = [sample(source, 0, seed)["image"].tobytes() for seed in range(8)]
    assert len({*crops}) > 2
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    shown = as_source({"image": [transparent, grey], "caption": ["a", "b"]}).fetch([0, 1])["image"]
    assert (shown[0] == 255).all() and (shown[1] == 77).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_arrays_resumes(workers):
    def make(num_workers=0):
        source = as_source({"image": images(), "caption": CAPTIONS})
        return text_stream(source, WordTokenizer(), 6, 4, seed=0, num_workers=num_workers)

    stream = make()
    batches = [next(stream) for _ in range(4)]
    assert batches[0].keys() == {"image", "tokens", "mask"}
    resumed = make(workers)
    resumed.set_state({"global_next_index": 8})
    for batch in batches[2:]:
        again = next(resumed)
        for name, column in batch.items():
            np.testing.assert_array_equal(again[name], column)
    resumed.close()


def test_a_path_opens_the_data_set_at_that_path(tmp_path):
    Image.fromarray(images()[0]).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, str(tmp_path), f"folder:{tmp_path}"):
        source = as_source(path, 8)
        assert isinstance(source, FolderSource)
        np.testing.assert_array_equal(example(source, 0)["image"], images()[0])
    with pytest.raises(UserError, check=mentions(f"'{tmp_path}/nowhere'", "folder:PATH")):
        as_source(tmp_path / "nowhere", 8)


IMAGES = images(2)


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ({"image": IMAGES / np.float64(255), "caption": ["a", "b"]}, ["float64", "astype(np.uint8)"]),
        ({"image": [IMAGES[0].astype(np.float32)] * 2, "caption": ["a", "b"]}, ["['image'][0]", "float32"]),
        ({"image": IMAGES.astype(np.int64), "caption": ["a", "b"]}, ["int64", "astype(np.uint8)"]),
        ({"image": IMAGES[..., 0], "caption": ["a", "b"]}, ["uint8[2, 8, 8]"]),
        ({"image": [IMAGES[0, ..., 0]] * 2, "caption": ["a", "b"]}, ["uint8[8, 8]", "grey"]),
        ({"image": IMAGES[..., [0, 1, 2, 0]], "caption": ["a", "b"]}, ["uint8[8, 8, 4]", "RGBA"]),
        ({"image": IMAGES.transpose(0, 3, 1, 2), "caption": ["a", "b"]}, ["uint8[3, 8, 8]", "transpose(1, 2, 0)"]),
        ({"image": IMAGES[:, :0], "caption": ["a", "b"]}, ["uint8[0, 8, 3]"]),
        ({"image": IMAGES, "caption": ["a"]}, ["2 images", "1 captions"]),
        ({"image": IMAGES, "caption": "ab"}, ["data['caption']", "str"]),
        ({"image": IMAGES, "caption": [1, 2]}, ["['caption'][0]", "1"]),
        ({"image": IMAGES, "caption": [[], "b"]}, ["['caption'][0]", "[]"]),
        ({"image": IMAGES[:0], "caption": []}, ["no images"]),
        ({"image": ["a.png", "b.png"], "caption": ["a", "b"]}, ["['image'][0]", "str"]),
        ({"image": 3, "caption": ["a"]}, ["data['image']", "int"]),
        ({"photo": IMAGES, "caption": ["a", "b"]}, ["no image", "photo, caption"]),
        ({"image": IMAGES}, ["no caption", "image"]),
        ({}, ["no image", "nothing"]),
        ([], ["no examples"]),
        ([IMAGES[0]], ["data[0]", "mapping", "uint8[8, 8, 3]"]),
        ([{"image": IMAGES[0]}], ["no caption"]),
        (Dataset({"image": None, "caption": "a"}), ["data[0]['image']", "NoneType"]),
        (IMAGES, ["path", "mapping", "uint8[2, 8, 8, 3]"]),
        (None, ["path", "mapping", "NoneType"]),
        (iter([]), ["path", "mapping", "list_iterator"]),
        (b"bytes", ["path", "mapping", "bytes"]),
    ],
)
def test_invalid_data_raises_one_clear_error(data, facts):
    with pytest.raises(DataError, check=mentions(*facts, path=None)):
        as_source(data, 8)


def test_an_invalid_later_example_is_named_when_it_is_read():
    valid = {"image": IMAGES[0], "caption": "a"}
    for wrong, facts in (
        ({"image": IMAGES[0] / 255.0, "caption": "a"}, ["data[1]['image']"]),
        ({"image": IMAGES[0], "caption": None}, ["data[1]['caption']"]),
        ({"caption": "a"}, ["data[1]", "'image'", "data[0]"]),
    ):
        source = as_source(Dataset(valid, wrong), 8)
        with pytest.raises(DataError, check=mentions(*facts)):
            source.fetch([0, 1])
