"""CLIP in transformers' folders: parity with recorded outputs, config files, towers alone, and the way back."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from clips import (
    FOLDER,
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

from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.text import clip_tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip import export_hf, recognise
from dalle2_jax.weights.clip_hf import hf_text_rules, hf_vision_rules
from dalle2_jax.weights.clip_hf_config import read_text_config, read_vision_config
from dalle2_jax.weights.component import Source, merged
from dalle2_jax.weights.landing import read
from dalle2_jax.weights.rules import shapes
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

TEXT = TextConfig(vocab_size=520, context_length=6, width=24, layers=2, heads=3, activation="gelu", mlp_ratio=1.5)
VISION = VisionConfig(12, 4, width=20, layers=3, heads=2, activation="quick_gelu", mlp_ratio=8.05)
CONFIG = ClipConfig(28, TEXT, VISION, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))


def recognised(path, kind="auto"):
    (component,) = recognise(Source.open(path), kind)
    return component


@pytest.mark.parametrize(("name", "masked"), [("quick_gelu", True), ("gelu", False)])
def test_outputs_are_those_of_transformers(name, masked, capsys):
    folder = FOLDER / f"clip_hf_{name}"
    config, variables = imported(recognised(folder))
    theirs = recorded(folder / "parity.npz")
    image, mask = pictures(theirs.pixel_values, config), theirs.attention_mask > 0 if masked else None
    image_emb, text_emb, states, logits = forward(config, variables, image, theirs.input_ids, mask)
    errors = {
        "image": error(image_emb, theirs.image_embeds_raw),
        "text": error(text_emb, theirs.text_embeds_raw),
        "states": error(states, theirs.text_last_hidden_state),
        "logits": float(jnp.abs(logits - theirs.logits_per_image).max()),
    }
    said(capsys, f"CLIP (transformers), {name}", **errors)
    assert all(value <= (1e-4 if name == "logits" else 1e-5) for name, value in errors.items())


def test_the_tables_of_vit_l14_have_the_published_names_and_shapes():
    text, vision = TextConfig(49408, 77, 768, 12, 12), VisionConfig(224, 14, 1024, 24, 16)
    params = abstract(ClipStage(ClipConfig(768, text, vision))).params
    assert shapes(hf_text_rules(text), params) == keys_of("hf_clip_vitl14_text")
    assert shapes(hf_vision_rules(vision), params) == keys_of("hf_clip_vitl14_vision")


# --- out and in -----------------------------------------------------------------------------


def exported(folder, config=CONFIG, dtype=np.float32):
    folder.mkdir(exist_ok=True)
    trees = random_clip(config)
    export_hf(folder, config, trees, clip_tokenizer(config.text.vocab_size), dtype)
    return trees


def test_out_and_in_again_is_the_same(tmp_path):
    trees = exported(tmp_path)
    component = recognised(tmp_path)
    assert stage_of(component).model == CONFIG
    assert_same(read(component, abstract(ClipStage(CONFIG))).params, trees.params)
    ours = clip_tokenizer(520)
    for caption in ("a small red cube", "Zebra, 42 of them"):
        assert component.tokenizer.ids(caption) == ours.ids(caption)


def test_in_and_out_again_is_the_same_file(tmp_path):
    source = FOLDER / "clip_hf_gelu"
    component = recognised(source)
    config = stage_of(component).model
    export_hf(tmp_path, config, read(component, abstract(ClipStage(config))), component.tokenizer)
    theirs, ours = (open_tensors(folder / "model.safetensors") for folder in (source, tmp_path))
    assert {*ours} == {*theirs}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].read())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    for section in ("text_config", "vision_config"):
        told = {key: value for key, value in after[section].items() if key != "architectures"}
        assert told.items() <= before[section].items()
    assert after["projection_dim"] == before["projection_dim"]


def test_half_precision_and_several_files(tmp_path):
    """A large model's form: an index, and files of bfloat16."""
    trees = exported(tmp_path, dtype=jnp.bfloat16)
    whole = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    keys = sorted(whole)
    places = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        arrays = {key: whole[key] for key in part}
        write_safetensors(tmp_path / name, {key: arrays[key].shape for key in part}, arrays.items(), jnp.bfloat16)
        places |= dict.fromkeys(part, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    again = read(recognised(tmp_path), abstract(ClipStage(CONFIG)))
    table = again.params["text"]["token_embedding"]["embedding"]
    rounded = trees.params["text"]["token_embedding"]["embedding"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(table, rounded)
    places[keys[0]] = places[keys[1]]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=f"model-00002-of-00002.safetensors lacks tensor {keys[0]}, which model.safe"):
        recognised(tmp_path)


def test_position_ids_are_left_out(tmp_path):
    trees = exported(tmp_path)
    arrays = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    for tower, count in (("text", 6), ("vision", 10)):
        arrays[f"{tower}_model.embeddings.position_ids"] = np.arange(count, dtype=np.float32)[None]
    write_safetensors(
        tmp_path / "model.safetensors", {key: value.shape for key, value in arrays.items()}, arrays.items()
    )
    assert_same(read(recognised(tmp_path), abstract(ClipStage(CONFIG))).params, trees.params)


def test_a_file_is_read_with_the_config_beside_it(tmp_path):
    trees = exported(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "model.safetensors").unlink()
    component = recognised(tmp_path / "mine.safetensors")
    assert_same(read(component, abstract(ClipStage(CONFIG))).params, trees.params)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"mine.safetensors is a CLIP of transformers': its config.json must"):
        recognised(tmp_path / "mine.safetensors")


def test_towers_in_folders_of_their_own_join(tmp_path):
    trees = exported(tmp_path)
    arrays = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    whole = json.loads((tmp_path / "config.json").read_text())
    for name, tower, keys in (("text_encoder", "text", ("text_",)), ("image_encoder", "vision", ("vis",))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(whole[f"{tower}_config"]))
        part = {key: value for key, value in arrays.items() if key.startswith(keys)}
        write_safetensors(
            folder / "model.safetensors", {key: value.shape for key, value in part.items()}, part.items()
        )
    (tmp_path / "feature_extractor").mkdir()
    for name, place in (("preprocessor_config.json", "feature_extractor"), ("vocab.json", "tokenizer")):
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / place)
    shutil.move(tmp_path / "merges.txt", tmp_path / "tokenizer")
    parts = [recognised(tmp_path / name) for name in ("text_encoder", "image_encoder")]
    assert [part.needs for part in parts] == ["", "the text encoder"]
    assert parts[0].tokenizer.vocab_size == 520 and parts[1].tokenizer is None
    component = merged(parts)["clip"]
    assert stage_of(component).model == CONFIG
    again = read(component, abstract(ClipStage(CONFIG)))
    np.testing.assert_allclose(again.params["logit_scale"], np.log(1 / 0.07), rtol=1e-6)  # neither folder holds it
    for tower in ("text", "visual"):
        assert_same(again.params[tower], trees.params[tower])


def test_a_resnet_is_not_written(tmp_path):
    config = dataclasses.replace(CONFIG, vision=ResNetConfig((1, 1, 1, 1), 4, 2, 32))
    with pytest.raises(UserError, match="no ResNet.*openai_clip or open_clip"):
        export_hf(tmp_path, config, random_clip(config), None)
    assert not [*tmp_path.iterdir()]


# --- config files ---------------------------------------------------------------------------


def test_what_a_config_leaves_out_is_the_default():
    """openai/clip-vit-base-patch32 says little more than that it is one."""
    assert read_text_config({}, "") == (TextConfig(49408, 77, 512, 12, 8, "quick_gelu", 4.0), 512)
    assert read_vision_config({}, "") == (VisionConfig(224, 32, 768, 12, 12, "quick_gelu", 4.0), 512)


def test_an_old_file_says_it_under_another_name(tmp_path):
    """Where there is text_config_dict, text_config counts for nothing, its defaults included."""
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config_dict"], config["text_config"] = config["text_config"], {"hidden_size": 999}
    config["vision_config_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stage_of(recognised(tmp_path)).model == CONFIG


def test_pictures_are_normalised_as_openai_where_nothing_is_said(tmp_path):
    exported(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert stage_of(recognised(tmp_path)).model.image_mean == CLIP_IMAGE_MEAN


@pytest.mark.parametrize(
    ("mean", "message"),
    [([0.5, 0.5], "image_mean must be three"), (0.5, "image_mean must be three"), (["a", 1, 2], "image_mean must be")],
)
def test_a_normalisation_that_is_none(tmp_path, mean, message):
    exported(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_mean": mean}))
    with pytest.raises(UserError, match=f"preprocessor_config.json: {message}"):
        recognised(tmp_path)
    path.write_text(json.dumps(config | {"image_mean": mean, "do_normalize": False}))
    model = stage_of(recognised(tmp_path)).model
    assert (model.image_mean, model.image_std) == ((0.0,) * 3, (1.0,) * 3)


def test_the_tokenizer_must_fit(tmp_path):
    exported(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"<more>": 520}))
    with pytest.raises(UserError, match="config.json gives the text tower 520 tokens, its tokenizer in .* has 521"):
        recognised(tmp_path)


WRONG = {
    "layer_norm_eps 1e-06 is not known here": {"layer_norm_eps": 1e-6},
    "hidden_act 'gelu_new' is not known here": {"hidden_act": "gelu_new"},
    "hidden_size must be a whole number of 1 or more, not '24'": {"hidden_size": "24"},
    "num_hidden_layers must be a whole number of 1 or more, not 0": {"num_hidden_layers": 0},
    "intermediate_size must be a whole number of 1 or more, not True": {"intermediate_size": True},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_a_config_that_is_not_known_here_is_answered(tmp_path, tower, message):
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[tower] |= WRONG[message]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: {re.escape(message)}"):
        recognised(tmp_path)


def test_a_picture_that_patches_do_not_tile():
    with pytest.raises(UserError, match="here: image_size 225 is not a multiple of patch_size 32"):
        read_vision_config({"image_size": 225}, "here")
