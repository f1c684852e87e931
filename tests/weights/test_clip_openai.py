"""CLIP as OpenAI and OpenCLIP name it: parity with recorded outputs, sizes from shapes, and the way back."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import (
    FIXTURES,
    abstract,
    assert_same,
    error,
    forward,
    hollow,
    imported,
    keys_of,
    pictures,
    random_clip,
    recorded,
    said,
    stage_of,
)

from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.types import UserError
from dalle2_jax.weights import clip_openai
from dalle2_jax.weights.clip import export_openai, recognise
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.landing import read
from dalle2_jax.weights.rules import check, empty, shapes
from dalle2_jax.weights.tensors import open_tensors, prefixed, write_safetensors

TEXT = TextConfig(vocab_size=520, context_length=5, width=64, layers=3, heads=1)
VIT = ClipConfig(24, TEXT, VisionConfig(12, 4, 128, 2, 2))
RESNET = ClipConfig(40, TEXT, ResNetConfig((2, 1, 3, 1), width=6, heads=3, image_size=32))


def recognised(path, kind="auto"):
    (component,) = recognise(Source.open(path), kind)
    return component


@pytest.mark.parametrize(
    ("weights", "outputs"),
    [
        ("models/clip_vit.safetensors", "models/clip_vit.npz"),
        ("weights/clip_rn.safetensors", "weights/clip_rn.npz"),
        ("weights/clip_torchscript.pt", "weights/clip_torchscript.npz"),
    ],
    ids=["vit", "resnet", "torchscript"],
)
def test_outputs_are_those_of_openai(weights, outputs, capsys):
    config, variables = imported(recognised(FIXTURES / weights))
    theirs = recorded(FIXTURES / outputs)
    image_emb, text_emb, states, logits = forward(config, variables, pictures(theirs.image, config), theirs.tokens)
    errors = {"image": error(image_emb, theirs.image_features), "text": error(text_emb, theirs.text_features)}
    if hasattr(theirs, "logits_per_image"):
        errors["states"] = error(states, theirs.text_ln_final_all_positions)
        errors["logits"] = float(jnp.abs(logits - theirs.logits_per_image).max())
    said(capsys, f"CLIP (OpenAI), {Path(weights).name}", **errors)
    assert all(value <= (1e-4 if name == "logits" else 1e-5) for name, value in errors.items())


def test_the_table_of_vit_l14_has_the_published_names_and_shapes():
    published = keys_of("openai_clip_vitl14")
    config = clip_openai.read_sizes(hollow(published), "hollow")
    assert config.text == TextConfig(49408, 77, 768, 12, 12)
    assert config.vision == VisionConfig(224, 14, 1024, 24, 16)
    rules = clip_openai.openai_rules(config)
    params = abstract(ClipStage(config)).params
    check(rules, published, [rule.path for rule in rules], "hollow")
    assert shapes(rules, params) == published


def exported(tmp_path, config, trees, dtype=np.float32):
    export_openai(tmp_path / "clip.safetensors", config, trees, dtype)
    return tmp_path / "clip.safetensors"


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_out_and_in_again_is_the_same(tmp_path, config):
    trees = random_clip(config)
    component = recognised(exported(tmp_path, config, trees))
    assert stage_of(component).model == config
    again = read(component, abstract(ClipStage(config)))
    assert_same(again.params, trees.params)
    assert_same(again.stats, trees.stats)


@pytest.mark.parametrize("name", ["models/clip_vit", "weights/clip_rn"])
def test_in_and_out_again_is_the_same_file(tmp_path, name):
    source = FIXTURES / f"{name}.safetensors"
    component = recognised(source)
    config = stage_of(component).model
    path = exported(tmp_path, config, read(component, abstract(ClipStage(config))))
    theirs, ours = open_tensors(source), open_tensors(path)
    assert {*ours} == {key for key in theirs if not key.endswith("num_batches_tracked")}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].read())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_precision_are_read_as_float32(tmp_path, dtype):
    trees = random_clip(VIT)
    component = recognised(exported(tmp_path, VIT, trees, jnp.dtype(dtype)))
    again = read(component, abstract(ClipStage(VIT)))
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), trees.params)
    assert_same(again.params, rounded)


@pytest.mark.parametrize("before", ["module.", "text."])
def test_prefixes_of_trainers_and_of_mixed_towers(tmp_path, before):
    trees = random_clip(VIT)
    path = exported(tmp_path, VIT, trees)
    renamed = {}
    for key, tensor in open_tensors(path).items():
        bare = before == "text." and key.startswith(("visual.", "logit_scale"))
        renamed[key if bare else f"{before}{key}"] = tensor
    (component,) = recognise(Source(path, renamed))
    assert_same(read(component, abstract(ClipStage(VIT))).params, trees.params)


# --- what shapes do not tell ----------------------------------------------------------------

VISION_WIDTHS = {
    # of a state dict: kind, the image tower's width -> its heads, the activation
    ("auto", 768): (12, "quick_gelu"),
    ("openai_clip", 1024): (16, "quick_gelu"),
    ("open_clip", 768): (12, "gelu"),
    ("auto", 1280): (16, "gelu"),
    ("open_clip", 1408): (16, "gelu"),
    ("auto", 1664): (16, "gelu"),
    ("open_clip", 1792): (16, "gelu"),
    ("openai_clip", 1280): (20, "quick_gelu"),
}


@pytest.mark.parametrize(("kind", "width"), VISION_WIDTHS)
def test_heads_and_activation_of_a_state_dict(kind, width):
    heads, activation = VISION_WIDTHS[kind, width]
    config = dataclasses.replace(VIT, vision=VisionConfig(28, 14, width, 2, 4, mlp_ratio=2))
    tensors = hollow(shapes(clip_openai.openai_rules(config), abstract(ClipStage(config)).params))
    found = clip_openai.read_sizes(tensors, "hollow", kind)
    assert found.vision == dataclasses.replace(config.vision, heads=heads, activation=activation)
    assert found.text == dataclasses.replace(TEXT, activation=activation)


@pytest.mark.parametrize("ratio", [4, 2, 4.3637, 4.9231, 8.5715, 1.1])
def test_the_hidden_width_of_a_layer_survives_its_ratio(ratio):
    for width in range(8, 2048, 8):
        hidden = int(width * ratio)
        assert int(width * clip_openai.mlp_ratio(hidden, width)) == hidden


UNLIKE = {
    "heads of 64 channels, so 2 in this image tower, not 4": {"vision": dataclasses.replace(VIT.vision, heads=4)},
    "quick_gelu in its text tower, not gelu": {"text": dataclasses.replace(TEXT, activation="gelu")},
    "mlp_ratio 4 in its image tower, not 2": {"vision": dataclasses.replace(VIT.vision, mlp_ratio=2.0)},
}


@pytest.mark.parametrize("message", UNLIKE)
def test_what_openai_cannot_say_is_not_written(tmp_path, message):
    config = dataclasses.replace(VIT, **UNLIKE[message])
    with pytest.raises(UserError, match=f"{message}.*export it as open_clip"):
        exported(tmp_path, config, random_clip(config))
    assert not [*tmp_path.iterdir()]


# --- mistakes -------------------------------------------------------------------------------


def altered(tmp_path, change):
    """Tries to import the recorded ViT after a change to its arrays."""
    arrays = {key: tensor.read() for key, tensor in open_tensors(FIXTURES / "models/clip_vit.safetensors").items()}
    change(arrays)
    path = tmp_path / "altered.safetensors"
    write_safetensors(path, {key: value.shape for key, value in arrays.items()}, arrays.items())
    component = recognised(path)
    return read(component, abstract(stage_of(component)))


CHANGES = {
    "token_embedding.weight [100] is not CLIP's: it has 2 axes there": lambda arrays: arrays.update(
        {"token_embedding.weight": np.zeros(100)}
    ),
    "visual.conv1.weight [128, 192] is not CLIP's: it has 4 axes there": lambda arrays: arrays.update(
        {"visual.conv1.weight": np.zeros((128, 192))}
    ),
    "lacks tensor visual.proj:": lambda arrays: arrays.pop("visual.proj"),
    "lacks tensor text_projection:": lambda arrays: arrays.pop("text_projection"),
    "lacks tensors transformer.resblocks.0.ln_1.weight, transformer.resblocks.0.ln_1.bias": lambda arrays: [
        arrays.pop(key) for key in [*arrays] if key.startswith("transformer.resblocks.0.ln_1.")
    ],
    "has tensor logit_bias with no place here": lambda arrays: arrays.update(logit_bias=np.zeros(())),
    "ln_final.bias [63] does not fit params/text/ln_final/bias [64]": lambda arrays: arrays.update(
        {"ln_final.bias": np.zeros(63)}
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_damaged_state_dict_is_answered_with_file_and_key(tmp_path, message):
    with pytest.raises(UserError, match=f"altered.safetensors.*{re.escape(message)}") as caught:
        altered(tmp_path, CHANGES[message])
    assert "\n" not in str(caught.value)


def test_an_unaltered_state_dict_is_read(tmp_path):
    assert altered(tmp_path, lambda arrays: None)


def test_other_files_are_not_clip(tmp_path):
    for name in ("prior", "decoder"):
        file = FIXTURES / "karlo_tiny" / name / "diffusion_pytorch_model.safetensors"
        assert recognise(Source.open(file)) == []
    assert recognise(Source.open(tmp_path)) == []
