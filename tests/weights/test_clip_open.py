"""OpenCLIP's folders: what their config says, what it may not say, and the way back."""

import dataclasses
import json
import re

import pytest
from clips import abstract, assert_same, random_clip, stage_of

from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip import export_hf, export_open_clip, recognise
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.landing import read

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


def recognised(path, kind="auto"):
    (component,) = recognise(Source.open(path), kind)
    return component


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_out_and_in_again_is_the_same(tmp_path, config):
    trees = random_clip(config)
    export_open_clip(tmp_path, config, trees)
    component = recognised(tmp_path)
    found = stage_of(component).model
    hidden = int(found.text.width * found.text.mlp_ratio)
    assert hidden == int(TEXT.width * TEXT.mlp_ratio)
    assert dataclasses.replace(found, text=config.text, vision=config.vision) == config
    for ours, theirs in ((found.text, config.text), (found.vision, config.vision)):
        assert dataclasses.asdict(ours) | {"mlp_ratio": 0} == dataclasses.asdict(theirs) | {"mlp_ratio": 0}
    again = read(component, abstract(ClipStage(found)))
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


def test_what_a_config_leaves_out_is_the_default(tmp_path):
    """Of OpenCLIP: 64 channels a head in pictures, 8 heads in text, gelu."""

    def change(model):
        model["vision_cfg"] = {"layers": 1, "width": 40, "patch_size": 4, "image_size": 12, "head_width": 10}
        model["text_cfg"] = {"width": 24, "layers": 2, "context_length": 5, "vocab_size": 514}
        del model["quick_gelu"]

    model = stage_of(recognised(edited(tmp_path, change))).model
    assert (model.vision.heads, model.text.heads, model.text.activation) == (4, 8, "gelu")


OTHERS = {
    "vision_cfg.timm_model_name 'vit_base' is not known here": ("vision_cfg", {"timm_model_name": "vit_base"}),
    "text_cfg.hf_model_name 'roberta' is not known here": ("text_cfg", {"hf_model_name": "roberta"}),
    "vision_cfg.pool_type 'avg' is not known here": ("vision_cfg", {"pool_type": "avg"}),
    "text_cfg.no_causal_mask True is not known here": ("text_cfg", {"no_causal_mask": True}),
    "text_cfg.norm_kwargs {'eps': 1e-06} is not known here": ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}),
    "head_width must be a whole number of 1 or more, not '80'": ("vision_cfg", {"head_width": "80"}),
    "heads must be a whole number of 1 or more, not 0": ("text_cfg", {"heads": 0}),
    "vision_cfg.ls_init_value 0.1 is not known here": ("vision_cfg", {"ls_init_value": 0.1}),
}


@pytest.mark.parametrize("message", OTHERS)
def test_towers_of_another_kind_are_answered(tmp_path, message):
    name, fields = OTHERS[message]
    edited(tmp_path, lambda model: model[name].update(fields))
    with pytest.raises(UserError, match=f"open_clip_config.json: {re.escape(message)}"):
        recognised(tmp_path)


def test_fields_that_say_nothing_are_passed_over(tmp_path):
    def change(model):
        model["vision_cfg"] |= {"patch_dropout": 0.5, "timm_model_name": None, "timm_pool": "avg", "pool_type": "tok"}
        model["text_cfg"] |= {"hf_proj_type": "mlp", "no_causal_mask": False, "pool_type": "argmax", "norm_kwargs": {}}

    assert recognised(edited(tmp_path, change)).family == "CLIP (OpenCLIP)"


def test_a_folder_of_both_kinds_is_read_as_the_user_says(tmp_path):
    """Their folders hold transformers' files too."""
    trees = random_clip(VIT)
    export_open_clip(tmp_path, VIT, trees)
    export_hf(tmp_path, VIT, trees, None)
    for kind, family in (("auto", "transformers"), ("hf_clip", "transformers"), ("open_clip", "OpenCLIP")):
        component = recognised(tmp_path, kind)
        assert component.family == f"CLIP ({family})"
        assert_same(read(component, abstract(stage_of(component))).params, trees.params)


def test_two_activations_are_not_written(tmp_path):
    config = dataclasses.replace(VIT, text=QUICK)
    with pytest.raises(UserError, match="one activation for both towers"):
        export_open_clip(tmp_path, config, random_clip(config))
    assert not [*tmp_path.iterdir()]


def test_a_damaged_config_is_answered(tmp_path):
    edited(tmp_path, lambda model: model.update(text_cfg="none"))
    with pytest.raises(UserError, match="open_clip_config.json: text_cfg is not a section"):
        recognised(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="open_clip_config.json is not valid JSON"):
        recognised(tmp_path)
