"""Distillation from a trained system to a system of few steps: what is trained, stored, loaded, sampled and resumed.

The teacher is a tiny system as an importer writes it: random weights, whose images are noise.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_system
from raised import mentions
from written_system import write_system

import dalle2_jax as d2
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.page_defaults import distilled
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.run import build_job
from dalle2_jax.stages import fingerprint
from dalle2_jax.system import load
from dalle2_jax.training.loop import train

PAGE = "tests/support/tiny_system.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("teacher") / "runs" / "slow")


def experiment_of(which, teacher, steps="4/2", **fields):
    """A student of two steps, each of two of the teacher's; ``a__b`` is the field a.b."""
    config = distilled(tiny_system.get_config(which), {"steps": "4"}, steps, str(teacher), total_steps=4)
    config.checkpoint_every = 2
    config.optim.update(warmup_steps=0, schedule="constant")
    if which == "decoder":
        config.teacher.guidance = 2.0
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in fields.items()})
    return Experiment.from_config(config)


def job_of(which, teacher, root, **fields):
    return build_job(experiment_of(which, teacher, **fields), root, f"{PAGE}:{which}")


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def fast(teacher, tmp_path_factory):
    """A workdir with a distilled decoder, and the state that its training ended in."""
    root = tmp_path_factory.mktemp("fast") / "runs" / "fast"
    job = job_of("decoder", teacher, root)
    before = jax.tree.map(np.asarray, job.frozen["decoder"].params)
    state = train(job)
    same(before, job.frozen["decoder"].params)  # the teacher is not trained, nor donated to the first step
    return root, state


def test_a_distilled_decoder_is_sampled_in_its_own_steps(fast, teacher, mesh):
    root, state = fast
    members = load.load_system(root, mesh, load.cascade_stages(root))
    loaded, theirs = members["decoder"], load.load_system(teacher, mesh, ("clip", "decoder"))["decoder"]
    same(loaded.variables.params, state.ema)
    trees = state.ema, theirs.variables.params
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, trees), strict=True))
    assert (loaded.stage.sampling.steps, loaded.stage.teacher.guidance) == ("4/2", 2.0)
    assert loaded.stage.diffusion.prediction == "v"
    stored = json.loads((root / "decoder" / "base.json").read_text())
    assert stored == {"weights": fingerprint(theirs.variables.params)}
    counted = []
    images = d2.load(root).text2image(
        "a red circle", num=1, callback=lambda step, x_0: counted.append((step, x_0.shape[1]))
    )
    assert [step for step, side in counted if side == 8] == [1, 2]  # and then the upsampler's
    assert images.provenance["sampling"]["decoder"]["steps"] == "4/2"
    with pytest.raises(ConfigError, check=mentions("'4/2'", field="decoder.steps")):
        d2.load(root).text2image("a red circle", num=1, decoder={"steps": 4})
    with pytest.raises(ConfigError, check=mentions("teacher.guidance", field="decoder.guidance")):
        d2.load(root).text2image("a red circle", num=1, decoder={"guidance": 3.0})


def test_a_resumed_student_equals_an_uninterrupted_one(fast, teacher, tmp_path):
    train(job_of("decoder", teacher, tmp_path / "halves", total_steps=2))
    job = job_of("decoder", teacher, tmp_path / "halves")
    assert job.start == (None, None) and "decoder" in job.frozen
    same(fast[1], train(job))


def test_the_teacher_is_needed_for_training_alone(fast, teacher, mesh, tmp_path):
    """Without it the run does not continue, and the stage still loads; with other weights it is another teacher."""
    gone = tmp_path / "runs" / "gone"
    shutil.copytree(teacher, gone)
    train(job_of("prior", gone, tmp_path / "mine", total_steps=2))
    shutil.copytree(gone / "clip", tmp_path / "clip")
    shutil.rmtree(gone)
    (tmp_path / "mine" / "clip").unlink()
    (tmp_path / "mine" / "clip").symlink_to(tmp_path / "clip")
    with pytest.raises(UserError, check=mentions("stage prior", gone, "init_from")):
        job_of("prior", gone, tmp_path / "mine")
    loaded = load.load_system(tmp_path / "mine", mesh, ("clip", "prior"))["prior"]
    assert loaded.stage.sampling.steps == "4/2" and loaded.stage.teacher.guidance == 1.0
    write_system(gone, seed=1)
    shutil.rmtree(gone / "clip")
    shutil.copytree(tmp_path / "clip", gone / "clip")
    with pytest.raises(UserError, check=mentions("student", gone / "prior")):
        job_of("prior", gone, tmp_path / "mine")


def test_a_teacher_must_be_sampled_as_its_stage_allows(fast, teacher, tmp_path):
    """A distilled stage is a teacher in its own steps only; a student of it has fewer."""
    root, _ = fast
    with pytest.raises(ConfigError, check=mentions("decoder.steps", "'4/2'", field="teacher")):
        job_of("decoder", root, tmp_path / "again", teacher__guidance=1.0)
    with pytest.raises(ConfigError, check=mentions("decoder.guidance")):
        job_of("decoder", root, tmp_path / "again", teacher__steps="4/2", sampling__steps="4/2/1")
    assert not (tmp_path / "again").exists()
    given = {"teacher__steps": "4/2", "sampling__steps": "4/2/1", "teacher__guidance": 1.0}
    job = job_of("decoder", root, tmp_path / "again", **given)
    assert job.stage.student_steps.student.num_steps == 1


@pytest.mark.sharding
def test_sharded_weights_train_the_same_student(teacher, tmp_path):
    """Up to the order of sums."""
    states = []
    for name, mesh in (("replicated", {}), ("sharded", {"mesh__data": 2, "mesh__fsdp": 4})):
        states.append(train(job_of("prior", teacher, tmp_path / name, total_steps=2, **mesh)))
    for one, other in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-4)
