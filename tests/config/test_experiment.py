"""`Experiment`: one parse of a config, JSON that reads back to an equal value, and errors that name the field."""

import importlib.util
import json
import pathlib

import pytest
import tiny_system
from raised import mentions

from dalle2_jax.config.experiment import Experiment, experiment, resume_changes
from dalle2_jax.config.parse import expand
from dalle2_jax.config.sources import PythonDataConfig, open_source
from dalle2_jax.config.specs import SPECS, STAGES
from dalle2_jax.errors import ConfigError, DataError, UsageError
from dalle2_jax.stages import LoraConfig

ROOT = pathlib.Path(__file__).parents[2]


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = {path.stem: module_of(path) for path in sorted(ROOT.glob("configs/*.py")) if path.stem != "common"}
NAMED = [(page, which) for page, module in PAGES.items() for which in module.STAGES]
NAMED += [("tiny", which) for which in tiny_system.STAGES]
PAGES["tiny"] = tiny_system


def config_of(which, **changes):
    """A tiny config as a dict; ``a__b`` is the field a.b."""
    config = tiny_system.get_config(which)
    config.unlock()
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config.to_dict()


def reread(one):
    """The experiment after a trip through a file."""
    return Experiment.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))


# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "which"), NAMED)
def test_every_page_reads_back_equal(page, which):
    one = Experiment.from_config(PAGES[page].get_config(which))
    assert reread(one) == one and hash(reread(one)) == hash(one)
    assert one.stage in STAGES and isinstance(one.spec, SPECS[one.stage])


MIXTURE = {
    "kind": "mixture",
    "resolution": 8,
    "parts": {
        "a": {"kind": "shapes"},
        "b": {
            **{"kind": "folder", "path": "b", "max_rejected": 0.5},
            "filters": {"ranges": {"w": (None, 0.8)}, "equals": {"lang": ("en", "de"), "nsfw": False}},
        },
    },
    "weights": {"a": 1, "b": 2.5},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 2}, "init_from": "../base"},
        {"lora": {"targets": ["attn"]}},
        {"data": MIXTURE},
        {"data": {"kind": "embeddings", "path": "e"}},
        {"data": {"kind": "python", "source": "Arrays", "examples": 3}},
        {"preprocessing": {"resample": "bicubic", "crop": 8, "size": 9}},
        {"model": {"embed_dim": 8, "vision": {"kind": "resnet", "layers": (1,), "image_size": 32}}},
        {"model": {"embed_dim": 8, "vision": None}, "total_steps": 0},
    ],
)
def test_every_section_reads_back_equal(changes):
    one = Experiment.from_config({**config_of("clip"), **changes})
    assert reread(one) == one
    for name, section in changes.items():
        assert name in one.to_json() and (section != {} or one.to_json()[name])


def test_a_laion_prior_reads_back_equal():
    model = {"kind": "laion", "layers": 1, "heads": 2, "head_width": 8, "mlp_width": 8}
    for length in ({}, {"context_length": 40}):
        one = Experiment.from_config({**config_of("prior"), "model": {**model, **length}})
        assert reread(one) == one and one.spec.model.context_length == length.get("context_length", 32)


def test_sizes_that_follow_are_not_stored():
    """They come from the tokenizer and from CLIP, whatever stands in for them before."""
    for which in tiny_system.STAGES:
        one = Experiment.from_config(tiny_system.get_config(which))
        content = one.to_json()
        for path in one.spec.derived:
            section = content
            for name in path.split(".")[:-1]:
                section = section.get(name) or {}
            assert path.split(".")[-1] not in section
    assert "text_width" not in content["model"] and content["model"]["channels"] == 8


def test_every_field_is_stored():
    content = Experiment.from_config({**config_of("decoder"), "conditioning": {}}).to_json()
    assert content["conditioning"] == {"drop_image": 0.1, "drop_text": 0.5, "empty_caption": False, "inpaint": False}
    assert content["optim"]["beta1"] == 0.9 and content["seed"] == 0 and content["data"]["kind"] == "shapes"


# --- pages and overrides ----------------------------------------------------------------------


def test_a_page_with_overrides():
    changes = {"optim.lr": 3e-4, "total_steps": 7, "lora": {"rank": 2}, "init_from": "base", "text.kind": "clip"}
    one = experiment("tests/support/tiny_system.py:decoder", **changes)
    assert (one.optim.lr, one.run.total_steps, one.lora, one.init_from) == (3e-4, 7, LoraConfig(rank=2), "base")
    assert one.spec.text.kind == "clip" and one.optim.weight_decay == 0.01
    assert experiment("tests/support/tiny_system.py:decoder") == Experiment.from_config(config_of("decoder"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optim.lr": -1.0}, "optim.lr"),
        ({"optim.lrr": 1.0}, "optim.lrr"),
        ({"total_steps": "all"}, "total_steps"),
        ({"batchsize": 8}, "batchsize"),
        ({"optim.lr.max": 1.0}, "optim.lr.max"),
        ({"model.unet.channels": 3.5}, "model.unet.channels"),
        ({"model.unet.dtype": "float16"}, "model.unet.dtype"),
        ({"model.unet.channel_mult": (1, -1)}, "model.unet.channel_mult[1]"),
        ({"model.image_emb_dim": 4}, "model.image_emb_dim"),
        ({"model.text.vocab_size": 4}, "model.text.vocab_size"),
        ({"model.unet.norm_groups": 3}, "model.unet"),
        ({"data.kind": "shaps"}, "data.kind"),
        ({"data": 3}, "data"),
        ({"data": {"kind": "mixture", "parts": {"a": {"kind": "shapes", "jiter": 1}}}}, "data.parts.a.jiter"),
        ({"diffusion.num_steps": 0}, "diffusion.num_steps"),
        ({"sampling.guidance_interval": (0.9, 0.1)}, "sampling"),
        ({"init_from": 3}, "init_from"),
        ({"stage": "decodr"}, "stage"),
    ],
)
def test_an_error_names_its_field(changes, field):
    with pytest.raises(ConfigError, check=mentions(field=field)):
        experiment("tests/support/tiny_system.py:decoder", **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"sampling.steps": 200}, "sampling.steps"), ({"total_steps": 0}, "total_steps"), ({"lora": {}}, "lora")],
)
def test_what_training_needs_is_checked_before_it(changes, field):
    one = experiment("tests/support/tiny_system.py:decoder", **changes)
    with pytest.raises(ConfigError) as caught:
        one.check_trainable()
    assert caught.value.field == field


def test_a_page_that_is_none(tmp_path):
    (tmp_path / "page.py").write_text("def get_config(which):\n    return 3\n")
    with pytest.raises(UsageError, check=mentions(f"{tmp_path}/page.py:clip", 3, "ConfigDict")):
        experiment(f"{tmp_path}/page.py:clip")


def test_resume_changes_is_no_field_of_an_experiment():
    config = {**config_of("clip"), "resume_changes": True}
    assert resume_changes(config) and not resume_changes(config_of("clip"))
    assert Experiment.from_config(config) == Experiment.from_config(config_of("clip"))
    with pytest.raises(ConfigError) as caught:
        resume_changes({"resume_changes": "yes"})
    assert caught.value.field == "resume_changes"


def test_data_given_in_python_are_not_opened_again():
    config = expand(PythonDataConfig, {"source": "Arrays", "examples": 3}, "data")
    with pytest.raises(DataError, check=mentions("Arrays", "3 examples", "data=", path=None)):
        open_source(config, "train")
