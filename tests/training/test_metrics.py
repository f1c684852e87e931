"""Numbers on their way out: averaged, refused where they are not finite, never written twice."""

import json

import numpy as np
import pytest

from dalle2_jax.training.metrics import MetricWriter, mean_of_finite, truncate_after
from dalle2_jax.types import UserError

METRICS = {"loss": 0.5, "examples_per_second": 8.0}


def history(**values):
    count = len(next(iter(values.values())))
    return [(10 + i, {name: np.float32(value[i]) for name, value in values.items()}) for i in range(count)]


def test_means_are_over_the_steps():
    means = mean_of_finite(history(loss=[1, 2, 6], grad_norm=[0, 0, 3]), 0)
    assert means == {"loss": 3.0, "grad_norm": 1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(bad):
    with pytest.raises(UserError, match=f"grad_norm became {bad} at step 12; the last good checkpoint is step 8"):
        mean_of_finite(history(loss=[1, 2, 3, bad], grad_norm=[0, 0, bad, bad]), 8)


def test_of_several_that_are_not_finite_the_loss_is_named():
    with pytest.raises(UserError, match="loss became nan at step 10"):
        mean_of_finite(history(grad_norm=[float("nan")], loss=[float("nan")]), 0)


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_steps_to_come_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join([*lines[:2], "[]", '{"loss": 2}', '{"step": "x"}', *lines[2:], '{"step": 2, "lo']))
    truncate_after(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    truncate_after(tmp_path / "nothing.jsonl", 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_number_reaches_the_file_the_bar_and_tensorboard(tmp_path, capsys):
    with MetricWriter(tmp_path, "prior", 0, 20) as writer:
        writer.write(5, METRICS)
        writer.say("a line for the user")
        assert read(tmp_path) == [{"step": 5, **METRICS}]  # on disk at once
        writer.write(10, METRICS)
    out, err = capsys.readouterr()
    assert "a line for the user\n" in out and "prior" in out and "10/20" in out and err == ""
    assert "loss 0.5000, 8 examples/s" in out
    assert [entry.name.split(".")[0] for entry in (tmp_path / "tensorboard").iterdir()] == ["events"]


def test_refused_records_are_an_object_of_their_own_when_there_are_any(tmp_path):
    with MetricWriter(tmp_path, "prior", 0, 20) as writer:
        writer.write(5, METRICS, {})
        writer.write(10, METRICS, {"not a picture": 2, "digits: empty": 1})
    assert read(tmp_path) == [
        {"step": 5, **METRICS},
        {"step": 10, **METRICS, "rejected": {"not a picture": 2, "digits: empty": 1}},
    ]
    events = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    assert b"rejected/not" in events


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    for first, steps in ((0, (5, 10, 15)), (10, (15, 20))):
        with MetricWriter(tmp_path, "prior", first, 20) as writer:
            for step in steps:
                writer.write(step, METRICS | {"loss": float(first)})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(5, 0), (10, 0), (15, 10), (20, 10)]
