"""What a run prints, logs and measures, on a stage of one matrix."""

import dataclasses
import itertools
import logging
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from line_stage import ROWS, STEPS, Numbers, lines, make_job, same
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.stages.base import Variables
from dalle2_jax.training import feed, loop
from dalle2_jax.training.hooks import Hooks
from dalle2_jax.training.loop import train
from dalle2_jax.training.reporting import meter
from dalle2_jax.training.sharding import MeshConfig, make_mesh

# --- what it prints, and hooks ----------------------------------------------------------------


def test_a_banner_says_what_is_trained(tmp_path, capsys):
    job = dataclasses.replace(make_job(tmp_path), examples=12_345, config="configs/shapes.py:line")
    train(job)
    out = capsys.readouterr().out
    banner, compiling, compiled = [line for line in out.splitlines() if line.startswith("line: ") and "|" not in line]
    facts = ("1 cpu device", "64 parameters", "12,345 training images", "6 steps of 8", "configs/shapes.py:line")
    assert all(fact in banner for fact in facts) and str(job.folder.path) in banner
    assert "compiling" in compiling and "compiled" in compiled
    assert "6/6" in out and "img/s" in out and "loss " in out


def test_without_progress_nothing_is_printed(tmp_path, capsys):
    train(dataclasses.replace(make_job(tmp_path, total_steps=3), show_progress=False))
    job = dataclasses.replace(make_job(tmp_path), show_progress=False)
    for file in (job.folder.path / "checkpoints/3").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError):  # the only checkpoint is damaged
        train(job)
    assert capsys.readouterr() == ("", "")


def test_the_bar_moves_every_step_and_never_past_a_finished_one(tmp_path, monkeypatch):
    """Though the run logs once."""
    moved, advance = [], loop.Console.advance

    def follow(console, step):
        moved.append(step)
        advance(console, step)

    monkeypatch.setattr(loop.Console, "advance", follow)
    train(make_job(tmp_path, total_steps=20, log_every=20, checkpoint_every=20))
    # one call after each dispatched step, and one at the logged step
    assert moved == [1, 1, *range(1, 19), 20]


@pytest.mark.parametrize(("every", "evaluated"), [(0, []), (2, [2, 4, 5]), (4, [4, 5]), (9, [5])])
def test_an_evaluation_has_steps_of_its_own(tmp_path, every, evaluated):
    hooks = Hooks(evaluate=lambda variables, step: {"score": float(step)})
    run = {"total_steps": 5, "log_every": 3, "checkpoint_every": 3, "eval_every": every}
    job = dataclasses.replace(make_job(tmp_path, **run), hooks=hooks)
    train(job)
    scores = {line["step"]: line["score"] for line in lines(job) if "score" in line}
    assert scores == {step: float(step) for step in evaluated}
    assert [line["step"] for line in lines(job)] == sorted({3, 5, *evaluated})


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    def evaluate(variables, step):
        raise FloatingPointError("val/loss became nan at step 2")

    job = dataclasses.replace(make_job(tmp_path, eval_every=2), hooks=Hooks(evaluate=evaluate))
    with pytest.raises(UserError, check=mentions("val/loss", "nan", "step 2", "none")):
        train(job)


def test_the_learning_rate_and_the_decay_of_the_average_are_logged(tmp_path):
    job = make_job(tmp_path)
    train(job)
    logged = [(line["learning_rate"], line["ema_decay"]) for line in lines(job)]
    # warm-up over two steps to 0.01, then a cosine to zero over the other four
    rates = [0.005, 0.0075, *(0.005 * (1 + np.cos(np.pi * np.arange(4) / 4)))]
    decays = [(1 + step) / (10 + step) for step in range(1, STEPS + 1)]
    np.testing.assert_allclose(logged, np.stack([rates, decays], axis=1), rtol=1e-5)


def test_hooks_are_called_with_their_steps(tmp_path):
    calls = {"log": [], "checkpoint": [], "evaluate": []}

    def evaluate(variables, step):
        calls["evaluate"].append((step, variables))
        return {"score": float(step)}

    hooks = Hooks(
        log=lambda step, metrics: calls["log"].append((step, metrics)),
        checkpoint=calls["checkpoint"].append,
        evaluate=evaluate,
    )
    job = dataclasses.replace(make_job(tmp_path, log_every=2, checkpoint_every=3, eval_every=3), hooks=hooks)
    state = train(job)
    assert calls["checkpoint"] == [3, 6] and [step for step, _ in calls["evaluate"]] == [3, 6]
    same(calls["evaluate"][-1][1], state.averaged)
    assert [step for step, _ in calls["log"]] == [2, 3, 4, 6]
    assert [{"step": step, **metrics} for step, metrics in calls["log"]] == lines(job)
    assert [line.get("score") for line in lines(job)] == [None, 3.0, None, 6.0]


# --- speed ------------------------------------------------------------------------------------


def test_no_program_is_compiled_after_the_first_step(tmp_path, caplog, monkeypatch):
    steps, make_train_step = [], loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *args: steps.append(make_train_step(*args)) or steps[-1])

    def job(name, **run):
        return dataclasses.replace(make_job(tmp_path / name, **run), ema_decay=0.25)  # of no other test

    def compiled(name, **run):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            train(job(name, **run))
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    assert compiled("cold", total_steps=2) > 0
    assert compiled("few", total_steps=2) == compiled("many")
    train(job("few"))  # resumed
    assert [step._cache_size() for step in steps] == [1, 1, 1, 1]


def test_the_rate_excludes_compilation_and_previews(tmp_path, monkeypatch):
    now, previews = itertools.count(), []
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))

    def tick(make):
        def made(*args):
            step = make(*args)

            def timed(*args):
                clock.seconds += 2.0 if next(now) else 1000.0  # the first compiles
                return step(*args)

            return timed

        return made

    def preview(variables, step):
        previews.append((step, variables))
        clock.seconds += 500.0

    monkeypatch.setattr(loop, "make_train_step", tick(loop.make_train_step))
    monkeypatch.setattr(loop, "compile_ahead", lambda *_: None)  # no program
    job = make_job(tmp_path, preview=preview, log_every=3, sample_every=2)
    state = train(job)
    assert [line["step"] for line in lines(job)] == [3, 6]
    assert [line["examples_per_second"] for line in lines(job)] == [ROWS / 2, ROWS / 2]
    assert [step for step, _ in previews] == [2, 4, 6]
    same(previews[-1][1], Variables(state.ema, state.stats))


class Scalar:
    """A metric that a device computes when the host reads it."""

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
    monkeypatch.setattr(loop, "compile_ahead", lambda *_: None)  # no program
    train(make_job(tmp_path, total_steps=40, log_every=20, checkpoint_every=40))
    assert max(behind) == 1 + meter.AHEAD and len(given) == 40
    assert meter.idle([]) and meter.idle([(1, {"loss": Scalar(1, [1])})])
    assert not meter.idle([(1, {"loss": Scalar(1, [1])}), (2, {"loss": Scalar(2, [1])})])


@pytest.mark.parametrize(("idle", "share"), [(True, 1 / 4), (False, 0.0)])
def test_waiting_for_data_is_a_share_of_the_time(tmp_path, monkeypatch, idle, share):
    """Only waits in which the devices have nothing to compute count."""
    monkeypatch.setattr(meter, "idle", lambda _: idle)
    clock = SimpleNamespace(seconds=0.0)
    for module in (feed, meter):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))

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
    monkeypatch.setattr(loop, "compile_ahead", lambda *_: None)  # no program
    stream = Numbers(dict.fromkeys(range(STEPS + feed.PREFETCH), slow))
    job = make_job(tmp_path, stream, log_every=2, checkpoint_every=STEPS)
    train(job)
    assert [line["data_wait"] for line in lines(job)] == [share] * 3


def test_rejected_records_are_logged_with_the_step(tmp_path):
    rejected = {}

    def reject():
        rejected["empty"] = rejected.get("empty", 0) + 1
        return 1.0

    stream = Numbers({number: reject for number in (4, 7)})
    job = dataclasses.replace(make_job(tmp_path, stream), rejected=lambda: rejected)
    train(job)
    assert "rejected" not in lines(job)[0]
    counts = [line.get("rejected") for line in lines(job)]  # batches are read two steps ahead
    assert counts == [None, None, {"empty": 1}, {"empty": 1}, {"empty": 1}, {"empty": 2}]


def test_batches_are_read_ahead_with_their_position():
    stream, mesh = Numbers(), make_mesh(MeshConfig())
    for number, (batch, state, waited) in zip(range(4), feed.prefetched(stream, mesh), strict=False):
        assert float(batch["x"][0, 0]) == number and state == {"next": number + 1} and waited >= 0
        assert stream.next == number + 1 + feed.PREFETCH
