"""``dalle2 evaluate``: what it reads, prints and writes; digits, and single stages."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_system
from evaluated_system import SIDE, Shapes, generating, load

from dalle2_jax import cli
from dalle2_jax.cli import evaluate as command
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.specs import SPECS
from dalle2_jax.config.stored import write_experiment
from dalle2_jax.data.synthetic import digits
from dalle2_jax.errors import UsageError
from dalle2_jax.evaluation import bound
from dalle2_jax.evaluation.distances import Statistics
from dalle2_jax.evaluation.intervals import wilson
from dalle2_jax.evaluation.measures import captions, likelihood
from dalle2_jax.evaluation.options import EvaluateOptions, Options
from dalle2_jax.system import PRIORS
from dalle2_jax.workdir.folder import StageFolder


def parse(*words):
    return command.make_parser().parse_args([*map(str, words)])


def run(*words):
    """Runs the command in this process; returns its exit code."""
    return cli.main(["evaluate", *map(str, words)])


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load(tmp_path_factory.mktemp("system")).path


def test_the_command_has_the_options_of_the_function():
    assert command.PRIORS == (*PRIORS,) and {*command.DIFFUSED} == {*SPECS} - {"clip", "ar_prior"}
    assert command.DIFFUSED == likelihood.STAGES
    assert {*command.PASSED} <= EvaluateOptions.__annotations__.keys() == Options.__annotations__.keys()
    assert {*command.PASSED} <= vars(parse("shapes")).keys()


def test_words_become_values():
    options = parse("runs/demo", "--measures", "kid, fd", "--guidance", "1,2.5", "--features", "a", "--features", "b")
    assert options.measures == ("kid", "fd") and options.guidance == (1, 2.5)
    assert options.features == [Path("a"), Path("b")] and options.system == Path("runs/demo")
    assert parse("statistics").system == "statistics" and parse("./statistics").system == Path("statistics")


@pytest.mark.parametrize(
    "words",
    [
        ("--measures", "kidd"),
        ("--measures", ""),
        ("--guidance", "1,two"),
        ("--num", "0"),
        ("--protocol", "coco"),
        ("--data", "shapes", "--trust_system"),
        ("--stage", "clip"),
    ],
)
def test_wrong_words_are_usage_errors(words):
    with pytest.raises(UsageError):
        parse("runs/demo", *words)


def test_a_table_is_printed_and_results_are_written(system, monkeypatch, capsys, tmp_path):
    generating(monkeypatch, Shapes(SIDE))
    words = ("--measures", "attributes,retrieval", "--num", 12, "--data", "shapes", "--batch_size", 8)
    assert run(system, *words, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["figure", "n", "value"] and lines[1].split()[:2] == ["attributes/colour", "12"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["measures"].keys() == {"attributes", "retrieval"}
    count = written["measures"]["attributes"]["count"]
    assert count["interval"] == pytest.approx(wilson(count["value"], 12)) and count["against"] == "shuffled captions"
    assert (tmp_path / "out" / "grid.png").is_file() and not (tmp_path / "out" / ".lock").exists()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("--measures", "fd"), 2, ["dalle2 weights import auto FILE", "--features"]),
        (("--measures", "attributes", "--decoder.steps", "4000"), 2, ["--decoder.*", "4000"]),
        (("--measures", "attributes", "--upsampler_2.steps", "4"), 2, ["upsampler_2"]),
        (("--measures", "bits_per_dim"), 2, ["stage"]),
        (("--measures", "bits_per_dim", "--stage", "upsampler_2"), 1, ["no trained stage upsampler_2"]),
        (("--measures", "digits"), 1, ["digits folder alone"]),
        (("--measures", "kid", "--resolution", 32), 2, ["--resolution"]),
        ((), 2, ["measures"]),
    ],
)
def test_errors_are_one_line(system, capsys, words, code, parts):
    assert run(system, "--data", "shapes", "--num", 4, *words) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    for part in parts:
        assert part in error


# --- digits and single stages -------------------------------------------------------------------


def test_digits(monkeypatch, tmp_path):
    config = {**tiny_system.get_config("decoder").to_dict(), "data": {"kind": "folder", "path": "not there"}}
    write_experiment(StageFolder(tmp_path, "decoder"), Experiment.from_config(config))
    captions.check_digits_folder(tmp_path)
    scans = digits.load("val")
    pixels = np.stack([scans.images[scans.labels == number][:2] for number in range(10)]).swapaxes(0, 1)
    asked = []
    samples = SimpleNamespace(images=lambda num: pixels.reshape(20, 32, 32, 3)[:num])
    context = SimpleNamespace(generated=lambda name, make: asked.extend(make()) or samples)
    figures = captions.digits(context, 20)
    assert [digits.label_of(caption) for caption in asked] == [*range(10)] * 2
    assert figures["accuracy"].n == 20 and figures["real"].n == len(scans.labels)
    assert figures["accuracy"].value > 0.9 > 0.5 > figures["accuracy"].baseline.value
    assert figures["accuracy"].interval == pytest.approx(wilson(figures["accuracy"].value, 20))


@pytest.mark.parametrize("ends", [(1.5, 2.5), None])
def test_bits_per_dim(system, monkeypatch, capsys, tmp_path, ends):
    interval = {"total": ends, "prior": None, "vlb": None}
    bits = {"total": 2.0, "prior": 0.5, "vlb": 1.5, "n": 20, "interval": interval}
    given = []
    monkeypatch.setattr(bound, "bits_per_dim", lambda *words: given.append(words) or bits)
    words = ("--measures", "bits_per_dim", "--stage", "decoder", "--data", "shapes", "--num", 20)
    assert run(system, *words, "--out", tmp_path) == 0
    [(stages, stage, source, num, batch_size, seed, progress)] = given
    assert (stage, num, batch_size, seed, progress) == ("decoder", 20, 16, 1, True)
    assert source.split == "val" and {*stages} == {"clip", "decoder"}
    total = json.loads((tmp_path / "results.json").read_text())["measures"]["bits_per_dim"]["decoder_total"]
    assert total == {"value": 2.0, "n": 20, "interval": ends and list(ends)}


def test_noise_statistics_are_stored_in_the_stage(system, monkeypatch):
    statistics = {"step": 0, "eps": [0.5, 1.0], "x_0": 0.25}
    given = []
    monkeypatch.setattr(bound, "noise_statistics", lambda *words: given.append(words) or statistics)
    assert run(system, "--measures", "noise_statistics", "--stage", "prior", "--data", "shapes", "--num", 3) == 0
    assert given[0][2].split == "train"
    assert json.loads((system / "prior" / "noise_statistics.json").read_text()) == statistics
    (system / "prior" / "noise_statistics.json").unlink()


# --- statistics of a data set -------------------------------------------------------------------


def test_statistics_of_a_data_set(system, capsys, tmp_path):
    words = ("--data", "shapes", "--features", system, "--num", 20, "--resolution", SIDE)
    assert run("statistics", *words, "--out", tmp_path / "shapes.npz") == 0
    found = Statistics.load(tmp_path / "shapes.npz")
    assert (found.n, found.dim, found.origin.data, found.origin.network) == (20, 8, "shapes", "clip")
    assert "20 images, 8 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--out", "x.npz", "--features", "a"), 2, "--data"),
        (("--data", "shapes", "--features", "a"), 2, "--out"),
        (("--data", "shapes", "--out", "x.npz"), 2, "--features"),
        (("--data", "shapes", "--out", "x.npz", "--features", "a", "--features", "b"), 2, "--features"),
        (("--data", "shapes", "--out", "x.npz", "--features", "a", "--measures", "fd"), 2, "measures"),
        (("--data", "shapes", "--out", ".", "--features", "a"), 1, "is a folder"),
        (("--data", "shapes", "--out", "x.npz", "--features", "nowhere"), 1, "dalle2 weights import"),
    ],
)
def test_statistics_need_data_a_network_and_a_file(capsys, monkeypatch, tmp_path, words, code, part):
    monkeypatch.chdir(tmp_path)
    assert run("statistics", *words) == code
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]
