"""TFDS without TensorFlow, and conversion to other formats: the same images and captions are read back."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from raised import mentions
from streams import sample, text_stream

from dalle2_jax.cli import main
from dalle2_jax.data import (
    Filters,
    FolderSource,
    ImageSource,
    ShapesSource,
    TfdsConfig,
    TfdsRecords,
    WebdatasetConfig,
    example,
    make_source,
)
from dalle2_jax.data.images.records import Records, Rejected
from dalle2_jax.data.tools import convert as convert_module
from dalle2_jax.data.tools.convert import convert
from dalle2_jax.errors import UserError
from dalle2_jax.testing import WordTokenizer


def png(level):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(content, "PNG")
    return content.getvalue()


FEATURES = {
    "photo": tfds.features.Image(shape=(None, None, 3)),
    "image": tfds.features.Image(shape=(None, None, 3)),
    "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
    "title": tfds.features.Text(),
    "id": np.int64,
    "image/filename": tfds.features.Text(),
    "score": np.float32,
    "label": tfds.features.ClassLabel(names=["water_lily", "rose"]),
    "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["big", "wild"])),
}


class Flowers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Six flowers with features as TFDS data sets declare them."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(FEATURES), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6)}

    def _generate_examples(self, count):
        for number in range(count):
            yield (
                number,
                {
                    "photo": io.BytesIO(png(100 + number)),
                    "image": io.BytesIO(png(number)),
                    "captions": [{"text": f"Blüte {number} {other}", "id": other} for other in range(number % 3)],
                    "title": f"Titel ß {number}",
                    "id": 40 + number,
                    "image/filename": f"{number}.jpg",
                    "score": number / 2,
                    "label": -1 if number == 5 else number % 2,
                    "tags": [0, 1][: number % 3],
                },
            )


def _prepared(builder, folder):
    """Prepares a data set; returns its folder."""
    tfds.disable_progress_bar()
    prepared = builder(data_dir=str(folder), file_format="array_record")
    prepared.download_and_prepare()
    return str(prepared.data_dir)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return _prepared(Flowers, tmp_path_factory.mktemp("tfds"))


def test_texts_in_nested_features_are_found(flowers):
    records = TfdsRecords(flowers)
    assert isinstance(records, Records) and len(records) == 6
    record = records.read(2)
    assert record.key == "42" and record.captions == ("Blüte 2 0", "Blüte 2 1") and record.image == png(2)
    assert record.fields["score"] == 1.0 and record.fields["title"] == "Titel ß 2"
    assert records.read(3).captions == ()
    assert [*records.captions(3)] == ["Blüte 2 0", "Blüte 2 1", "Blüte 5 0", "Blüte 5 1"]
    again = pickle.loads(pickle.dumps(records))
    assert again.read(2) == record
    with pytest.raises(Rejected, check=mentions(cause="unreadable")):
        records.read(6)


def test_the_configuration_names_the_features(flowers):
    records = TfdsRecords(flowers, image="photo", text="title", key="score")
    assert records.read(4)[:3] == ("2.0", png(104), ("Titel ß 4",))
    assert TfdsRecords(flowers, key="image/filename").read(4).key == "4.jpg"


def test_classes_are_described_by_templates(flowers):
    templates = ("a photo of a {}", "{}, a flower")
    records = TfdsRecords(flowers, label="label", templates=templates)
    assert records.read(0).captions == ("a photo of a water lily", "water lily, a flower")
    assert records.read(1).captions == ("a photo of a rose", "rose, a flower") and records.read(5).captions == ()
    several = TfdsRecords(flowers, label="tags")
    assert several.read(2).captions == ("a photo of a big", "a photo of a wild") and several.read(0).captions == ()


def test_a_source_has_slices_filters_and_substitutes(flowers):
    config = TfdsConfig(flowers, train="train[:4]", val="train[4:]", text="title", resolution=4)
    train, val = make_source(config, "train"), make_source(config, "val")
    assert isinstance(train, ImageSource) and (len(train), len(val)) == (4, 2)
    last = example(val, 1)
    assert last["key"] == "45" and last["image"][0, 0, 0] == 5 and last["caption"] == "Titel ß 5"
    high = make_source(TfdsConfig(flowers, text="title", filters=Filters(ranges={"score": (2.0, None)})), "train")
    assert {*high.fetch(range(6))["key"]} == {"44", "45"}
    assert example(make_source(TfdsConfig(flowers, resolution=4), "train"), 0)["key"] == "41"  # 40 has no caption
    batch = next(text_stream(train, WordTokenizer(), 6, 4, seed=0))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"image": "pixels"}, ["'pixels'", "the image", "photo"]),
        ({"text": "caption"}, ["'caption'", "the text", "captions/text"]),
        ({"label": "klass"}, ["'klass'", "the label"]),
        ({"label": "id"}, ["feature 'id'", "class"]),
        ({"label": "label", "templates": ("a flower",)}, ["template", "{}", "'a flower'"]),
        ({"split": "test"}, ["flowers", "'test'", "train"]),
    ],
)
def test_missing_features_are_named(flowers, fields, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        TfdsRecords(flowers, **fields)


class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images of two splits without keys, each brighter than the one before."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(20)), "test": self._generate_examples(range(100, 105))}

    def _generate_examples(self, levels):
        for number, level in enumerate(levels):
            yield number, {"image": io.BytesIO(png(level)), "text": str(level)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _prepared(Plain, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("split", "keys"),
    [
        ("train", [f"train-{row}" for row in range(20)]),
        ("train[10%:]", [f"train-{row}" for row in range(2, 20)]),
        ("train[:3]", ["train-0", "train-1", "train-2"]),
        ("train[-2:]+test[1:]", ["train-18", "train-19", "test-1", "test-2", "test-3", "test-4"]),
        ("all", [*(f"train-{row}" for row in range(20)), *(f"test-{row}" for row in range(5))]),
    ],
)
def test_records_without_keys_are_named_by_split_and_row(plain, split, keys):
    """A record has the same key in every slice."""
    records = TfdsRecords(plain, split)
    found = [records.read(index) for index in range(len(records))]
    assert [record.key for record in found] == keys
    levels = {f"train-{row}": row for row in range(20)} | {f"test-{row}": 100 + row for row in range(5)}
    assert [record.image for record in found] == [png(levels[key]) for key in keys]


def test_records_of_a_damaged_file_are_skipped(plain, tmp_path):
    """Records of the other files are read; if there are none, a one-line error names the reason."""
    for number, (harm, reason) in enumerate([("cut", "64KB"), ("absent", os.strerror(errno.ENOENT))]):
        copy = Path(shutil.copytree(plain, tmp_path / str(number)))
        [file] = copy.glob("*-train.array_record*")
        if harm == "cut":
            os.truncate(file, 1000)
        else:
            file.unlink()
        records = TfdsRecords(copy, "train+test")
        with pytest.raises(Rejected, check=mentions(cause="unreadable")):
            records.read(0)
        assert [*records.captions(25)] == [str(level) for level in range(100, 105)]
        with pytest.raises(UserError, check=mentions("no record", copy, reason)):
            [*TfdsRecords(copy).captions(20)]


def test_folders_that_are_not_prepared_data_sets_raise_one_line_errors(flowers, tmp_path):
    with pytest.raises(UserError, check=mentions(tmp_path / "none", "features.json", "~/tensorflow_datasets")):
        TfdsRecords(tmp_path / "none")
    with pytest.raises(UserError, check=mentions("features.json", flowers)):
        TfdsRecords(flowers.rpartition("/")[0])
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, check=mentions(tmp_path / "features.json", "JSON")):
        TfdsRecords(tmp_path)


def test_validation_and_val_name_the_same_tfds_split(tmp_path):
    for name, requested in (("validation", "val"), ("val", "validation")):
        convert(
            {"train": ShapesSource("train", 8, num_examples=3), name: ShapesSource("val", 8, num_examples=2)},
            tmp_path / name,
            "arrayrecord",
        )
        assert len(TfdsRecords(tmp_path / name, requested)) == 2


# --- conversion -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of two splits in several image formats; one image is gray, one file is not an image."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        here, lines = tmp_path / "images" / split, []
        here.mkdir(parents=True)
        for number in range(count):
            name = f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
            pixels = noise.integers(256, size=(9, 8 + number, 3), dtype=np.uint8)
            cv2.imwrite(str(here / name), pixels[..., 0] if number == 4 else pixels)
            texts = [f"Bild ü {number}"] * (number > 0) + ["two  words"]
            lines.append(json.dumps({"file_name": name, "text": texts, "score": number / 4}))
        (here / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "images" / "train" / "2.webp").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("crop", ["center", "random"])
def test_array_records_give_the_same_images_and_captions(folder, tmp_path, capsys, crop):
    words = ["convert", f"folder:{folder}", tmp_path / "out", "--to", "arrayrecord", "--splits", "train", "val"]
    assert main(["data", *map(str, words)]) == 0
    assert "6 images of train, 3 images of val" in capsys.readouterr().out
    for split, indices in (("train", [0, 1, 3, 4, 5, 6]), ("val", [0, 1, 2])):
        plain = FolderSource(folder, split, 8, crop)
        source = make_source(TfdsConfig(str(tmp_path / "out"), resolution=8, crop=crop), split)
        assert len(source) == len(indices)
        for row, index in enumerate(indices):
            assert source.records.read(row) == plain.records.read(index)
            one, other = example(source, row), example(plain, index)
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["captions"] == other["captions"] and one["caption"] == other["caption"]
            one, other = sample(source, row, 3), sample(plain, index, 3)
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["caption"] == other["caption"]
    with pytest.raises(UserError, check=mentions(tmp_path / "out", "empty folder")):
        convert({}, tmp_path / "out", "arrayrecord")


def test_a_converted_data_set_makes_the_same_batches(tmp_path):
    shapes = ShapesSource("train", 8, num_examples=20)
    assert convert({"train": shapes}, tmp_path / "out", "arrayrecord").counts == {"train": 20}
    source = make_source(TfdsConfig(str(tmp_path / "out"), resolution=8), "train")
    one, other = (next(text_stream(each, None, 2, 20, seed=1)) for each in (source, shapes))
    np.testing.assert_array_equal(one["image"], other["image"])
    assert all(example(source, index)["captions"] == example(shapes, index)["captions"] for index in range(20))


def test_tar_shards_have_the_layout_of_img2dataset(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_SIZE", 4)
    plain = FolderSource(folder, "train", 8)
    assert convert({"train": plain}, tmp_path / "out", "webdataset").counts == {"train": 6}
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:6] == "0.png 0.txt 0.json 1.jpg 1.txt 1.json".split()
        assert tar.extractfile(names[3]).read() == (folder / "train" / "1.jpg").read_bytes()
        assert tar.extractfile(names[4]).read().decode() == "Bild ü 1\ntwo  words"
        metadata = json.load(tar.extractfile(names[5]))
    source = make_source(WebdatasetConfig(str(tmp_path / "out"), 8), "train")
    assert len(source) == 6
    for row, index in enumerate([0, 1, 3, 4, 5, 6]):
        one, other = example(source, row), example(plain, index)
        np.testing.assert_array_equal(one["image"], other["image"])
        assert (one["captions"], one["caption"]) == (other["captions"], other["caption"])
        assert source.records.read(row).fields["score"] == index / 4
    assert metadata == {"score": 0.25, "caption": "Bild ü 1"}


def test_a_failed_conversion_leaves_no_files(folder, tmp_path):
    (folder / "val" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a"}))
    (folder / "val" / "0.png").write_bytes(b"")
    for form in convert_module.FORMATS:
        with pytest.raises(UserError, check=mentions("no image", folder, "1 empty")):
            convert({"val": FolderSource(folder, "val", 8)}, tmp_path / "new" / "out", form)
        assert not [*(tmp_path / "new").iterdir()]


def test_reading_does_not_import_tensorflow(flowers):
    """A subprocess reads a record without importing TensorFlow, whether or not it is installed."""
    program = (
        "import sys\n"
        "from dalle2_jax.data import TfdsConfig, make_source\n"
        f"source = make_source(TfdsConfig({flowers!r}, text='title', resolution=4), 'train')\n"
        "assert source.fetch([2])['caption'] == ['Titel ß 2']\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
