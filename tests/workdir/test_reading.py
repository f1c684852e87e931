"""What others made is read within bounds: no named pipe is waited for, no depth overflows, no pattern runs away."""

import json
import os

import pytest
import tiny_system
from raised import mentions

from dalle2_jax import reading
from dalle2_jax.cli import main
from dalle2_jax.config.inherit import base_of
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.data.images.records import json_object
from dalle2_jax.data.opening import source_named
from dalle2_jax.data.storage import files
from dalle2_jax.errors import UserError, WeightsError
from dalle2_jax.text import load_tokenizer
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.tensors import open_tensors
from dalle2_jax.workdir.folder import StageFolder

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("read", [reading.read_bytes, reading.read_text, reading.open_regular, reading.check_regular])
def test_only_regular_files_are_opened(tmp_path, pipe, read):
    for path in (pipe, tmp_path):
        with pytest.raises(OSError):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


def test_pipes_among_files_that_are_read(tmp_path, pipe):
    for name in ("tokenizer.json", "clip.model", "metadata.jsonl", "a.png", "index.json", "model.safetensors"):
        os.link(pipe, tmp_path / name)
    for path in (tmp_path, tmp_path / "clip.model"):
        with pytest.raises(UserError):
            load_tokenizer(path)
    for name in ("folder", "webdataset"):
        with pytest.raises(UserError):
            source_named(f"{name}:{tmp_path}", "train", 8)
    with pytest.raises(UserError):
        open_tensors(tmp_path / "model.safetensors")
    assert Source(tmp_path).json("index.json") is None


@pytest.mark.parametrize("document", [DEEP, DEEP.encode(), '{"a":' * 70 + "1" + "}" * 70])
def test_deep_json_is_an_error_of_its_own_kind(document):
    with pytest.raises(json.JSONDecodeError):
        reading.parse_json(document)
    with pytest.raises(ValueError):
        json_object(document)


@pytest.mark.parametrize("value", [{"a": [1, {"b": [[[]]]}]}, [[i, [i]] for i in range(1000)], "[[[" * 99, 3, None])
def test_other_json_is_read(value):
    assert reading.parse_json(json.dumps(value)) == reading.parse_json(json.dumps(value).encode()) == value


def test_deep_json_in_each_kind_of_file(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(DEEP)
    for read in (
        lambda: StageFolder(tmp_path.parent, tmp_path.name).read_json("config.json"),
        lambda: load_tokenizer(tmp_path),
        lambda: Source(tmp_path).json("config.json"),
        lambda: open_tensors(tmp_path / "model.safetensors.index.json"),
    ):
        with pytest.raises(UserError):
            read()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "../model.safetensors", "/etc/passwd", 3])
def test_an_index_names_weight_files_of_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, check=mentions("weight_map['a']", repr(name), path=index)):
        open_tensors(index)


def test_a_lora_that_is_its_own_base(tmp_path):
    for name, base in (("a", "../b"), ("b", "../a"), ("c", "."), ("d", "../a")):
        (tmp_path / name / "clip").mkdir(parents=True)
        config = {**tiny_system.get_config("clip").to_dict(), "lora": {}, "init_from": base}
        (tmp_path / name / "clip" / "config.json").write_text(json.dumps(config))
    for name in "abcd":
        folder = StageFolder(tmp_path / name, "clip")
        with pytest.raises(UserError, check=mentions(folder.path, "LoRA", "back")):
            base_of(folder, stored_experiment(folder).init_from)


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "{0.." + "9" * 5000 + "}.tar"])
def test_patterns_that_name_too_many_files(pattern):
    with pytest.raises(UserError):
        files.expand_braces(pattern)


def test_a_sheet_holds_so_many(tmp_path, capsys):
    for num in ("1001", "100000000"):
        assert main(["data", "preview", "shapes", "--num", num, "--out", str(tmp_path / "sheet.png")]) == 2
        assert "--num" in capsys.readouterr().err and not [*tmp_path.iterdir()]
