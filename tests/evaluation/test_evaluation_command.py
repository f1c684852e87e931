"""What the measures print and write: every figure with n and its 95 % interval."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_system

from dalle2_jax import data
from dalle2_jax.cli import evaluate as command
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.specs import SPECS
from dalle2_jax.config.stored import write_experiment
from dalle2_jax.data.synthetic import digits
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation import bound, examples, measures
from dalle2_jax.evaluation.intervals import wilson
from dalle2_jax.system import PRIORS
from dalle2_jax.system.images import Images
from dalle2_jax.workdir.folder import StageFolder

SHAPES = data.ShapesSource("val", 64, max_objects=1)


def options(name, **fields):
    given = {"out": None, "split": "val", "num": 20, "data": None, "trust_system": False, "seed": 1}
    given |= {"batch_size": 4, "system": Path("runs/none")}
    return argparse.Namespace(**{"command": name, **given, **fields})


class Perfect:
    """A system that generates given images."""

    def __init__(self, pixels, path=Path("runs/none")):
        self.path, self.stages, self._pixels = path, {}, pixels

    def text2image(self, captions, num, seed, batch_size, progress):
        assert num == 1 and len(captions) == len(self._pixels)
        images = [{"file": f"{i}_0.png"} for i in range(len(captions))]
        return Images(self._pixels, tuple(captions), {"command": "text2image", "seed": seed, "pictures": images})


def measured(result, capsys):
    """A measure's result, as it is written to results.json, and the numbers that it prints in each line."""
    lines = capsys.readouterr().out.splitlines()
    return json.loads(json.dumps(result)), {line.split()[0]: re.findall(r"-?\d+\.?\d*", line) for line in lines}


def test_attributes(monkeypatch, capsys):
    monkeypatch.setattr(examples, "open_source", lambda *_: SHAPES)
    system = Perfect(np.stack([data.example(SHAPES, index)["image"] for index in range(20)]))
    monkeypatch.setattr(command, "load_system", lambda _: system)
    measure = command.measure_rates(options("attributes"))
    result, printed = measured(measure.to_json(), capsys)
    assert result["n"]["all"] == 20 and result["n"]["background"] < 20
    assert result["interval"].keys() == {"matched", "shuffled"}
    for column, ends in result["interval"].items():
        assert ends.keys() == result[column].keys() == result["n"].keys()
        for name, interval in ends.items():
            assert interval == pytest.approx(wilson(result[column][name], result["n"][name]))
    assert printed["all"][:4] == ["20", "100.0", "83.9", "100.0"]
    assert measures.image_grid(measure).shape[2] == 3


def test_digits(monkeypatch, capsys, tmp_path):
    scans = digits.load("val")
    wanted = np.stack([scans.images[scans.labels == number][:2] for number in range(10)])
    config = {**tiny_system.get_config("decoder").to_dict(), "data": {"kind": "folder", "path": "not there"}}
    write_experiment(StageFolder(tmp_path, "decoder"), Experiment.from_config(config))
    system = Perfect(wanted.swapaxes(0, 1).reshape(20, 32, 32, 3), tmp_path)
    monkeypatch.setattr(command, "load_system", lambda _: system)
    result, printed = measured(command.measure_rates(options("digits", system=tmp_path)).to_json(), capsys)
    assert result["n"] == {"accuracy": 20, "shuffled": 20, "real_val": len(scans.labels)}
    for name, interval in result["interval"].items():
        assert interval == pytest.approx(wilson(result[name], result["n"][name]))
    assert printed["accuracy"][0] == "20" and printed["real_val"][0] == str(len(scans.labels))


@pytest.mark.parametrize("ends", [(1.5, 2.5), None])
def test_bits_per_dim(monkeypatch, capsys, ends):
    bits = {"total": 2.0, "prior": 0.5, "vlb": 1.5, "n": 20, "interval": {"total": ends}}
    monkeypatch.setattr(examples, "open_source", lambda *_: SHAPES)
    monkeypatch.setattr(bound, "bits_per_dim", lambda *_: bits)
    monkeypatch.setattr(command, "load_system", lambda _: SimpleNamespace(stages={}))
    result = command.measure_stage(options("bits_per_dim", stage="decoder"))
    result, printed = measured(result, capsys)
    assert result == json.loads(json.dumps(bits))
    assert printed["decoder,"] == ["20", "2.0000", *(["95", "1.5000", "2.5000"] if ends else []), "8"]


def test_too_few_examples():
    with pytest.raises(UserError):
        measures.measure_attributes(Perfect(np.zeros((0, 8, 8, 3), np.uint8)), SHAPES, num=len(SHAPES) + 1)


def test_parser_names_what_there_is():
    assert command.PRIORS == (*PRIORS,) and {*command.DIFFUSED} == {*SPECS} - {"clip", "ar_prior"}
