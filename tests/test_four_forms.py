"""One data set as folder, tar shards, ArrayRecord and embeddings trains to one loss curve."""

import json

import pytest
import tiny_system
from tiny_data import write_clip, write_pictures

from dalle2_jax.data.__main__ import main
from dalle2_jax.job import build_job
from dalle2_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_programs")

STEPS = 12
"""Of 8 examples: two passes over 48."""


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The section data of each form, as the commands write them, and the system whose clip embedded the last."""
    root = tmp_path_factory.mktemp("forms")
    system, pictures = write_clip(root / "system"), root / "pictures"
    pictures.mkdir()
    write_pictures(pictures)
    for form in ("webdataset", "arrayrecord"):
        assert main(["convert", f"folder:{pictures}", str(root / form), "--to", form]) == 0
    words = ["embed", "--system", system, "--data", f"folder:{pictures}", "--out", root / "embeddings"]
    assert main([*map(str, words), "--batch_size", "16", "--shard_size", "20"]) == 0
    sections = {
        "folder": {"path": str(pictures)},
        "webdataset": {"path": str(root / "webdataset")},
        "tfds": {"path": str(root / "arrayrecord")},
        "embeddings": {"path": str(root / "embeddings")},
    }
    return {kind: {"kind": kind, **section} for kind, section in sections.items()}, system


def curve(stage, section, root, system=None):
    """Trains a stage and returns its metrics at each step, without the times."""
    root.mkdir()
    if system:
        (root / "clip").symlink_to(system / "clip")
    config = tiny_system.get_config(stage)
    config.total_steps, config.log_every = STEPS, 1
    config.data = section if section["kind"] == "embeddings" else {**section, "resolution": 8}
    train(build_job(config, root, f"tests/tiny_system.py:{stage}"))
    lines = [json.loads(line) for line in (root / stage / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    times = {"examples_per_second", "data_wait"}
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_clip_sees_the_same_in_three_forms(forms, tmp_path):
    sections, _ = forms
    curves = {kind: curve("clip", sections[kind], tmp_path / kind) for kind in ("folder", "webdataset", "tfds")}
    assert curves["folder"] == curves["webdataset"] == curves["tfds"], "to the last bit"
    assert len({line["loss"] for line in curves["folder"]}) == STEPS


def test_a_prior_sees_the_same_in_four_forms(forms, tmp_path):
    sections, system = forms
    curves = {kind: curve("prior", section, tmp_path / kind, system) for kind, section in sections.items()}
    assert curves["folder"] == curves["webdataset"] == curves["tfds"], "to the last bit"
    for line, other in zip(curves["folder"], curves["embeddings"], strict=True):
        assert line == pytest.approx(other, rel=1e-4), "CLIP rounds by the size of its batches"
    assert curves["folder"][-1]["loss"] != pytest.approx(curves["folder"][0]["loss"], rel=0.01)
