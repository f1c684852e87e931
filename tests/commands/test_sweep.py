"""Sweeps: their runs, commands, links and results."""

import json
import sys

import pytest
from raised import mentions

from dalle2_jax.cli.sweep import table
from dalle2_jax.config import sweep
from dalle2_jax.errors import UsageError, UserError

CONFIG = "tests/support/tiny_system.py:upsampler_1"


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_runs_are_those_of_the_page(tmp_path):
    runs = sweep.read_runs(CONFIG, tmp_path)
    assert [run.system.name for run in runs] == [
        "00_lr=0.001_total_steps=4",
        "01_lr=0.01_batch_size=0",
        "02_total_steps=6",
    ]
    (words,) = sweep.commands(CONFIG, runs[0], None)
    assert words[:4] == [sys.executable, "-m", "dalle2_jax", "train"]
    assert words[4:] == [
        *("--config", CONFIG, "--workdir", str(runs[0].system)),
        *("--config.optim.lr=0.001", "--config.total_steps=4"),
    ]


def test_labels_are_safe_folder_names():
    overrides = {"model.unet.channel_mult": (1, 2), "text.path": "../a b/c"}
    assert sweep.label(3, overrides) == "03_channel_mult=1,2_path=..abc"
    assert len(sweep.label(11, {"a": "x" * 300})) == 100


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ("tests/nothing.py:clip", "FILE:STAGE"),
        ("tests/support/tiny_system.py", "FILE:STAGE"),
        ("configs/paper.py:decoder", "function sweep"),
    ],
)
def test_a_config_without_a_sweep(config, fact, tmp_path):
    with pytest.raises(UsageError, check=mentions(config.partition(":")[0], fact)):
        sweep.read_runs(config, tmp_path)


def test_the_other_stages_are_linked(tmp_path):
    for stage in ("clip", "prior", "decoder"):
        _write(tmp_path / "system" / stage / "config.json", stage)
    _write(tmp_path / "system" / "notes" / "notes.txt", "not a stage")
    run = sweep.Run(tmp_path / "out" / "00_a=1", {"a": 1})
    for _ in range(2):  # a resumed sweep finds its links
        sweep.link_stages(tmp_path / "system", run, "decoder")
    assert {path.name for path in run.system.iterdir()} == {"clip", "prior"}
    assert (run.system / "clip" / "config.json").read_text() == "clip"
    with pytest.raises(UserError, check=mentions(tmp_path / "nowhere")):
        sweep.link_stages(tmp_path / "nowhere", run, "decoder")


def test_the_loss_is_the_mean_of_the_last_tenth(tmp_path):
    run = sweep.Run(tmp_path, {})
    assert sweep.read_figures(run, "prior", None) == {}
    _write(tmp_path / "prior" / "metrics.jsonl", "".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(20)))
    assert sweep.read_figures(run, "prior", None) == {"loss": 18.5}
    _write(tmp_path / "attributes" / "results.json", json.dumps({"matched": {"all": 0.9}, "shuffled": {"all": 0.1}}))
    assert sweep.read_figures(run, "prior", "attributes") == {"loss": 18.5, "all": 0.9}
    results = {"chance": 0.5, "n": {"a": 2}, "interval": {"a": [0, 1]}}
    _write(tmp_path / "retrieval" / "results.json", json.dumps(results))
    assert sweep.read_figures(run, "prior", "retrieval") == {"loss": 18.5, "chance": 0.5}
    lines = table({"00_a=1": {"loss": 18.5}, "01": {"loss": 1, "all": 0.25}}).splitlines()
    assert [line.split() for line in lines] == [["loss", "all"], ["00_a=1", "18.5000", "-"], ["01", "1.0000", "0.2500"]]


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    """The outcome of every run is written, and names the ones that failed."""
    executed = []

    def execute(command):
        executed.append(command)
        return "--config.batch_size=0" in command

    outcomes = sweep.sweep(CONFIG, tmp_path, measure="retrieval", execute=execute)
    assert [outcome.failed for outcome in outcomes] == [False, True, False]
    assert [command[3] for command in executed] == ["train", "evaluate", "train", "train", "evaluate"]
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert rows[1] == {"run": "01_lr=0.01_batch_size=0", "varied": {"optim.lr": 0.01, "batch_size": 0}}
    executed.clear()
    assert len(sweep.sweep(CONFIG, tmp_path, only=2, execute=execute)) == 3 and len(executed) == 1
    for only in (-1, 3):
        with pytest.raises(UsageError):
            sweep.sweep(CONFIG, tmp_path, only=only, execute=execute)
