"""TFDS without TensorFlow, and data sets written in other formats: the same pictures and captions come back."""

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

from dalle2_jax.data import (
    Filters,
    FolderSource,
    PictureSource,
    ShapesSource,
    TfdsConfig,
    TfdsRecords,
    WebdatasetConfig,
    make_source,
    make_stream,
)
from dalle2_jax.data import convert as convert_module
from dalle2_jax.data.__main__ import main
from dalle2_jax.data.convert import convert
from dalle2_jax.data.records import Records, Rejected
from dalle2_jax.testing import WordTokenizer
from dalle2_jax.types import UserError


def png(level):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(content, "PNG")
    return content.getvalue()


FEATURES = {
    "picture": tfds.features.Image(shape=(None, None, 3)),
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
    """Six flowers, as a data set of TFDS may describe them."""

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
                    "picture": io.BytesIO(png(100 + number)),
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
    """Prepares a data set; returns where it lies."""
    tfds.disable_progress_bar()
    prepared = builder(data_dir=str(folder), file_format="array_record")
    prepared.download_and_prepare()
    return str(prepared.data_dir)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return _prepared(Flowers, tmp_path_factory.mktemp("tfds"))


def test_texts_inside_other_features_are_found(flowers):
    records = TfdsRecords(flowers)
    assert isinstance(records, Records) and len(records) == 6
    record = records.read(2)
    assert record.key == "42" and record.captions == ("Blüte 2 0", "Blüte 2 1") and record.image == png(2)
    assert record.fields["score"] == 1.0 and record.fields["title"] == "Titel ß 2"
    assert records.read(3).captions == ()
    assert [*records.captions(3)] == ["Blüte 2 0", "Blüte 2 1", "Blüte 5 0", "Blüte 5 1"]
    again = pickle.loads(pickle.dumps(records))
    assert again.read(2) == record
    with pytest.raises(Rejected, match="unreadable"):
        records.read(6)


def test_features_are_those_that_the_configuration_names(flowers):
    records = TfdsRecords(flowers, image="picture", text="title", key="score")
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
    assert isinstance(train, PictureSource) and (len(train), len(val)) == (4, 2)
    assert val[1]["key"] == "45" and val[1]["image"][0, 0, 0] == 5 and val[1]["caption"] == "Titel ß 5"
    high = make_source(TfdsConfig(flowers, text="title", filters=Filters(ranges={"score": (2.0, None)})), "train")
    assert {high[index]["key"] for index in range(6)} == {"44", "45"}
    assert make_source(TfdsConfig(flowers, resolution=4), "train")[0]["key"] == "41"  # 40 has no caption
    batch = next(make_stream(train, WordTokenizer(), 6, 4, seed=0))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "pixels"}, "has no feature 'pixels' to be the image, only .*picture"),
        ({"text": "caption"}, "has no feature 'caption' to be the text, only .*captions/text"),
        ({"label": "klass"}, "has no feature 'klass' to be the label"),
        ({"label": "id"}, "feature 'id' of .* is no class with a name"),
        ({"label": "label", "templates": ("a flower",)}, "a template has one {} where .* unlike 'a flower'"),
        ({"split": "test"}, "cannot be read as 'test' .*; its splits: train"),
    ],
)
def test_missing_features_are_named(flowers, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        TfdsRecords(flowers, **fields)
    assert "\n" not in str(caught.value)


class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures of two splits without names, each brighter than the one before."""

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
def test_records_without_names_are_named_by_split_and_row(plain, split, keys):
    """In every slice alike: the picture and the key go together."""
    records = TfdsRecords(plain, split)
    found = [records.read(index) for index in range(len(records))]
    assert [record.key for record in found] == keys
    levels = {f"train-{row}": row for row in range(20)} | {f"test-{row}": 100 + row for row in range(5)}
    assert [record.image for record in found] == [png(levels[key]) for key in keys]


def test_records_of_a_damaged_file_are_passed_over(plain, tmp_path):
    """Those of the other files are read; where there is none, one line says why."""
    for number, (harm, reason) in enumerate([("cut", "should be at least"), ("absent", "No such file")]):
        copy = Path(shutil.copytree(plain, tmp_path / str(number)))
        [file] = copy.glob("*-train.array_record*")
        if harm == "cut":
            os.truncate(file, 1000)
        else:
            file.unlink()
        records = TfdsRecords(copy, "train+test")
        with pytest.raises(Rejected, match="unreadable"):
            records.read(0)
        assert [*records.captions(25)] == [str(level) for level in range(100, 105)]
        with pytest.raises(UserError, match=f"not one record of .* can be read .*{reason}") as caught:
            [*TfdsRecords(copy).captions(20)]
        assert "\n" not in str(caught.value)


def test_what_is_not_prepared_is_said_in_one_line(flowers, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a prepared data set.*as in ~/tensorflow_datasets"):
        TfdsRecords(tmp_path / "none")
    with pytest.raises(UserError, match=f"perhaps {flowers}"):
        TfdsRecords(flowers.rpartition("/")[0])
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="is damaged") as caught:
        TfdsRecords(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_held_out_split_has_two_names(tmp_path):
    for name, asked in (("validation", "val"), ("val", "validation")):
        convert({"train": ShapesSource("train", 8, num_examples=3), name: ShapesSource("val", 8, num_examples=2)},
                tmp_path / name, "arrayrecord")
        assert len(TfdsRecords(tmp_path / name, asked)) == 2


# --- conversion -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two splits of pictures of several formats, one of them gray, one no picture at all."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        here, lines = tmp_path / "pictures" / split, []
        here.mkdir(parents=True)
        for number in range(count):
            name = f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
            picture = noise.integers(256, size=(9, 8 + number, 3), dtype=np.uint8)
            cv2.imwrite(str(here / name), picture[..., 0] if number == 4 else picture)
            texts = [f"Bild ü {number}"] * (number > 0) + ["two  words"]
            lines.append(json.dumps({"file_name": name, "text": texts, "score": number / 4}))
        (here / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "pictures" / "train" / "2.webp").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.mark.parametrize("crop", ["center", "random"])
def test_array_records_give_the_same_pictures_and_captions(folder, tmp_path, capsys, crop):
    words = ["convert", f"folder:{folder}", tmp_path / "out", "--to", "arrayrecord", "--splits", "train", "val"]
    assert main([*map(str, words)]) == 0
    assert "6 pictures of train, 3 pictures of val" in capsys.readouterr().out
    for split, indices in (("train", [0, 1, 3, 4, 5, 6]), ("val", [0, 1, 2])):
        plain = FolderSource(folder, split, 8, crop)
        source = make_source(TfdsConfig(str(tmp_path / "out"), resolution=8, crop=crop), split)
        assert len(source) == len(indices)
        for row, index in enumerate(indices):
            assert source.records.read(row) == plain.records.read(index)
            one, other = source[row], plain[index]
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["captions"] == other["captions"] and one["caption"] == other["caption"]
            one, other = (each.draw(at, np.random.default_rng(3)) for each, at in ((source, row), (plain, index)))
            np.testing.assert_array_equal(one[0], other[0])
            assert one[1] == other[1]
    with pytest.raises(UserError, match="is not an empty folder"):
        convert({}, tmp_path / "out", "arrayrecord")


def test_a_converted_data_set_makes_the_same_batches(tmp_path):
    shapes = ShapesSource("train", 8, num_examples=20)
    assert convert({"train": shapes}, tmp_path / "out", "arrayrecord").counts == {"train": 20}
    source = make_source(TfdsConfig(str(tmp_path / "out"), resolution=8), "train")
    one, other = (next(make_stream(each, None, 2, 20, seed=1)) for each in (source, shapes))
    np.testing.assert_array_equal(one["image"], other["image"])
    assert all(source[index]["captions"] == shapes[index]["captions"] for index in range(20))


def test_tar_shards_are_as_img2dataset_makes_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_SIZE", 4)
    plain = FolderSource(folder, "train", 8)
    assert convert({"train": plain}, tmp_path / "out", "webdataset").counts == {"train": 6}
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:6] == "0.png 0.txt 0.json 1.jpg 1.txt 1.json".split()
        assert tar.extractfile(names[3]).read() == (folder / "train" / "1.jpg").read_bytes()
        assert tar.extractfile(names[4]).read().decode() == "Bild ü 1\ntwo  words"
        told = json.load(tar.extractfile(names[5]))
    source = make_source(WebdatasetConfig(str(tmp_path / "out"), 8), "train")
    assert len(source) == 6
    for row, index in enumerate([0, 1, 3, 4, 5, 6]):
        one, other = source[row], plain[index]
        np.testing.assert_array_equal(one["image"], other["image"])
        assert (one["captions"], one["caption"]) == (other["captions"], other["caption"])
        assert source.records.read(row).fields["score"] == index / 4
    assert told == {"score": 0.25, "caption": "Bild ü 1"}


def test_what_cannot_be_converted_leaves_nothing(folder, tmp_path):
    (folder / "val" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a"}))
    (folder / "val" / "0.png").write_bytes(b"")
    for form in convert_module.FORMATS:
        with pytest.raises(UserError, match="not one picture of .* can be written"):
            convert({"val": FolderSource(folder, "val", 8)}, tmp_path / "new" / "out", form)
        assert not [*(tmp_path / "new").iterdir()]


def test_nothing_here_needs_tensorflow(flowers):
    """A record is read in a process that has not imported TensorFlow, though it may be there."""
    program = (
        "import sys\n"
        "from dalle2_jax.data import TfdsConfig, make_source\n"
        f"source = make_source(TfdsConfig({flowers!r}, text='title', resolution=4), 'train')\n"
        "assert source[2]['caption'] == 'Titel ß 2', source[2]\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
