"""Metrics: averaged, checked to be finite, written to disk and never twice, and shown on the bar."""

import errno
import json
import os
import resource
import signal
import threading

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import SystemWarning, UserError
from dalle2_jax.training.reporting.console import Console
from dalle2_jax.training.reporting.metrics import MetricWriter, mean_of_finite, truncate_after
from dalle2_jax.types import WeightedMean

METRICS = {"loss": 0.5, "examples_per_second": 8.0}


def history(**values):
    count = len(next(iter(values.values())))
    return [(10 + i, {name: np.float32(value[i]) for name, value in values.items()}) for i in range(count)]


def test_means_are_over_the_steps():
    means = mean_of_finite(history(loss=[1, 2, 6], grad_norm=[0, 0, 3]))
    assert means == {"loss": 3.0, "grad_norm": 1.0}


def test_a_weighted_mean_is_over_the_examples_and_omitted_without_any():
    rows = [
        ({"a": (3.0, 1.0), "b": (0.0, 0.0)}),
        ({"a": (0.0, 0.0), "b": (0.0, 0.0)}),
        ({"a": (9.0, 3.0), "b": (0, 0)}),
    ]
    steps = [
        (step, {name: WeightedMean(*map(np.float32, pair)) for name, pair in row.items()})
        for step, row in enumerate(rows)
    ]
    assert mean_of_finite(steps) == {"a": 3.0}
    steps[1][1]["b"] = WeightedMean(np.float32("nan"), np.float32(1))
    with pytest.raises(FloatingPointError, check=mentions("b", "nan", "step 1")):
        mean_of_finite(steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_named(bad):
    with pytest.raises(FloatingPointError, check=mentions("grad_norm", bad, "step 12")):
        mean_of_finite(history(loss=[1, 2, 3, bad], grad_norm=[0, 0, bad, bad]))


def test_the_loss_is_named_first():
    with pytest.raises(FloatingPointError, check=mentions("loss", "nan", "step 10")):
        mean_of_finite(history(grad_norm=[float("nan")], loss=[float("nan")]))


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_later_steps_and_incomplete_lines_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines[:2], "[]", '{"loss": 2}', '{"step": "x"}', *lines[2:], '{"step": 2, "lo']))
    truncate_after(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    truncate_after(tmp_path / "nothing.jsonl", 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_prepared_link_is_not_followed(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "metrics.tmp").symlink_to("kept")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    truncate_after(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "kept").read_text() == "kept" and (tmp_path / "metrics.jsonl").read_text() == ""


def test_metrics_are_written_to_the_file_and_tensorboard(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(5, METRICS)
        assert read(tmp_path) == [{"step": 5, **METRICS}]  # on disk at once
        writer.write(10, METRICS)
    assert [entry.name.split(".")[0] for entry in (tmp_path / "tensorboard").iterdir()] == ["events"]


def test_rejected_records_are_an_object_if_there_are_any(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(5, METRICS, {})
        writer.write(10, METRICS, {"not an image": 2, "digits: empty": 1})
    assert read(tmp_path) == [
        {"step": 5, **METRICS},
        {"step": 10, **METRICS, "rejected": {"not an image": 2, "digits: empty": 1}},
    ]
    events = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    assert b"rejected/not" in events


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    for first, steps in ((0, (5, 10, 15)), (10, (15, 20))):
        with MetricWriter(tmp_path, first) as writer:
            for step in steps:
                writer.write(step, METRICS | {"loss": float(first)})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(5, 0), (10, 0), (15, 10), (20, 10)]


@pytest.fixture
def small_disk():
    """Limits files to 20 kB, so that writing fails as on a full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_error_and_leaves_no_thread(tmp_path, capfd, small_disk, file):
    """tensorboardX's own writer prints a traceback in its thread, and blocks at the next event."""
    if file == "metrics.jsonl":
        (tmp_path / file).write_text(json.dumps({"step": 0, "note": "x" * 19_900}) + "\n")
    before = threading.active_count()
    with pytest.raises(UserError, check=mentions(tmp_path, os.strerror(errno.EFBIG))):
        with MetricWriter(tmp_path, 0) as writer:
            for step in range(1, 1_000):
                writer.write(step, METRICS if file == "metrics.jsonl" else {**METRICS, "n" * 2_000: 1.0})
    assert threading.active_count() == before and capfd.readouterr().err == ""


def test_the_bar_shows_steps_loss_and_rate(capsys):
    with Console("prior", 0, 20) as console:
        console.note("a line for the user")
        with console.compiling(True):
            pass
        console.advance(3)
        console.advance(2)  # never back
        console.show_metrics(10, METRICS)
    out, err = capsys.readouterr()
    assert "a line for the user\n" in out and "prior" in out and "10/20" in out and err == ""
    assert "loss 0.5000, 8 img/s" in out


def test_a_hidden_console_only_warns(capsys):
    with Console("prior", 0, 20, shown=False) as console:
        console.note("a line for the user")
        with console.compiling(True):
            pass
        console.show_metrics(10, METRICS)
        with pytest.warns(SystemWarning, match="is damaged"):
            console.warn("checkpoint 3 is damaged")
    assert capsys.readouterr() == ("", "")
