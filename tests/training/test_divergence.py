"""Divergence is found before anything of it is saved; optimizer fields may change when a run continues."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions
from test_loop import STEPS, Numbers, make_job, same, saved

from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UserError
from dalle2_jax.training.divergence import NAMES, not_finite
from dalle2_jax.training.loop import train
from dalle2_jax.training.optim import OptimConfig, learning_rate, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, tree_shardings
from dalle2_jax.training.state import TrainState
from dalle2_jax.workdir.checkpoints import Checkpoints

NAN, INF = float("nan"), float("inf")


def state(**changes):
    """A state of one number in each part, and of integers, over eight devices where it is large."""
    trees = {name: {"a": jnp.ones((8, 4096)), "count": jnp.zeros((), jnp.int32)} for name in NAMES}
    for name, value in changes.items():
        trees[name]["a"] = trees[name]["a"].at[5, 17].set(value)
    state = TrainState.from_trees(3, trees)
    return jax.device_put(state, tree_shardings(state, make_mesh(MeshConfig(1, 8, 1))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.sharding
def test_every_part_of_a_state_is_checked(name, value):
    assert not_finite(state(**{name: value})) == NAMES[name]


@pytest.mark.sharding
def test_large_and_whole_numbers_are_finite():
    assert not_finite(state(params=3e38, ema=-3e38)) is None


def with_rate(job, lr, **fields):
    return dataclasses.replace(job, optimizer=make_optimizer(OptimConfig(lr=lr, **fields), STEPS))


@pytest.mark.parametrize("rate", [NAN, 3e38])
def test_a_finite_loss_of_weights_that_are_not_is_no_success(tmp_path, rate, capsys):
    """The loss of the only step was taken before its update."""
    job = dataclasses.replace(with_rate(make_job(tmp_path, total_steps=1), rate, weight_decay=9.0), remedy="Lower it")
    assert run_cli.run_cli(lambda: train(job)) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert mentions("step 1", "none", job.remedy)(line)
    assert job.folder.latest_step() is None


def test_the_last_checkpoint_stays_good(tmp_path):
    train(make_job(tmp_path, total_steps=3))
    job = with_rate(make_job(tmp_path, total_steps=4), NAN)
    with pytest.raises(UserError, check=mentions("learning_rate", "nan", "step 4", "step 3")):
        train(job)
    assert job.folder.latest_step() == 3


def test_bad_data_do_not_save_what_is_not_finite(tmp_path):
    def fail():
        raise UserError("11 of 41 records are bad")

    job = make_job(tmp_path, Numbers({3: fail}), checkpoint_every=100)  # ends after step 1
    with pytest.raises(UserError, check=mentions("learning_rate", "nan", "step 1", "none")):
        train(with_rate(job, NAN))
    assert job.folder.latest_step() is None


@pytest.mark.parametrize("steps", [3, STEPS])
def test_a_checkpoint_that_is_not_finite_is_named(tmp_path, steps):
    """Of an earlier release, whether its run was over or not; without it the run continues from the one before."""
    job = make_job(tmp_path, total_steps=3, checkpoint_every=1)
    last = train(job)
    lost = last.replace(ema=jax.tree.map(lambda leaf: leaf * NAN, last.ema))
    checkpoints = Checkpoints(job.folder)
    checkpoints.save(3, lost.trees(), {"next": 3})
    checkpoints.wait()
    path = job.folder.path / "checkpoints" / "3"
    with pytest.raises(UserError, check=mentions(path, "averaged parameters")):
        train(make_job(tmp_path, total_steps=steps))
    shutil.rmtree(path)
    same(train(make_job(tmp_path, total_steps=3)), last)


# --- other optimizer fields -------------------------------------------------------------------


def test_the_new_schedule_continues_from_the_restored_step(tmp_path):
    """With both betas 0, Adam's update is the learning rate times the gradient's sign."""
    plain = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-30}
    before = train(with_rate(make_job(tmp_path, total_steps=3), 0.01, **plain)).params["kernel"]
    new = OptimConfig(lr=0.1, warmup_steps=5, **plain)
    after = train(with_rate(make_job(tmp_path, total_steps=4), 0.1, warmup_steps=5, **plain)).params["kernel"]
    rate = float(learning_rate(new, STEPS)(3))
    assert 0.05 < rate < 0.1
    np.testing.assert_allclose(np.abs(after - before), rate, rtol=1e-3)


def test_a_resumed_run_may_have_another_optimizer(tmp_path):
    train(make_job(tmp_path, total_steps=3))
    fields = {"schedule": "constant", "beta1": 0.5, "weight_decay": 0.0, "clip_norm": 5.0}
    job = with_rate(make_job(tmp_path, total_steps=4), 0.02, **fields)
    last = train(job)
    assert int(last.step) == 4 and saved(job, last).step == 4
