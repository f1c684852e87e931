"""The systems that come with the package: complete, intact, small, and found by name."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_system
from command_line import run_here
from raised import mentions

import dalle2_jax as d2
from dalle2_jax import pretrained
from dalle2_jax.cli import args
from dalle2_jax.config import inherit
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment, write_experiment
from dalle2_jax.data import ShapesSource
from dalle2_jax.stages import fingerprint
from dalle2_jax.stages.lora import LoraConfig
from dalle2_jax.workdir import digests, packed
from dalle2_jax.workdir.folder import StageFolder

MAX_BYTES = 16_000_000
"""Of all systems that come with the package."""

CARD = ("## Data", "## Licence", "## Training", "## Measures", "## Stages")
"""Sections of a model card."""

NAMES = pretrained.names()


def test_their_size():
    assert "shapes" in NAMES
    files = [path for name in NAMES for path in pretrained.included(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_as_it_was_packed(name):
    folder = pretrained.included(name)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*digests.sizes(folder), digests.NAME}
    assert {*digests.changed(folder)} <= {"README.md"}
    assert {path.name for path in folder.glob("*/checkpoints/*/*")} == {packed.FILE, digests.NAME}
    card = (folder / "README.md").read_text()
    assert [section for section in CARD if section not in card] == []


@pytest.mark.parametrize("name", NAMES)
def test_its_clip_is_that_of_its_contract_and_knows_its_images(name):
    system = d2.load(name, stages=["clip"])
    assert system.contract.clip == fingerprint(system.stages["clip"].variables.params)
    if name == "shapes":
        config = stored_experiment(StageFolder(pretrained.included(name), "clip")).data
        source = ShapesSource("val", 64, num_examples=32, max_objects=config.max_objects, jitter=config.jitter)
        batch = source.fetch(range(32))
        similar = system.embed_text(list(batch["caption"])) @ system.embed_image(batch["image"]).T
        shown = [source.scene(index).attributes[:-1] for index in range(32)]  # a caption may omit the background
        nearest = [shown[index] for index in similar.argmax(0)]
        assert np.mean([found == own for found, own in zip(nearest, shown, strict=True)]) > 0.8  # chance: 1/8


# --- names ------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_stage(folder):
    """Writes what a system is recognised by: the experiment of a stage."""
    write_experiment(StageFolder(folder, "clip"), Experiment.from_config(tiny_system.get_config("clip")))


def test_a_system_on_disk_takes_precedence(elsewhere):
    ours = pretrained.included("shapes")
    assert pretrained.find_system("shapes") == args.system("shapes") == ours
    (elsewhere / "shapes" / "images").mkdir(parents=True)  # of data, say
    assert pretrained.find_system("shapes") == ours
    write_stage(elsewhere / "shapes")
    assert pretrained.find_system("shapes") == args.system("shapes") == pathlib.Path("shapes")


@pytest.mark.parametrize("path", ["runs/shapes", "../shapes", "shapes/..", "", ".", "/", "nowhere", "x" * 300, "a\0b"])
def test_other_paths_are_left_alone(elsewhere, path):
    assert pretrained.find_system(path) == pathlib.Path(path)


def test_unknown_names(elsewhere):
    with pytest.raises(d2.UserError, check=mentions("shape", *NAMES)):
        d2.load("shape")
    done = run_here("sample.py", "text2image", "--system", "shape", "--prompt", "a", "--out", elsewhere / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_fine_tuning_stores_the_name(elsewhere):
    """So that a LoRA finds its base after the package has moved."""
    config = tiny_system.get_config("decoder")
    config.unlock()
    config.init_from = "shapes"
    run, base = inherit.with_base(Experiment.from_config(config), elsewhere / "runs" / "mine")
    assert base.root == pretrained.included("shapes") and run.init_from == "shapes"
    folder = StageFolder(elsewhere / "runs" / "mine", "decoder")
    write_experiment(folder, dataclasses.replace(run, lora=LoraConfig()))
    assert inherit.base_of(folder, run.init_from).root == base.root
