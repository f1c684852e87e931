"""CLIP in transformers' folders: parity with recorded outputs, config files, single towers, and export."""

import dataclasses
import json
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
    imported,
    keys_of,
    random_clip,
    recorded,
    report,
    stage_of,
    to_images,
)
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.stages import ClipStage
from dalle2_jax.text import clip_tokenizer, train_sentencepiece
from dalle2_jax.weights.clip.formats import detect
from dalle2_jax.weights.clip.transformers import export_hf, hf_text_rules, hf_vision_rules
from dalle2_jax.weights.clip.transformers_config import (
    read_text_config,
    read_vision_config,
)
from dalle2_jax.weights.component import Source, merge_parts
from dalle2_jax.weights.config_files import FieldError, Section
from dalle2_jax.weights.rules import shapes
from dalle2_jax.weights.stage_writer import read_component
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

TEXT = TextConfig(vocab_size=520, context_length=6, width=24, layers=2, heads=3, activation="gelu", mlp_ratio=1.5)
VISION = VisionConfig(12, 4, width=20, layers=3, heads=2, activation="quick_gelu", mlp_ratio=8.05)
CONFIG = ClipConfig(28, TEXT, VISION, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))


def detected(path, kind="auto"):
    (component,) = detect(Source.open(path), kind)
    return component


@pytest.mark.parametrize(("name", "masked"), [("quick_gelu", True), ("gelu", False)])
def test_outputs_equal_those_of_transformers(name, masked, capsys):
    folder = FOLDER / f"clip_hf_{name}"
    config, variables = imported(detected(folder))
    theirs = recorded(folder / "parity.npz")
    image, mask = to_images(theirs.pixel_values, config), theirs.attention_mask > 0 if masked else None
    image_emb, text_emb, states, logits = forward(config, variables, image, theirs.input_ids, mask)
    errors = {
        "image": error(image_emb, theirs.image_embeds_raw),
        "text": error(text_emb, theirs.text_embeds_raw),
        "states": error(states, theirs.text_last_hidden_state),
        "logits": float(jnp.abs(logits - theirs.logits_per_image).max()),
    }
    report(capsys, f"CLIP (transformers), {name}", **errors)
    assert all(value <= (1e-4 if name == "logits" else 1e-5) for name, value in errors.items())


def test_the_tables_of_vit_l14_have_the_published_names_and_shapes():
    text, vision = TextConfig(49408, 77, 768, 12, 12), VisionConfig(224, 14, 1024, 24, 16)
    params = abstract(ClipStage(ClipConfig(768, text, vision))).params
    assert shapes(hf_text_rules(text), params) == keys_of("hf_clip_vitl14_text")
    assert shapes(hf_vision_rules(vision), params) == keys_of("hf_clip_vitl14_vision")


# --- export and import ----------------------------------------------------------------------


def exported(folder, config=CONFIG, dtype=np.float32):
    folder.mkdir(exist_ok=True)
    trees = random_clip(config)
    export_hf(folder, config, trees, clip_tokenizer(config.text.vocab_size), dtype)
    return trees


def test_import_inverts_export(tmp_path):
    trees = exported(tmp_path)
    component = detected(tmp_path)
    assert stage_of(component).model == CONFIG
    assert_same(read_component(component, abstract(ClipStage(CONFIG))).params, trees.params)
    ours = clip_tokenizer(520)
    for caption in ("a small red cube", "Zebra, 42 of them"):
        assert component.tokenizer.ids(caption) == ours.ids(caption)


def test_export_inverts_import(tmp_path):
    source = FOLDER / "clip_hf_gelu"
    component = detected(source)
    config = stage_of(component).model
    export_hf(tmp_path, config, read_component(component, abstract(ClipStage(config))), component.tokenizer)
    theirs, ours = (open_tensors(folder / "model.safetensors") for folder in (source, tmp_path))
    assert {*ours} == {*theirs}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].read())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    for section in ("text_config", "vision_config"):
        fields = {key: value for key, value in after[section].items() if key != "architectures"}
        assert fields.items() <= before[section].items()
    assert after["projection_dim"] == before["projection_dim"]


def test_half_precision_and_several_files(tmp_path):
    """Large models are published as an index and several files of bfloat16."""
    trees = exported(tmp_path, dtype=jnp.bfloat16)
    arrays_by_key = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    keys = sorted(arrays_by_key)
    places = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        arrays = {key: arrays_by_key[key] for key in part}
        write_safetensors(tmp_path / name, {key: arrays[key].shape for key in part}, arrays.items(), jnp.bfloat16)
        places |= dict.fromkeys(part, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    again = read_component(detected(tmp_path), abstract(ClipStage(CONFIG)))
    table = again.params["text"]["token_embedding"]["embedding"]
    rounded = trees.params["text"]["token_embedding"]["embedding"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(table, rounded)
    places[keys[0]] = places[keys[1]]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    second = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(WeightsError, check=mentions(path=second, missing=(keys[0],))):
        detected(tmp_path)


def test_position_ids_are_ignored(tmp_path):
    trees = exported(tmp_path)
    arrays = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    for tower, count in (("text", 6), ("vision", 10)):
        arrays[f"{tower}_model.embeddings.position_ids"] = np.arange(count, dtype=np.float32)[None]
    write_safetensors(
        tmp_path / "model.safetensors", {key: value.shape for key, value in arrays.items()}, arrays.items()
    )
    assert_same(read_component(detected(tmp_path), abstract(ClipStage(CONFIG))).params, trees.params)


def test_a_file_is_read_with_the_config_in_its_folder(tmp_path):
    trees = exported(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "model.safetensors").unlink()
    component = detected(tmp_path / "mine.safetensors")
    assert_same(read_component(component, abstract(ClipStage(CONFIG))).params, trees.params)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, check=mentions("config.json", path=tmp_path / "mine.safetensors")):
        detected(tmp_path / "mine.safetensors")


def test_towers_in_separate_folders_are_joined(tmp_path):
    trees = exported(tmp_path)
    arrays = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "model.safetensors").items()}
    content = json.loads((tmp_path / "config.json").read_text())
    for name, tower, keys in (("text_encoder", "text", ("text_",)), ("image_encoder", "vision", ("vis",))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content[f"{tower}_config"]))
        part = {key: value for key, value in arrays.items() if key.startswith(keys)}
        write_safetensors(folder / "model.safetensors", {key: value.shape for key, value in part.items()}, part.items())
    (tmp_path / "feature_extractor").mkdir()
    for name, place in (("preprocessor_config.json", "feature_extractor"), ("vocab.json", "tokenizer")):
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / place)
    shutil.move(tmp_path / "merges.txt", tmp_path / "tokenizer")
    parts = [detected(tmp_path / name) for name in ("text_encoder", "image_encoder")]
    assert [part.completed_by for part in parts] == ["", "the text encoder"]
    assert parts[0].tokenizer.vocab_size == 520 and parts[1].tokenizer is None
    component = merge_parts(parts)["clip"]
    assert stage_of(component).model == CONFIG
    again = read_component(component, abstract(ClipStage(CONFIG)))
    np.testing.assert_allclose(again.params["logit_scale"], np.log(1 / 0.07), rtol=1e-6)  # neither folder contains it
    for tower in ("text", "visual"):
        assert_same(again.params[tower], trees.params[tower])


def test_a_resnet_is_not_exported(tmp_path):
    config = dataclasses.replace(CONFIG, vision=ResNetConfig((1, 1, 1, 1), 4, 2, 32))
    with pytest.raises(WeightsError, check=mentions("ResNet", "openai_clip", "open_clip")):
        export_hf(tmp_path, config, random_clip(config), None)
    assert not [*tmp_path.iterdir()]


def test_a_tokenizer_of_another_kind_is_not_exported(tmp_path):
    """As the demo has: the error names the config field that must change."""
    tokenizer = train_sentencepiece(["a red circle", "a blue square"], 300)
    with pytest.raises(WeightsError, check=mentions("transformers", "text.kind clip")):
        export_hf(tmp_path, CONFIG, random_clip(CONFIG), tokenizer)
    assert not [*tmp_path.iterdir()]


# --- config files ---------------------------------------------------------------------------


def test_missing_fields_have_the_defaults_of_transformers():
    """As in openai/clip-vit-base-patch32."""
    assert read_text_config(Section({}, "")) == (TextConfig(49408, 77, 512, 12, 8, "quick_gelu", 4.0), 512)
    assert read_vision_config(Section({}, "")) == (VisionConfig(224, 32, 768, 12, 12, "quick_gelu", 4.0), 512)


def test_sections_of_older_files(tmp_path):
    """A section text_config_dict replaces text_config, including its defaults."""
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config_dict"], config["text_config"] = config["text_config"], {"hidden_size": 999}
    config["vision_config_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stage_of(detected(tmp_path)).model == CONFIG


def test_the_default_normalisation_is_openais(tmp_path):
    exported(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert stage_of(detected(tmp_path)).model.image_mean == CLIP_IMAGE_MEAN


@pytest.mark.parametrize("mean", [[0.5, 0.5], 0.5, ["a", 1, 2]], ids=str)
def test_an_invalid_normalisation(tmp_path, mean):
    exported(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_mean": mean}))
    with pytest.raises(FieldError, check=mentions(path=path, field="image_mean")):
        detected(tmp_path)
    path.write_text(json.dumps(config | {"image_mean": mean, "do_normalize": False}))
    model = stage_of(detected(tmp_path)).model
    assert (model.image_mean, model.image_std) == ((0.0,) * 3, (1.0,) * 3)


def test_the_tokenizer_must_have_the_vocabulary_of_the_tower(tmp_path):
    exported(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"<more>": 520}))
    with pytest.raises(WeightsError, check=mentions("config.json", "vocab_size 520", "521 tokens", path=tmp_path)):
        detected(tmp_path)


INVALID = {
    # field: value
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_new",
    "hidden_size": "24",
    "num_hidden_layers": 0,
    "intermediate_size": True,
}


@pytest.mark.parametrize("field", INVALID)
@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_errors_of_a_config_file_name_the_field(tmp_path, tower, field):
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[tower][field] = INVALID[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {"path": str(tmp_path / "config.json"), "field": f"{tower}.{field}"}
    with pytest.raises(FieldError, check=mentions(repr(INVALID[field]), **named)):
        detected(tmp_path)


def test_image_size_must_be_a_multiple_of_patch_size():
    with pytest.raises(FieldError, check=mentions(path="here", field="image_size")):
        read_vision_config(Section({"image_size": 225}, "here"))
