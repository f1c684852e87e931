"""CLIP with OpenAI's names: parity with recorded outputs, sizes from shapes, and export."""

import dataclasses
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
    imported,
    keys_of,
    random_clip,
    recorded,
    report,
    shape_only,
    stage_of,
    to_images,
)
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.weights.clip import openai
from dalle2_jax.weights.clip.formats import detect
from dalle2_jax.weights.clip.openai import export_openai
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.rules import check, shapes
from dalle2_jax.weights.stage_writer import read_component
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

TEXT = TextConfig(vocab_size=520, context_length=5, width=64, layers=3, heads=1)
VIT = ClipConfig(24, TEXT, VisionConfig(12, 4, 128, 2, 2))
RESNET = ClipConfig(40, TEXT, ResNetConfig((2, 1, 3, 1), width=6, heads=3, image_size=32))


def detected(path, kind="auto"):
    (component,) = detect(Source.open(path), kind)
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
    config, variables = imported(detected(FIXTURES / weights))
    theirs = recorded(FIXTURES / outputs)
    image_emb, text_emb, states, logits = forward(config, variables, to_images(theirs.image, config), theirs.tokens)
    errors = {"image": error(image_emb, theirs.image_features), "text": error(text_emb, theirs.text_features)}
    if hasattr(theirs, "logits_per_image"):
        errors["states"] = error(states, theirs.text_ln_final_all_positions)
        errors["logits"] = float(jnp.abs(logits - theirs.logits_per_image).max())
    report(capsys, f"CLIP (OpenAI), {Path(weights).name}", **errors)
    assert all(value <= (1e-4 if name == "logits" else 1e-5) for name, value in errors.items())


def test_the_table_of_vit_l14_has_the_published_names_and_shapes():
    published = keys_of("openai_clip_vitl14")
    config = openai.read_sizes(shape_only(published), "shape_only")
    assert config.text == TextConfig(49408, 77, 768, 12, 12)
    assert config.vision == VisionConfig(224, 14, 1024, 24, 16)
    rules = openai.openai_rules(config)
    params = abstract(ClipStage(config)).params
    check(rules, published, [rule.path for rule in rules], "shape_only")
    assert shapes(rules, params) == published


def exported(tmp_path, config, trees, dtype=np.float32):
    export_openai(tmp_path / "clip.safetensors", config, trees, dtype)
    return tmp_path / "clip.safetensors"


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_import_inverts_export(tmp_path, config):
    trees = random_clip(config)
    component = detected(exported(tmp_path, config, trees))
    assert stage_of(component).model == config
    again = read_component(component, abstract(ClipStage(config)))
    assert_same(again.params, trees.params)
    assert_same(again.stats, trees.stats)


@pytest.mark.parametrize("name", ["models/clip_vit", "weights/clip_rn"])
def test_export_inverts_import(tmp_path, name):
    source = FIXTURES / f"{name}.safetensors"
    component = detected(source)
    config = stage_of(component).model
    path = exported(tmp_path, config, read_component(component, abstract(ClipStage(config))))
    theirs, ours = open_tensors(source), open_tensors(path)
    assert {*ours} == {key for key in theirs if not key.endswith("num_batches_tracked")}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].read())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_precision_are_read_as_float32(tmp_path, dtype):
    trees = random_clip(VIT)
    component = detected(exported(tmp_path, VIT, trees, jnp.dtype(dtype)))
    again = read_component(component, abstract(ClipStage(VIT)))
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
    (component,) = detect(Source(path, renamed))
    assert_same(read_component(component, abstract(ClipStage(VIT))).params, trees.params)


# --- heads and activation, which shapes do not determine -----------------------------------

VISION_WIDTHS = {
    # (kind, width of the image tower): (its heads, activation)
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
    tensors = shape_only(shapes(openai.openai_rules(config), abstract(ClipStage(config)).params))
    found = openai.read_sizes(tensors, "shape_only", kind)
    assert found.vision == dataclasses.replace(config.vision, heads=heads, activation=activation)
    assert found.text == dataclasses.replace(TEXT, activation=activation)


@pytest.mark.parametrize("ratio", [4, 2, 4.3637, 4.9231, 8.5715, 1.1])
def test_mlp_ratio_gives_the_hidden_width(ratio):
    for width in range(8, 2048, 8):
        hidden = int(width * ratio)
        assert int(width * openai.mlp_ratio(hidden, width)) == hidden


UNSUPPORTED = {
    # what the message mentions: changes of the config
    ("width 64", "image tower", 2, 4): {"vision": dataclasses.replace(VIT.vision, heads=4)},
    ("quick_gelu", "text tower", "gelu"): {"text": dataclasses.replace(TEXT, activation="gelu")},
    ("mlp_ratio 4", "image tower", 2.0): {"vision": dataclasses.replace(VIT.vision, mlp_ratio=2.0)},
}


@pytest.mark.parametrize("facts", UNSUPPORTED)
def test_other_architectures_are_not_exported(tmp_path, facts):
    config = dataclasses.replace(VIT, **UNSUPPORTED[facts])
    with pytest.raises(WeightsError, check=mentions(*facts, "open_clip")):
        exported(tmp_path, config, random_clip(config))
    assert not [*tmp_path.iterdir()]


# --- errors ---------------------------------------------------------------------------------


def altered(tmp_path, change):
    """Tries to import the recorded ViT after a change to its arrays."""
    arrays = {key: tensor.read() for key, tensor in open_tensors(FIXTURES / "models/clip_vit.safetensors").items()}
    change(arrays)
    path = tmp_path / "altered.safetensors"
    write_safetensors(path, {key: value.shape for key, value in arrays.items()}, arrays.items())
    component = detected(path)
    return read_component(component, abstract(stage_of(component)))


LN_1 = tuple(f"transformer.resblocks.0.ln_1.{kind}" for kind in ("weight", "bias"))
CHANGES = {
    # case: (arrays to change, None for removed; what the message mentions; missing keys; unexpected keys)
    "rank 1": ({"token_embedding.weight": np.zeros(100)}, ["token_embedding.weight [100]"], (), ()),
    "rank 2": ({"visual.conv1.weight": np.zeros((128, 192))}, ["visual.conv1.weight [128, 192]"], (), ()),
    "no visual.proj": ({"visual.proj": None}, ["visual.proj"], ("visual.proj",), ()),
    "no text_projection": ({"text_projection": None}, ["text_projection"], ("text_projection",), ()),
    "two missing": (dict.fromkeys(LN_1), LN_1, LN_1, ()),
    "one unexpected": ({"logit_bias": np.zeros(())}, ["logit_bias"], (), ("logit_bias",)),
    "another shape": (
        {"ln_final.bias": np.zeros(63)},
        ["ln_final.bias [63]", "params/text/ln_final/bias [64]"],
        (),
        (),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_errors_of_a_state_dict_name_file_and_key(tmp_path, case):
    changes, facts, missing, unexpected = CHANGES[case]

    def change(arrays):
        for key, value in changes.items():
            arrays.pop(key, None)
            arrays.update({} if value is None else {key: value})

    fields = {"path": tmp_path / "altered.safetensors", "missing": missing, "unexpected": unexpected}
    with pytest.raises(WeightsError, check=mentions(tmp_path / "altered.safetensors", *facts, **fields)):
        altered(tmp_path, change)


def test_an_unaltered_state_dict_is_read(tmp_path):
    assert altered(tmp_path, lambda arrays: None)


def test_other_files_are_not_clip(tmp_path):
    for name in ("prior", "decoder"):
        file = FIXTURES / "karlo_tiny" / name / "diffusion_pytorch_model.safetensors"
        assert detect(Source.open(file)) == []
    assert detect(Source.open(tmp_path)) == []
