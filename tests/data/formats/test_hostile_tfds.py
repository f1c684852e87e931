"""Untrusted TFDS folders: no code runs, no file outside is read, and only `data.images` decodes images."""

import io
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from raised import mentions

from dalle2_jax.data import ShapesSource, TfdsRecords
from dalle2_jax.data.formats.tfds_metadata import (
    CLASSES,
    FEATURES,
    INFO,
    check_metadata,
)
from dalle2_jax.data.tools.convert import convert
from dalle2_jax.errors import UserError

EVIL = "module_of_a_stranger"
PLAIN = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("tfds") / "out"
    convert({"train": ShapesSource("train", 8, num_examples=3)}, out, "arrayrecord")
    return out


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """Yields a copy of a data set; a module on sys.path creates the file ``imported`` when it is imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{EVIL}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield Path(shutil.copytree(prepared, tmp_path / "copy"))
    sys.modules.pop(EVIL, None)


def _changed(folder, file, change):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content) or content))


def _as_feature(feature):
    """Returns a change that adds a feature to the top-level features."""
    return lambda content: content["featuresDict"]["features"].update(more=feature)


_LEGACY = {"type": f"{EVIL}.Feature", "content": {}}
_NAMED = {"pythonClassName": f"{EVIL}.Feature", "jsonFeature": {"json": "{}"}}
_DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
_SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
_HOSTILE = {
    "at the top": lambda content: _LEGACY,
    "at the top, by its new name": lambda content: content.update(pythonClassName=f"{EVIL}.Feature"),
    "one feature": _as_feature(_NAMED),
    "in snake case": _as_feature({"python_class_name": f"{EVIL}.Feature", "text": {}}),
    "in a sequence": _as_feature({"pythonClassName": _SEQUENCE, "sequence": {"feature": _NAMED}}),
    "in JSON in a string": _as_feature(
        {"pythonClassName": _DICT, "jsonFeature": {"json": json.dumps({"x": _LEGACY}).replace("type", "\\u0074ype")}}
    ),
    "in a string of old": lambda content: {
        "type": _DICT,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": " " + json.dumps({"features": {"x": _NAMED}}),
    },
    "in a dictionary of old": lambda content: {"type": _DICT, "content": {"x": _LEGACY}},
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_classes_named_in_features_json_are_not_imported(folder, case):
    _changed(folder, FEATURES, _HOSTILE[case])
    with pytest.raises(UserError, check=mentions(FEATURES, f"{EVIL}.Feature")):
        TfdsRecords(folder)
    assert not (folder.parent / "imported").exists()


def test_classes_named_in_dataset_info_are_not_imported(folder):
    _changed(folder, INFO, lambda content: content.update(features=_NAMED))
    with pytest.raises(UserError, check=mentions(INFO, "feature class")):
        TfdsRecords(folder)
    assert not (folder.parent / "imported").exists()


def _of_split(**fields):
    return lambda content: content["splits"][0].update(fields)


_NAMES_FILE = {
    "type": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
    "content": {"names_file": "/x"},
}


@pytest.mark.parametrize(
    ("file", "change", "found"),
    [
        (FEATURES, lambda content: {"type": _DICT, "content": {"x": _NAMES_FILE}}, "/x"),
        (INFO, _of_split(filepathTemplate="../{SPLIT}"), "filepathTemplate"),
        (INFO, _of_split(filepathTemplate="/etc/passwd"), "filepathTemplate"),
        (INFO, _of_split(filepathTemplate="gs://bucket/{SPLIT}"), "filepathTemplate"),
        (INFO, _of_split(filepathTemplate="{SPLIT:1000000000}"), "filepathTemplate"),
        (INFO, _of_split(name="../train"), "'../train'"),
        (INFO, lambda content: content.update(name=".."), "'..'"),
        (INFO, _of_split(shardLengths=["1000000000000"]), "1000000000000"),
        (INFO, lambda content: content.update(fileFormat="parquet"), "parquet"),
        (INFO, lambda content: content.update(fileFormat="tfrecord"), "tfrecord"),
    ],
)  # fmt: skip
def test_paths_outside_the_folder_and_huge_sizes_are_rejected(folder, file, change, found):
    _changed(folder, file, change)
    with pytest.raises(UserError, check=mentions(found)):
        TfdsRecords(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, '"' + "x" * 2**26 + '"'])
@pytest.mark.parametrize("file", [FEATURES, INFO])
def test_damaged_deeply_nested_or_large_json_is_rejected(folder, file, text):
    if file == INFO and text.startswith('{"a"'):
        text = f'{{"features": {text}}}'
    (folder / file).write_text(text)
    with pytest.raises(UserError, check=mentions(folder / file)):
        check_metadata(folder)


def test_allowed_classes_are_registered_by_tfds():
    registered = tfds.features.FeatureConnector._registered_features
    assert {name for name in CLASSES if name not in registered} == set()


class TwoImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set with two image features, of which the source reads one; the other holds untrusted bytes."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3))
        features = {
            "image": image,
            "other": image,
            "packed": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="zlib"),
            "boxes": tfds.features.Sequence(
                {"box": tfds.features.BBoxFeature(), "text": tfds.features.Text()}, length=2
            ),
            "text": tfds.features.Text(),
            "score": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        content = io.BytesIO()
        Image.new("RGB", (4, 4)).save(content, "PNG")
        box = {"box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "text": "a box"}
        images = {"image": io.BytesIO(content.getvalue()), "other": io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n")}
        yield 0, {**images, "packed": np.zeros(9, np.uint8), "boxes": [box, box], "text": "a caption", "score": 0.5}


def test_features_that_are_not_read_are_not_decoded(tmp_path, monkeypatch):
    builder = TwoImages(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    for module, name in ((Image, "open"), (cv2, "imdecode")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("TFDS decoded an image"))
    record = TfdsRecords(builder.data_dir).read(0)
    assert record.captions == ("a caption",) and record.fields == {"score": 0.5} and record.image[:4] == b"\x89PNG"
    assert TfdsRecords(builder.data_dir, text="boxes/text").read(0).captions == ("a box", "a box")
    for field in ("packed", "other"):
        with pytest.raises(UserError, check=mentions(f"'{field}'", "neither text")):
            TfdsRecords(builder.data_dir, text=field)
