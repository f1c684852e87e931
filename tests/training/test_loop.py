"""The training loop on a stage of one matrix: resumed bit for bit, however it ended, and correct in its reports."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from line_stage import STEPS, Numbers, lines, make_job, same, saved
from raised import mentions

from dalle2_jax.errors import Interrupted, UserError
from dalle2_jax.training import feed, sharding
from dalle2_jax.training.loop import train
from dalle2_jax.training.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run: its job and its last state."""
    job = make_job(tmp_path_factory.mktemp("straight"))
    return job, train(job)


def assert_equals_straight(job, state, straight):
    same(state, straight[1])
    checkpoint = saved(job, state)
    assert (checkpoint.step, checkpoint.data_state) == (STEPS, {"next": STEPS})
    same(checkpoint.trees, state.trees())
    assert [line["step"] for line in lines(job)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines(job)] == [line["loss"] for line in lines(straight[0])]


def test_a_run_reports_every_step(straight):
    job, state = straight
    assert int(state.step) == int(state.stats["count"]) == STEPS
    written = lines(job)
    assert [line["step"] for line in written] == list(range(1, STEPS + 1))
    assert all({"loss", "examples_per_second", "grad_norm", "noise", "data_wait"} <= line.keys() for line in written)
    assert len({line["noise"] for line in written}) == STEPS  # each step has a key of its own
    assert all(line["examples_per_second"] > 0 for line in written[1:])  # the first step compiles: no time is taken
    assert sorted(os.listdir(job.folder.path / "checkpoints")) == ["3", "6"]
    assert os.listdir(job.folder.path / "tensorboard") and job.stream.closed


def test_a_longer_run_continues_a_shorter_one(tmp_path, straight, capsys):
    train(make_job(tmp_path, total_steps=3))
    job = make_job(tmp_path)
    assert_equals_straight(job, train(job), straight)
    assert "from step 3" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(tmp_path, straight):
    first = make_job(tmp_path)
    train(first)
    again = make_job(tmp_path, Numbers({STEPS: lambda: pytest.fail("a batch was read")}))
    assert_equals_straight(again, train(again), straight)


@pytest.mark.parametrize("at", [4, 7])
def test_a_crash_loses_at_most_one_checkpoint_interval(tmp_path, straight, at):
    error = RuntimeError("the disk went away")

    def crash():
        raise error

    with pytest.raises(RuntimeError, check=lambda raised: raised is error):
        train(make_job(tmp_path, Numbers({at: crash})))  # two batches are read ahead of the step
    with (tmp_path / "line/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    job = make_job(tmp_path)
    assert_equals_straight(job, train(job), straight)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_bad_data_lose_no_finished_step(tmp_path, straight, at):
    """The run ends at once, its last step is saved, and the same command continues."""

    def fail():
        raise UserError("11 of 41 records are bad")

    with pytest.raises(UserError, check=mentions("11 of 41 records")):
        train(make_job(tmp_path, Numbers({at: fail}), checkpoint_every=100))
    job = make_job(tmp_path)
    assert job.folder.latest_step() == (at - feed.PREFETCH if at > feed.PREFETCH else None)
    assert_equals_straight(job, train(job), straight)


def test_a_nan_before_bad_data_is_not_saved(tmp_path):
    def fail():
        raise UserError("11 of 41 records are bad")

    job = make_job(tmp_path, Numbers({2: float("nan"), 5: fail}), checkpoint_every=100, log_every=100)
    with pytest.raises(UserError, check=mentions("loss", "nan", "step 3", "none")):
        train(job)
    assert job.folder.latest_step() is None


def test_a_damaged_checkpoint_costs_one_interval_more(tmp_path, straight, capsys):
    job = make_job(tmp_path, checkpoint_every=2, keep_checkpoints=3)
    train(job)
    for file in (job.folder.path / "checkpoints/6").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    again = make_job(tmp_path, checkpoint_every=2)
    assert_equals_straight(again, train(again), straight)
    out = capsys.readouterr().out
    assert "checkpoints/6" in out and "from step 4" in out


@pytest.mark.sharding
def test_a_run_may_continue_on_another_mesh(tmp_path, straight, monkeypatch):
    monkeypatch.setattr(sharding, "SIZE_FLOOR", 8)
    train(make_job(tmp_path, total_steps=3))
    state = train(make_job(tmp_path, mesh=make_mesh(MeshConfig(2, 4, 1))))
    assert state.params["kernel"].addressable_shards[0].data.size == 16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, straight[1])


# --- signals ----------------------------------------------------------------------------------


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    return 0.0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(tmp_path, straight, signal_number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupt():
        os.kill(os.getpid(), signal_number)
        return 4.0

    with pytest.raises(Interrupted, check=mentions("step 2", number=signal_number)):
        train(make_job(tmp_path, Numbers({4: interrupt}), checkpoint_every=100))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    job = make_job(tmp_path)
    assert job.folder.latest_step() == 2
    assert_equals_straight(job, train(job), straight)


@pytest.mark.parametrize(("index", "saved"), [(1, None), (4, 2)])
def test_a_signal_while_waiting_for_a_batch(tmp_path, straight, index, saved):
    """The loop does not wait for it; before the first step there is nothing to save."""

    def never():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(Interrupted) as error:
        train(make_job(tmp_path, Numbers({index: never}), checkpoint_every=100))
    assert error.value.number == signal.SIGTERM and time.monotonic() - start < 30
    job = make_job(tmp_path)
    assert job.folder.latest_step() == saved
    assert_equals_straight(job, train(job), straight)


def test_a_signal_between_saving_and_the_end_of_a_step_is_not_lost(tmp_path):
    job = make_job(tmp_path, preview=lambda *_: terminate(), sample_every=2, checkpoint_every=100)
    with pytest.raises(Interrupted, check=lambda error: mentions(f"step {job.folder.latest_step()}")(error)):
        train(job)


def test_a_signal_in_the_last_step_is_too_late(tmp_path, straight):
    job = make_job(tmp_path, preview=lambda *_: terminate(), sample_every=100)
    assert_equals_straight(job, train(job), straight)


# --- not finite -------------------------------------------------------------------------------


def test_nan_stops_with_step_metric_and_last_good_checkpoint(tmp_path, straight):
    job = make_job(tmp_path, Numbers({4: float("nan")}), log_every=3)
    with pytest.raises(UserError, check=mentions("loss", "nan", "step 5", "step 3")):
        train(job)
    assert job.folder.latest_step() == 3
    assert all(np.isfinite(line["loss"]) and line["step"] < 5 for line in lines(job))
    again = make_job(tmp_path)
    same(train(again), straight[1])


def test_nan_at_the_first_step_leaves_no_checkpoint(tmp_path):
    job = make_job(tmp_path, Numbers({0: float("inf")}))
    with pytest.raises(UserError, check=mentions("loss", "inf", "step 1", "none")):
        train(job)
    assert job.folder.latest_step() is None and lines(job) == []
