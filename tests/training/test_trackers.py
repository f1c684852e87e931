"""Trackers: the calls that each package gets, a run that continues, and one that fails in the middle of training."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from line_stage import lines, make_job
from raised import mentions

from dalle2_jax.config.parse import expand
from dalle2_jax.errors import ConfigError, SystemWarning
from dalle2_jax.training.loop import RunConfig, train
from dalle2_jax.training.reporting.trackers import TRACKERS, make_tracker


class Package:
    """Stands for the package of a tracker: records its calls, and has the runs of all three."""

    def __init__(self):
        self.calls, self.info = [], SimpleNamespace(run_id="given")

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call

    def named(self, name):
        return [(args, options) for called, args, options in self.calls if called == name]


@pytest.fixture(params=TRACKERS)
def package(request, monkeypatch):
    """The name of a tracker and its package."""
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    stand_in = Package()
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    return request.param, stand_in


def run(root, name, **fields):
    """Trains a stage with a tracker; returns its logged lines."""
    job = dataclasses.replace(make_job(root, log_every=2, **fields), tracker=make_tracker(name))
    train(job)
    return lines(job)


def logged(name, package):
    """The (step, metrics) that a package got."""
    if name == "wandb":
        return [
            ({**args[0]}.pop("step"), {k: v for k, v in args[0].items() if k != "step"})
            for args, _ in package.named("log")
        ]
    calls = package.named({"trackio": "log", "mlflow": "log_metrics"}[name])
    return [(options["step"], args[0]) for args, options in calls]


START = {"wandb": "init", "trackio": "init", "mlflow": "start_run"}
IDENTIFIER = {"wandb": "id", "trackio": "name", "mlflow": "run_id"}
FINISH = {"wandb": "finish", "trackio": "finish", "mlflow": "end_run"}


def test_a_tracker_gets_what_metrics_jsonl_has_and_a_resumed_run_continues(tmp_path, package):
    name, stand_in = package
    run(tmp_path, name, total_steps=3)
    written = run(tmp_path, name)
    assert [{"step": step, **metrics} for step, metrics in logged(name, stand_in)] == written
    first, second = (options[IDENTIFIER[name]] for _, options in stand_in.named(START[name]))
    assert second == (first or "given") and len(stand_in.named(FINISH[name])) == 2
    if name == "mlflow":
        [(config, _)] = stand_in.named("log_dict")
        assert first is None and config[0] == {"name": "line"}
    else:
        assert all(o["config"] == {"name": "line"} and o["resume"] == "allow" for _, o in stand_in.named("init"))


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(tmp_path, call, monkeypatch):
    calls = []

    class Failing:
        def __getattr__(self, name):
            def act(*args):
                calls.append(name)
                if name == call:
                    raise ConnectionError("no\nroute")
                return "run"

            return act

    job = dataclasses.replace(make_job(tmp_path), tracker=Failing(), show_progress=False)
    with pytest.warns(SystemWarning, match=r"Failing .*ConnectionError: no route") as warned:
        train(job)
    assert len(lines(job)) == 6 and len(warned) == 1
    assert calls.count(call) == 1 and calls[-1] == call


def test_a_missing_package_and_an_unknown_tracker_name_the_field(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, check=mentions("pip install wandb", field="tracker")):
        make_tracker("wandb")
    with pytest.raises(ConfigError, check=mentions("'wanb'", "'wandb'")):
        expand(RunConfig, {"tracker": "wanb"}, "")
    assert make_tracker("") is None
