"""OpenCLIP folders: their config files, unsupported fields, and export."""

import dataclasses
import json

import pytest
from clips import abstract, assert_same, random_clip, stage_of
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.weights.clip.formats import detect
from dalle2_jax.weights.clip.open_clip import export_open_clip
from dalle2_jax.weights.clip.transformers import export_hf
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.config_files import FieldError
from dalle2_jax.weights.stage_writer import read_component

TEXT = TextConfig(vocab_size=514, context_length=5, width=24, layers=2, heads=3, activation="gelu", mlp_ratio=2.5)
VIT = ClipConfig(
    20,
    TEXT,
    VisionConfig(12, 4, width=40, layers=1, heads=4, activation="gelu", mlp_ratio=4.9231),
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.3, 0.2, 0.1),
)
QUICK = dataclasses.replace(TEXT, activation="quick_gelu")
RESNET = ClipConfig(24, QUICK, ResNetConfig((1, 2, 1, 1), width=4, heads=2, image_size=32))


def detected(path, kind="auto"):
    (component,) = detect(Source.open(path), kind)
    return component


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_import_inverts_export(tmp_path, config):
    trees = random_clip(config)
    export_open_clip(tmp_path, config, trees)
    component = detected(tmp_path)
    found = stage_of(component).model
    hidden = int(found.text.width * found.text.mlp_ratio)
    assert hidden == int(TEXT.width * TEXT.mlp_ratio)
    assert dataclasses.replace(found, text=config.text, vision=config.vision) == config
    for ours, theirs in ((found.text, config.text), (found.vision, config.vision)):
        assert dataclasses.asdict(ours) | {"mlp_ratio": 0} == dataclasses.asdict(theirs) | {"mlp_ratio": 0}
    again = read_component(component, abstract(ClipStage(found)))
    assert_same(again.params, trees.params)
    assert_same(again.stats, trees.stats)


def edited(folder, change):
    """Exports a ViT and changes its config."""
    export_open_clip(folder, VIT, random_clip(VIT))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config["model_cfg"])
    path.write_text(json.dumps(config))
    return folder


def test_missing_fields_have_the_defaults_of_openclip(tmp_path):
    """Image heads of 64 channels, 8 text heads, gelu."""

    def change(model):
        model["vision_cfg"] = {"layers": 1, "width": 40, "patch_size": 4, "image_size": 12, "head_width": 10}
        model["text_cfg"] = {"width": 24, "layers": 2, "context_length": 5, "vocab_size": 514}
        del model["quick_gelu"]

    model = stage_of(detected(edited(tmp_path, change))).model
    assert (model.vision.heads, model.text.heads, model.text.activation) == (4, 8, "gelu")


UNSUPPORTED = {
    # field: value
    "vision_cfg.timm_model_name": "vit_base",
    "text_cfg.hf_model_name": "roberta",
    "vision_cfg.pool_type": "avg",
    "text_cfg.no_causal_mask": True,
    "text_cfg.norm_kwargs": {"eps": 1e-6},
    "vision_cfg.head_width": "80",
    "text_cfg.heads": 0,
    "vision_cfg.ls_init_value": 0.1,
}


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_errors_name_the_field(tmp_path, path):
    section, field = path.split(".")
    edited(tmp_path, lambda model: model[section].update({field: UNSUPPORTED[path]}))
    named = {"path": tmp_path / "open_clip_config.json", "field": f"model_cfg.{path}"}
    with pytest.raises(FieldError, check=mentions(repr(UNSUPPORTED[path]), **named)):
        detected(tmp_path)


def test_fields_without_effect_are_ignored(tmp_path):
    def change(model):
        model["vision_cfg"] |= {"patch_dropout": 0.5, "timm_model_name": None, "timm_pool": "avg", "pool_type": "tok"}
        model["text_cfg"] |= {"hf_proj_type": "mlp", "no_causal_mask": False, "pool_type": "argmax", "norm_kwargs": {}}

    assert detected(edited(tmp_path, change)).family == "CLIP (OpenCLIP)"


def test_the_kind_decides_how_a_folder_of_both_formats_is_read(tmp_path):
    """Published OpenCLIP folders include transformers' files."""
    trees = random_clip(VIT)
    export_open_clip(tmp_path, VIT, trees)
    export_hf(tmp_path, VIT, trees, None)
    for kind, family in (("auto", "transformers"), ("hf_clip", "transformers"), ("open_clip", "OpenCLIP")):
        component = detected(tmp_path, kind)
        assert component.family == f"CLIP ({family})"
        assert_same(read_component(component, abstract(stage_of(component))).params, trees.params)


def test_two_activations_are_not_exported(tmp_path):
    config = dataclasses.replace(VIT, text=QUICK)
    with pytest.raises(WeightsError, check=mentions("OpenCLIP", "one activation", "hf_clip")):
        export_open_clip(tmp_path, config, random_clip(config))
    assert not [*tmp_path.iterdir()]


def test_a_damaged_config(tmp_path):
    edited(tmp_path, lambda model: model.update(text_cfg="none"))
    with pytest.raises(FieldError, check=mentions(field="model_cfg.text_cfg")):
        detected(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(WeightsError, check=mentions("JSON", path=tmp_path / "open_clip_config.json")):
        detected(tmp_path)
