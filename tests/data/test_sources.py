import dataclasses

import cv2
import numpy as np
import pytest

from dalle2_jax.data import KINDS, FolderConfig, ShapesConfig, make_source, source_named
from dalle2_jax.data.convert import convert
from dalle2_jax.types import UserError


def test_configurations_are_frozen_and_hashable():
    for config in KINDS.values():
        assert hash(config()) == hash(config())
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().path = ""


def test_every_field_reaches_the_source(tmp_path):
    source = make_source(ShapesConfig(resolution=24, max_objects=2, num_examples=7, seed=5, jitter=0.1), "val")
    assert repr(source) == "ShapesSource('val', 24, seed=5, max_objects=2, num_examples=7, jitter=0.1)"
    with pytest.raises(UserError, match="no pictures"):
        make_source(FolderConfig(str(tmp_path)), "train")
    with pytest.raises(UserError, match="crop 'x'"):
        make_source(FolderConfig(str(tmp_path), crop="x"), "train")


def test_what_lies_at_a_path_tells_its_kind(tmp_path):
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures" / "a.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "pictures" / "a.txt").write_text("a")
    folder = source_named(str(tmp_path / "pictures"), "train", 8)
    for form in ("webdataset", "arrayrecord"):
        convert({"train": folder}, tmp_path / form, form)
    shards = tmp_path / "webdataset"
    names = {tmp_path / "pictures": "Folder", tmp_path / "arrayrecord": "Tfds"}
    names |= dict.fromkeys((shards, shards / "train", f"{shards}/{{split}}/*.tar", shards / "train/00000.tar"), "Webda")
    for name, kind in names.items():
        assert kind in repr(source_named(str(name), "train", 8)), name


@pytest.mark.parametrize("name", ["shape", "folder", "folder:", "coco:x", "mixture:x", "embeddings:x", ""])
def test_unknown_names(name):
    with pytest.raises(UserError, match="write shapes, folder:PATH, webdataset:PATH or tfds:PATH"):
        source_named(name, "train", 64)
