import dataclasses

import cv2
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.data import KINDS, FolderConfig, ShapesConfig, make_source, source_named
from dalle2_jax.data.tools.convert import convert
from dalle2_jax.errors import DataError, UserError


def test_configurations_are_frozen_and_hashable():
    for config in KINDS.values():
        assert hash(config()) == hash(config())
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().path = ""


def test_every_field_reaches_the_source(tmp_path):
    fields = {"seed": 5, "max_objects": 2, "num_examples": 8, "jitter": 0.1, "unnamed_colours": 0.5}
    fields["hard_negatives"] = True
    source = make_source(ShapesConfig(resolution=24, **fields), "train")
    assert repr(source) == f"ShapesSource('train', 24, {', '.join(f'{key}={fields[key]}' for key in fields)})"
    with pytest.raises(DataError, check=mentions("no images", ".png", path=tmp_path)):
        make_source(FolderConfig(str(tmp_path)), "train")
    with pytest.raises(UserError, check=mentions("crop", "center", "random", "shift", "'x'")):
        make_source(FolderConfig(str(tmp_path), crop="x"), "train")


def test_the_kind_of_a_source_is_detected_from_its_path(tmp_path):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "images" / "a.txt").write_text("a")
    folder = source_named(str(tmp_path / "images"), "train", 8)
    for form in ("webdataset", "arrayrecord"):
        convert({"train": folder}, tmp_path / form, form)
    shards = tmp_path / "webdataset"
    names = {tmp_path / "images": "Folder", f"tfds:{tmp_path / 'arrayrecord'}": "Tfds"}
    names |= dict.fromkeys((shards, shards / "train", f"{shards}/{{split}}/*.tar", shards / "train/00000.tar"), "Webda")
    for name, kind in names.items():
        assert kind in repr(source_named(str(name), "train", 8)), name


def test_a_tfds_data_set_is_never_auto_detected(tmp_path):
    """Its files name the classes that read them, so a path is read as TFDS only with the prefix tfds: in front."""
    (tmp_path / "features.json").write_text("{}")
    for split in ("train", "val"):
        with pytest.raises(UserError, check=mentions(tmp_path, "features.json", "tfds:PATH")):
            source_named(str(tmp_path), split, 8)
    with pytest.raises(DataError, check=mentions("no images", ".png", path=tmp_path)):
        source_named(f"folder:{tmp_path}", "train", 8)


PREFIXES = ("shapes", "folder:PATH", "webdataset:PATH", "tfds:PATH")


@pytest.mark.parametrize("name", ["shape", "folder", "folder:", "coco:x", "mixture:x", "embeddings:x", ""])
def test_unknown_names_are_rejected(name):
    with pytest.raises(UserError, check=mentions(f"'{name}'", *PREFIXES)):
        source_named(name, "train", 64)
