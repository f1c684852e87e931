"""The loop on a stage of one matrix: resumed bit for bit, however it ended, and honest in what it reports."""

import dataclasses
import itertools
import json
import logging
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.stages.base import Outputs, Variables
from dalle2_jax.training import loop, sharding
from dalle2_jax.training.loop import Job, RunConfig, train
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import UserError
from dalle2_jax.workdir import Checkpoints, StageFolder

STEPS, ROWS = 6, 8
OPTIMIZER = make_optimizer(OptimConfig(lr=0.01, warmup_steps=2, schedule="cosine", weight_decay=0.1), STEPS)


@dataclasses.dataclass(frozen=True)
class Line:
    """Learns a matrix of the batch's numbers, with noise from its key, and counts its steps."""

    name: str = "line"
    borrows: tuple[str, ...] = ()

    def init(self, key):
        return Variables({"kernel": jax.random.normal(key, (8, 8))}, {"count": jnp.zeros(())})

    def prepare(self, frozen, batch):
        return batch

    def loss(self, params, stats, key, batch):
        noise = 0.1 * jax.random.normal(key, (8, 8))
        error = params["kernel"] - batch["x"].mean(axis=0)[None] + noise
        return jnp.square(error).mean(), Outputs({"noise": noise.sum()}, {"count": stats["count"] + 1})


class Numbers:
    """A stream of full batches of their own number. ``events`` happen when a batch of that number is drawn."""

    def __init__(self, events=None):
        self.next, self.events = 0, events or {}

    def __next__(self):
        number, self.next = self.next, self.next + 1
        event = self.events.get(number, float(number))
        return {"x": np.full((ROWS, 8), event() if callable(event) else event, np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        self.closed = True


def make_job(root, stream=None, mesh=None, preview=None, **run):
    folder = StageFolder(root, "line")
    folder.claim({"name": "line"})
    run = RunConfig(**{"total_steps": STEPS, "batch_size": ROWS, "log_every": 1, "checkpoint_every": 3} | run)
    mesh = mesh or make_mesh(MeshConfig())
    return Job(run, Line(), {}, OPTIMIZER, 0.9, stream or Numbers(), mesh, folder, preview)


def lines(job):
    return [json.loads(line) for line in (job.folder.path / "metrics.jsonl").read_text().splitlines()]


def saved(job, state):
    """The newest checkpoint, its trees those of ``state``."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return Checkpoints(job.folder).restore(abstract.trees())


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


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
    assert "line: continues from step 3" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(tmp_path, straight):
    first = make_job(tmp_path)
    train(first)
    again = make_job(tmp_path, Numbers({STEPS: lambda: pytest.fail("a batch was drawn")}))
    assert_equals_straight(again, train(again), straight)


@pytest.mark.parametrize("at", [4, 7])
def test_a_crash_loses_at_most_one_checkpoint_interval(tmp_path, straight, at):
    def crash():
        raise RuntimeError("the disk went away")

    with pytest.raises(RuntimeError, match="the disk went away"):
        train(make_job(tmp_path, Numbers({at: crash})))  # two batches are drawn ahead of the step
    with (tmp_path / "line/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    job = make_job(tmp_path)
    assert_equals_straight(job, train(job), straight)


@pytest.mark.parametrize("at", [0, 4, 6])
def test_bad_data_take_nothing_of_what_was_learnt(tmp_path, straight, at):
    """The run ends at once, its last step is saved, and the same command goes on."""

    def refuse():
        raise UserError("11 of 41 records are bad")

    with pytest.raises(UserError, match="records are bad"):
        train(make_job(tmp_path, Numbers({at: refuse}), checkpoint_every=100))
    job = make_job(tmp_path)
    assert job.folder.latest_step() == (at - loop.PREFETCH if at > loop.PREFETCH else None)
    assert_equals_straight(job, train(job), straight)


def test_a_loss_that_was_lost_before_the_data_were_is_not_saved(tmp_path):
    def refuse():
        raise UserError("11 of 41 records are bad")

    job = make_job(tmp_path, Numbers({2: float("nan"), 5: refuse}), checkpoint_every=100, log_every=100)
    with pytest.raises(UserError, match="loss became nan at step 3; the last good checkpoint is none"):
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
    assert "checkpoints/6 cannot be read (" in out and "line: continues from step 4" in out


def test_a_run_may_go_on_over_another_mesh(tmp_path, straight, monkeypatch):
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

    with pytest.raises(UserError, match="interrupted at step 3, which is saved; the same command continues"):
        train(make_job(tmp_path, Numbers({4: interrupt}), checkpoint_every=100))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    job = make_job(tmp_path)
    assert job.folder.latest_step() == 3
    assert_equals_straight(job, train(job), straight)


def test_a_signal_between_saving_and_the_end_of_a_step_is_not_lost(tmp_path):
    job = make_job(tmp_path, preview=lambda *_: terminate(), sample_every=2, checkpoint_every=100)
    with pytest.raises(UserError, match=r"interrupted at step (\d), which is saved") as error:
        train(job)
    assert f"step {job.folder.latest_step()}," in str(error.value)


def test_a_signal_in_the_last_step_is_too_late(tmp_path, straight):
    job = make_job(tmp_path, preview=lambda *_: terminate(), sample_every=100)
    assert_equals_straight(job, train(job), straight)


# --- not finite -------------------------------------------------------------------------------


def test_nan_stops_with_step_metric_and_last_good_checkpoint(tmp_path, straight):
    job = make_job(tmp_path, Numbers({4: float("nan")}), log_every=3)
    with pytest.raises(UserError, match="loss became nan at step 5; the last good checkpoint is step 3") as error:
        train(job)
    assert "\n" not in str(error.value)
    assert job.folder.latest_step() == 3
    assert all(np.isfinite(line["loss"]) and line["step"] < 5 for line in lines(job))
    again = make_job(tmp_path)
    same(train(again), straight[1])


def test_nan_at_the_first_step_leaves_no_checkpoint(tmp_path):
    job = make_job(tmp_path, Numbers({0: float("inf")}))
    with pytest.raises(UserError, match="at step 1; the last good checkpoint is none"):
        train(job)
    assert job.folder.latest_step() is None and lines(job) == []


# --- speed ------------------------------------------------------------------------------------


def test_no_program_is_compiled_after_the_first_step(tmp_path, caplog, monkeypatch):
    steps, make_train_step = [], loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *args: steps.append(make_train_step(*args)) or steps[-1])

    def compiled(name, **run):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            train(make_job(tmp_path / name, **run))
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    compiled("warm", total_steps=2)
    few, many = compiled("few", total_steps=2), compiled("many")
    assert few == many > 0
    train(make_job(tmp_path / "few"))  # resumed
    assert [step._cache_size() for step in steps] == [1, 1, 1, 1]


def test_the_rate_counts_steps_and_not_compiling_or_pictures(tmp_path, monkeypatch):
    now, drawn = itertools.count(), []
    clock = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.seconds))

    def tick(make):
        def made(*args):
            step = make(*args)

            def timed(*args):
                clock.seconds += 2.0 if next(now) else 1000.0  # the first compiles
                return step(*args)

            return timed

        return made

    def preview(variables, step):
        drawn.append((step, variables))
        clock.seconds += 500.0

    monkeypatch.setattr(loop, "make_train_step", tick(loop.make_train_step))
    job = make_job(tmp_path, preview=preview, log_every=3, sample_every=2)
    state = train(job)
    assert [line["step"] for line in lines(job)] == [3, 6]
    assert [line["examples_per_second"] for line in lines(job)] == [ROWS / 2, ROWS / 2]
    assert [step for step, _ in drawn] == [2, 4, 6]
    same(drawn[-1][1], Variables(state.ema, state.stats))


class Scalar:
    """A metric that a device computes when it is asked for it."""

    def __init__(self, step, computed):
        self.step, self.computed = step, computed

    def block_until_ready(self):
        self.computed.append(self.step)
        return self

    def is_ready(self):
        return self.step in self.computed

    def __array__(self, dtype=None, copy=None):
        return np.float32(self.block_until_ready().step)


def test_the_host_is_few_steps_ahead_of_the_devices(tmp_path, monkeypatch):
    computed, given, behind, make_train_step = [], [], [], loop.make_train_step

    def slow(*args):
        step = make_train_step(*args)

        def stepped(*args):
            given.append(len(given) + 1)
            behind.append(len(given) - max(computed, default=0))
            return step(*args)[0], {"loss": Scalar(given[-1], computed)}

        return stepped

    monkeypatch.setattr(loop, "make_train_step", slow)
    train(make_job(tmp_path, total_steps=40, log_every=20, checkpoint_every=40))
    assert max(behind) == 1 + loop.AHEAD and len(given) == 40
    assert loop.idle([]) and loop.idle([(1, {"loss": Scalar(1, [1])})])
    assert not loop.idle([(1, {"loss": Scalar(1, [1])}), (2, {"loss": Scalar(2, [1])})])


@pytest.mark.parametrize(("idle", "share"), [(True, 1 / 4), (False, 0.0)])
def test_waiting_for_data_is_a_share_of_the_time(tmp_path, monkeypatch, idle, share):
    """Of the time in which the devices had nothing left to compute."""
    monkeypatch.setattr(loop, "idle", lambda _: idle)
    clock = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.seconds))

    def slow():
        clock.seconds += 1.0
        return 1.0

    def timed(*args):
        step = make_train_step(*args)

        def took_three(*args):
            clock.seconds += 3.0
            return step(*args)

        return took_three

    make_train_step = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", timed)
    stream = Numbers(dict.fromkeys(range(STEPS + loop.PREFETCH), slow))
    job = make_job(tmp_path, stream, log_every=2, checkpoint_every=STEPS)
    train(job)
    assert [line["data_wait"] for line in lines(job)] == [share] * 3


def test_refused_records_are_logged_as_they_are_at_that_step(tmp_path):
    refused = {}

    def refuse():
        refused["empty"] = refused.get("empty", 0) + 1
        return 1.0

    stream = Numbers({number: refuse for number in (4, 7)})
    job = dataclasses.replace(make_job(tmp_path, stream), rejected=lambda: refused)
    train(job)
    assert "rejected" not in lines(job)[0]
    told = [line.get("rejected") for line in lines(job)]  # batches are drawn two ahead
    assert told == [None, None, {"empty": 1}, {"empty": 1}, {"empty": 1}, {"empty": 2}]


def test_batches_are_drawn_ahead_and_keep_their_place():
    stream = Numbers()
    for number, (batch, state, waited) in zip(range(4), loop.prefetched(stream, make_mesh(MeshConfig())), strict=False):
        assert float(batch["x"][0, 0]) == number and state == {"next": number + 1} and waited >= 0
        assert stream.next == number + 1 + loop.PREFETCH
