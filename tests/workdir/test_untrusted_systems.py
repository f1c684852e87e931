"""Untrusted systems: nothing outside the folder is opened unless the user allows it."""

import json
import os
import types

import pytest
import tiny_system
from raised import mentions
from tiny_data import write_images

from dalle2_jax import data
from dalle2_jax.cli import data as data_command
from dalle2_jax.cli import evaluate as evaluation
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config import inherit, sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment, write_experiment
from dalle2_jax.data.images.records import Rejected, RejectionCounts
from dalle2_jax.data.images.source import ImageSource
from dalle2_jax.errors import DataError, UsageError, UserError, printable
from dalle2_jax.evaluation import examples
from dalle2_jax.evaluation.measures import captions
from dalle2_jax.system import load, stored_data
from dalle2_jax.text import load_tokenizer
from dalle2_jax.types import Preprocessing
from dalle2_jax.workdir.folder import StageFolder

SHAPES = {"kind": "shapes", "resolution": 8}
OUTSIDE = {
    # section of a config: the path that the error must name
    "folder": ({"kind": "folder", "path": "/home/somebody"}, "/home/somebody"),
    "URL": ({"kind": "webdataset", "path": "https://host/{0..9}.tar"}, "https://host/"),
    "TFDS": ({"kind": "tfds", "path": "prepared"}, "prepared"),
    "embeddings": ({"kind": "embeddings", "path": "", "text_path": "s3://bucket"}, "s3://bucket"),
    "paired": ({"kind": "folder", "path": "here", "embeddings": "there"}, "here, there"),
    "mixture": (
        {"kind": "mixture", "resolution": 8, "parts": {"a": SHAPES, "b": {"kind": "folder", "path": "here"}}},
        "here",
    ),
}


def write_stage(root, name="clip", **changes):
    """Writes the experiment of a stage; ``changes`` replace sections and fields of a tiny config; None removes one."""
    config = {**tiny_system.get_config(name).to_dict(), **changes}
    experiment = Experiment.from_config({key: value for key, value in config.items() if value is not None})
    write_experiment(StageFolder(root, name), experiment)
    return root


def write_run(root, name, page):
    StageFolder(root, name).write_json("run.json", {"config": page})


@pytest.fixture
def opened(monkeypatch):
    """Returns the data configs that would be opened; nothing is opened."""
    seen = []
    source = types.SimpleNamespace(preprocessed=lambda how: source)
    monkeypatch.setattr(data, "make_source", lambda config, split: seen.append(config) or source)
    return seen


@pytest.mark.parametrize("case", OUTSIDE)
def test_data_named_by_a_config_are_opened_only_with_permission(case, opened, tmp_path):
    section, path = OUTSIDE[case]
    system = write_stage(tmp_path, data=section)
    with pytest.raises(DataError, check=mentions(path, "--data", "--trust_system")):
        stored_data.open_stored_source(system, "clip", "val")
    assert not opened
    stored_data.open_stored_source(system, "clip", "val", trusted=True)
    assert opened == [sources.parse_source(section)]


@pytest.mark.parametrize("section", [SHAPES, {"kind": "mixture", "resolution": 8, "parts": {"a": SHAPES, "b": SHAPES}}])
def test_generated_data_need_no_permission(section, opened, tmp_path):
    stored_data.open_stored_source(write_stage(tmp_path, data=section), "clip", "val", resolution=4)
    smaller = {**section, "resolution": 4}
    if "parts" in section:
        smaller["parts"] = dict.fromkeys("ab", {**SHAPES, "resolution": 4})
    assert opened == [sources.parse_source(smaller)]


def evaluation_options(system, *words):
    return evaluation.make_parser().parse_args([str(system), "--measures", "retrieval", *map(str, words)])


def evaluated(system, stage, *words, split="val"):
    """Returns the data that ``dalle2 evaluate`` opens."""
    options = evaluation_options(system, *words)
    return examples.open_source(system, stage, split, options.data, options.trust_system)


def embed_options(system, *words):
    return data_command.make_parser().parse_args(["embed", "--system", str(system), "--out", "out", *map(str, words)])


@pytest.mark.parametrize(
    "open_data",
    [
        lambda system, *words: evaluated(system, "clip", *words, split="train"),
        lambda system, *words: data_command._embedded_data(embed_options(system, *words), Preprocessing(), 8),
    ],
)
def test_commands_open_data_that_the_user_names_or_trusts(open_data, tmp_path):
    image_folder, system = tmp_path / "images", tmp_path / "system"
    image_folder.mkdir()
    write_images(image_folder, 3)
    section = {"kind": "folder", "path": str(image_folder), "resolution": 8}
    write_stage(system, data=section)
    with pytest.raises(DataError, check=mentions(image_folder, "--trust_system", path=system / "clip")):
        open_data(system)
    for words in (("--data", f"folder:{image_folder}"), ("--trust_system",)):
        assert data.example(open_data(system, *words), 0)["image"].shape == (8, 8, 3)
    with pytest.raises(UsageError, check=mentions("--trust_system", "--data")):
        open_data(system, "--data", "shapes", "--trust_system")


def test_an_imported_system_is_evaluated_at_its_own_resolution(tmp_path):
    model = tiny_system.get_config("clip").to_dict()["model"]
    imported = {"total_steps": 0, "data": None, "optim": None, "mesh": None}
    write_stage(tmp_path, model={**model, "vision": {**model["vision"], "image_size": 12}}, **imported)
    for name in ("decoder", "prior"):
        write_stage(tmp_path, name, **imported)
    for stage, side in (("clip", 12), ("decoder", 8), ("prior", 12)):
        source = evaluated(tmp_path, stage, "--data", "shapes")
        assert data.example(source, 0)["image"].shape == (side, side, 3)
    with pytest.raises(DataError, check=mentions("imported", path=None)):
        evaluated(tmp_path, "clip")


def test_digits_are_evaluated_without_their_data(tmp_path):
    write_stage(tmp_path, "decoder")
    with pytest.raises(UserError, check=mentions("digits folder")):
        captions.check_digits_folder(tmp_path)
    write_stage(tmp_path, "decoder", data={"kind": "folder", "path": "not there"})
    captions.check_digits_folder(tmp_path)


@pytest.mark.parametrize(
    "stored",
    [
        "x.py; rm -rf ~:clip",
        "$(id).py:clip",
        "mine.py:clip`id`",
        "/etc/mine.py:clip",
        "../mine.py:clip",
        "a/../../mine.py:clip",
        "not_there.py:clip",
        "mine.txt:clip",
        "--config.py:clip",
        "mine.py:clip\nid",
        7,
        None,
    ],
)
def test_an_untrusted_run_json_is_not_printed_as_a_command(stored, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for file in ("mine.py", "../mine.py", "mine.txt", "$(id).py", "--config.py"):
        (tmp_path / "here" / file).touch()
    write_run(tmp_path / "system", "clip", stored)
    message = load.missing_stage(tmp_path / "system", "prior")
    assert "--config configs/shapes.py:prior" in message
    write_run(tmp_path / "system", "decoder", "mine.py:decoder,small")
    assert "--config mine.py:prior,small" in load.missing_stage(tmp_path / "system", "prior")


@pytest.mark.parametrize("path", ["{}/base", "gs://bucket/base", "../base\0", "", None])
def test_the_base_of_a_lora_must_be_relative_to_its_system(path, tmp_path):
    write_stage(tmp_path / "base", "decoder")
    (tmp_path / "base" / "decoder" / "checkpoints" / "0").mkdir(parents=True)
    folder = StageFolder(tmp_path / "lora", "decoder")
    assert inherit.base_of(folder, "../base").root == (tmp_path / "base").resolve()
    with pytest.raises(UserError, check=mentions("init_from", folder.root)):
        inherit.base_of(folder, path and path.format(tmp_path))


@pytest.mark.parametrize("path", [3, ["a"], {}])
def test_init_from_must_be_text(path, tmp_path):
    folder = StageFolder(tmp_path, "decoder")
    folder.write_json("experiment.json", {**tiny_system.get_config("decoder").to_dict(), "init_from": path})
    with pytest.raises(UserError, check=mentions(folder.path / "experiment.json", "config.init_from", path)):
        stored_experiment(folder)


@pytest.mark.parametrize("hops", [["."], ["../b", "../a"], ["../b", "../c", "../b"]])
def test_circular_loras_are_rejected(hops, tmp_path):
    for name, hop in zip("abc", hops, strict=False):
        write_stage(tmp_path / name, "decoder", lora={}, init_from=hop)
        (tmp_path / name / "decoder" / "checkpoints" / "0").mkdir(parents=True)
    folder = StageFolder(tmp_path / "a", "decoder")
    with pytest.raises(UserError, check=mentions(folder.path, "LoRA", "back")):
        inherit.base_of(folder, stored_experiment(folder).init_from)


def test_a_tokenizer_must_be_inside_its_folder(tmp_path):
    (tmp_path / "outside.json").write_text('{"count": 3}')
    (tmp_path / "tokenizer").mkdir()
    for file in ("../outside.json", str(tmp_path / "outside.json"), "..", "", 3, None):
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"kind": "labels", "file": file}))
        assert file not in os.listdir(tmp_path / "tokenizer")
        with pytest.raises(UserError, check=mentions(tmp_path / "tokenizer" / "tokenizer.json")):
            load_tokenizer(tmp_path / "tokenizer")


HOSTILE = "a\x1b]0;title\x07\x1b[2J\u202eb\nc\u2028d\x9b"


class Unreadable:
    """Records of which none can be read."""

    rejections = RejectionCounts({"lost": 1}, {"lost": HOSTILE})

    def __len__(self):
        return 30

    def __repr__(self):
        return "Torn"

    def read(self, index):
        raise Rejected("torn", HOSTILE)


def test_control_characters_from_files_are_not_sent_to_the_terminal(capsys, caplog):
    def fail():
        raise UserError(HOSTILE)

    assert run_cli.run_cli(fail) == 1
    with pytest.raises(UserError):
        ImageSource(Unreadable(), 8, max_rejected=0.2).fetch([0])
    for line in (capsys.readouterr().err.removesuffix("\n"), *caplog.messages, printable(HOSTILE)):
        assert line.isprintable() and "\\x1b" in line
    assert printable("Grün, ☃ 'ok'") == "Grün, ☃ 'ok'"
