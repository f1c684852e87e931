"""One data set as folder, tar shards, ArrayRecord and embeddings trains to one loss curve."""

import json

import pytest
import tiny_system
from tiny_data import write_clip, write_images

from dalle2_jax.cli import main
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.run import build_job
from dalle2_jax.training.loop import train

STEPS = 12
"""Steps of 8 examples: two epochs of 48."""


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Returns the config section data of each format, and the system whose clip computed the embeddings."""
    root = tmp_path_factory.mktemp("forms")
    system, image_folder = write_clip(root / "system"), root / "images"
    image_folder.mkdir()
    write_images(image_folder)
    for form in ("webdataset", "arrayrecord"):
        assert main(["data", "convert", f"folder:{image_folder}", str(root / form), "--to", form]) == 0
    args = ["embed", "--system", system, "--data", f"folder:{image_folder}", "--out", root / "embeddings"]
    assert main(["data", *map(str, args), "--batch_size", "16", "--shard_size", "20"]) == 0
    sections = {
        "folder": {"path": str(image_folder)},
        "webdataset": {"path": str(root / "webdataset")},
        "tfds": {"path": str(root / "arrayrecord")},
        "embeddings": {"path": str(root / "embeddings")},
    }
    return {kind: {"kind": kind, **section} for kind, section in sections.items()}, system


def curve(stage, section, root, system=None):
    """Trains a stage; returns its metrics at each step, without the timings."""
    root.mkdir()
    if system:
        (root / "clip").symlink_to(system / "clip")
    config = tiny_system.get_config(stage)
    config.total_steps, config.checkpoint_every, config.log_every = STEPS, STEPS, 1
    config.data = section if section["kind"] == "embeddings" else {**section, "resolution": 8}
    train(build_job(Experiment.from_config(config), root, f"tests/support/tiny_system.py:{stage}"))
    lines = [json.loads(line) for line in (root / stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    times = {"examples_per_second", "data_wait"}
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_clip_trains_identically_on_three_formats(forms, tmp_path):
    sections, _ = forms
    curves = {kind: curve("clip", sections[kind], tmp_path / kind) for kind in ("folder", "webdataset", "tfds")}
    assert curves["folder"] == curves["webdataset"] == curves["tfds"], "to the last bit"
    assert len({line["loss"] for line in curves["folder"]}) == STEPS


def test_a_prior_trains_identically_on_four_formats(forms, tmp_path):
    sections, system = forms
    curves = {kind: curve("prior", section, tmp_path / kind, system) for kind, section in sections.items()}
    assert curves["folder"] == curves["webdataset"] == curves["tfds"], "to the last bit"
    for line, other in zip(curves["folder"], curves["embeddings"], strict=True):
        assert line == pytest.approx(other, rel=1e-4), "CLIP rounds by the size of its batches"
    assert curves["folder"][-1]["loss"] != pytest.approx(curves["folder"][0]["loss"], rel=0.01)
