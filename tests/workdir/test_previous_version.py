"""A system that version 0.1 trained still loads, samples and resumes; its stages have config.json, not experiment.json.

tests/fixtures/previous_system has clip, prior and decoder of tests/support/tiny_system.py after four steps (with a
constant learning rate), an image that version 0.1 sampled from them ("a large red circle", seed 3), and sums over
each parameter of the decoder after two more steps of version 0.1.
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest
import tiny_system
from PIL import Image

import dalle2_jax as d2
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.data.synthetic import shapes
from dalle2_jax.data.synthetic.polygons import EXTENT
from dalle2_jax.data.synthetic.scenes import Scene, SceneObject
from dalle2_jax.run import train_stage
from dalle2_jax.workdir.folder import StageFolder

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "previous_system"
STAGES = ("clip", "prior", "decoder")


@pytest.fixture
def system(tmp_path):
    with tarfile.open(FIXTURE / "system.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def experiment_of(name, **fields):
    """The experiment that the fixture was trained with, from this version's page."""
    config = tiny_system.get_config(name)
    config.update({"total_steps": 4, "checkpoint_every": 4, "keep_checkpoints": 1, **fields})
    config.optim.schedule = "constant"
    return Experiment.from_config(config)


@pytest.mark.parametrize("name", STAGES)
def test_its_configs_are_this_versions_experiments(name, system):
    folder = StageFolder(system, name)
    assert folder.experiment_file() == "config.json"
    assert stored_experiment(folder) == experiment_of(name)


def test_it_samples_the_same_image(system):
    image = d2.load(system).text2image("a large red circle", num=1, seed=3)[0]
    levels = np.abs(np.asarray(image, int) - np.asarray(Image.open(FIXTURE / "sampled.png"), int))
    assert levels.max() <= 1  # the recording is of another machine


def previous_scene(rng, looks, max_objects, jitter):
    """Scene of one object as version 0.1 samples it, with combinations that are held out now."""
    pairs = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]
    pairs = [pair for pair in pairs if pair not in shapes.HELD_OUT_PAIRS]
    assert int(rng.integers(1, max_objects + 1)) == 1
    (colour, shape), size, background = (
        values[rng.integers(len(values))] for values in (pairs, list(shapes.SIZES), list(shapes.BACKGROUNDS))
    )
    [place] = shapes._place_one(rng, jitter, EXTENT * shapes.radius_of(size, 1) + shapes._MARGIN)
    return Scene((SceneObject(shape, colour, size, *place),), background)


def test_its_decoder_resumes(system, monkeypatch):
    """On the data of version 0.1: the data set has changed, and the run has not."""
    monkeypatch.setattr(shapes, "_random_scene", previous_scene)
    longer = experiment_of("decoder", total_steps=6)
    state = train_stage(longer, system, show_progress=False)
    assert int(state.step) == 6
    expected = np.load(FIXTURE / "resumed.npz")
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.ema)}
    assert {*expected} == {*leaves} | {f"{name}#abs" for name in leaves}
    for name, leaf in leaves.items():
        size = np.abs(np.asarray(leaf, np.float64)).sum()
        np.testing.assert_allclose(size, expected[f"{name}#abs"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(leaf, np.float64).sum(), expected[name], atol=1e-5 * max(size, 1.0))
    folder = StageFolder(system, "decoder")
    assert folder.experiment_file() == "experiment.json"
    assert stored_experiment(folder) == longer
