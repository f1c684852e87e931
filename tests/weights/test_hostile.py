"""Hostile config files and shapes: one error line that names the file, before much is read or allocated."""

import functools
import json
import shutil
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from checkpoints import KARLO, VARIATIONS, assert_error, run, write
from clips import keys_of, shape_only
from raised import mentions

from dalle2_jax.cli import weights as weights
from dalle2_jax.errors import UserError
from dalle2_jax.weights import component, detect
from dalle2_jax.weights.config_files import WeightsWarning
from dalle2_jax.weights.importer import check_complete
from dalle2_jax.weights.inspection import summarise
from dalle2_jax.weights.karlo import diffusers, diffusers_unet
from dalle2_jax.weights.tensors import open_tensors

SMALL = sorted(path.relative_to(KARLO) for path in KARLO.rglob("*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of Karlo-tiny's folder with linked weights. Tests restore the files they change."""
    root = tmp_path_factory.mktemp("hostile") / "karlo"
    for path in (path for path in KARLO.rglob("*") if path.is_file() and path.suffix != ".npz"):
        (root / path.relative_to(KARLO)).parent.mkdir(parents=True, exist_ok=True)
        place = root / path.relative_to(KARLO)
        place.symlink_to(path) if path.suffix == ".safetensors" else shutil.copyfile(path, place)
    return root


@pytest.fixture
def quick(monkeypatch):
    """Caches opened weights and tables: these tests vary config files only."""
    monkeypatch.setattr(component, "open_tensors", functools.cache(open_tensors))
    monkeypatch.setattr(diffusers_unet, "unet_rules", functools.lru_cache(64)(diffusers_unet.unet_rules))
    monkeypatch.setattr(diffusers, "decoder_rules", functools.lru_cache(64)(diffusers.decoder_rules))


def inspected(path):
    """Returns the error message of inspecting and checking a folder; None if there is no error."""
    try:
        for each in detect.detect(path).components:
            summarise(each).compatibility()
            check_complete(each)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::dalle2_jax.weights.config_files.WeightsWarning")
@pytest.mark.parametrize("name", SMALL, ids=str)
def test_mutated_config_files_give_one_error_line(folder, quick, name):
    path = folder / name
    alone = name.parts[0] in ("text_encoder", "tokenizer", "prior")
    target = folder / {"tokenizer": "text_encoder"}.get(name.parts[0], name.parts[0]) if alone else folder
    original = path.read_bytes()
    assert inspected(target) is None
    errors = []
    try:
        for content in hostile.mutations(path, 100):
            path.write_bytes(content)
            errors.append(inspected(target))
    finally:
        path.write_bytes(original)
    lines = [line for line in errors if line is not None]
    assert len(lines) > 10
    assert all("\n" not in line and len(line) < 1000 and str(folder) in line for line in lines)


# --- one field ------------------------------------------------------------------------------


def altered(folder, name, **fields):
    """Changes fields of a config file; returns a function that restores it."""
    path = folder / name
    original = path.read_text()
    path.write_text(json.dumps(json.loads(original) | fields))
    return lambda: path.write_text(original)


FIELDS = {
    # file: {field: invalid values}
    "decoder/config.json": {
        "class_embed_type": (None, "timestep", 3),
        "layers_per_block": (10**7, [3, 3, 3, 10**9]),
        "block_out_channels": ([8] * 1000, [2**40] * 4, "8"),
        "sample_size": (10**9, -16, [16, 24]),
        "attention_type": ("gated",),
        "norm_num_groups": ("4", 10**20),
        "time_embedding_dim": ("x", -3),
        "dropout": ("0", [0]),
        "_class_name": ("UNet3DConditionModel", [], {}),
        "down_block_types": (None, [[]] * 4, "ResnetDownsampleBlock2D"),
    },
    "prior/config.json": {
        "num_layers": (10**7, 2, -1),
        "num_embeddings": (76, 78, 10**12),
        "embedding_dim": (49, 768),
        "num_attention_heads": (5, 10**9),
    },
    "prior_scheduler/scheduler_config.json": {
        "num_train_timesteps": (10**12, "1000"),
        "clip_sample": ("yes",),
        "clip_sample_range": ([5], "5"),
        "variance_type": ([], 4),
    },
    "text_encoder/config.json": {
        "num_hidden_layers": (10**7, 999, 2),
        "vocab_size": (579, 2**31),
        "projection_dim": (47, 2**30),
        "max_position_embeddings": (76, 78),
        "intermediate_size": (97,),
        "num_attention_heads": (5,),
        "eos_token_id": (3, 576, [577], "2"),
        "pruned_heads": ({"0": [1]},),
        "model_type": ([], 3),
    },
    "text_proj/config.json": {
        "clip_extra_context_tokens": (5, 10**8),
        "clip_embeddings_dim": (47, "48"),
        "time_embed_dim": (31, None),
        "cross_attention_dim": (44,),
    },
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields])
def test_errors_name_file_and_field(folder, quick, name, field):
    for value in FIELDS[name][field]:
        undo = altered(folder, name, **{field: value})
        start = time.process_time()
        try:
            line = inspected(folder)
        finally:
            undo()
        assert line is not None and str(folder / name) in line and field in line, (field, value, line)
        assert time.process_time() - start < 1


def test_ten_million_layers_are_rejected_at_once(folder, quick):
    undo = altered(folder, "text_encoder/config.json", num_hidden_layers=10**7)
    start = time.process_time()
    try:
        assert_error(run(weights, "inspect", folder / "text_encoder"), "text_encoder/config.json", "num_hidden_layers")
    finally:
        undo()
    assert time.process_time() - start < 1


def test_the_end_token_may_be_that_of_the_tokenizer(folder, quick):
    for value in (2, 577):
        undo = altered(folder, "text_encoder/config.json", eos_token_id=value)
        try:
            assert inspected(folder / "text_encoder") is None
        finally:
            undo()


def test_another_model_type_is_named(folder, quick):
    undo = altered(folder, "text_encoder/config.json", model_type="siglip")
    try:
        assert_error(
            run(weights, "inspect", folder / "text_encoder"), "text_encoder/config.json", "model_type", "'siglip'"
        )
    finally:
        undo()


def test_a_listed_scheduler_may_not_be_missing(tmp_path):
    shutil.copytree(KARLO, tmp_path / "karlo", ignore=shutil.ignore_patterns("*.npz"))
    (tmp_path / "karlo" / "prior_scheduler" / "scheduler_config.json").unlink()
    assert mentions("prior_scheduler/scheduler_config.json")(inspected(tmp_path / "karlo"))
    shutil.rmtree(tmp_path / "karlo" / "prior_scheduler")
    assert mentions(tmp_path / "karlo", "lacks prior_scheduler")(inspected(tmp_path / "karlo"))


def test_statistics_that_were_never_estimated_are_rejected(tmp_path):
    shutil.copytree(KARLO, tmp_path / "karlo", ignore=shutil.ignore_patterns("*.npz"))
    path = tmp_path / "karlo" / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = {key: each.read() for key, each in open_tensors(path).items()}
    write(path, tensors | {"clip_std": np.zeros_like(tensors["clip_std"])})
    done = run(weights, "import", "auto", tmp_path / "karlo", tmp_path / "new")
    assert_error(done, "prior/diffusion_pytorch_model.safetensors", "clip_std")
    assert not (tmp_path / "new").exists()


def test_unknown_fields_cause_a_warning(folder):
    undo = altered(folder, "decoder/config.json", attention_of_tomorrow="ring", nothing=None)
    try:
        with pytest.warns(WeightsWarning) as caught:
            assert inspected(folder) is None
    finally:
        undo()
    (line,) = (str(each.message) for each in caught)
    assert str(folder / "decoder/config.json") in line and "attention_of_tomorrow 'ring'" in line and "\n" not in line


def test_the_fixtures_have_no_unknown_fields():
    """A warning would be an error."""
    for path in (KARLO, VARIATIONS / "image_encoder"):
        assert detect.detect(path).components


# --- shapes ---------------------------------------------------------------------------------


SHAPES = ((), (1,), (0,), (3, 5), (2, 2, 2), (0, 0), (7, 1, 1, 1), (10**9, 10**9))


@pytest.mark.parametrize("name", ["karlo_orig_prior", "karlo_orig_decoder", "guided_64_diffusion"])
def test_impossible_shapes_give_one_error_line(name):
    """State dicts are detected by keys; their shapes may be anything."""
    prefix = "model." if name.startswith("karlo") else ""
    tensors = {f"{prefix}{key}": each for key, each in shape_only(keys_of(name)).items()}
    random, lines = np.random.default_rng(0), []
    identifying = [key for key in tensors if "resblocks" not in key]
    for _ in range(20):
        wrong = dict(tensors)
        for key in random.choice(identifying, max(3, len(identifying) // 20)):
            wrong[key] = wrong[key]._replace(shape=SHAPES[random.integers(len(SHAPES))])
        try:
            for each in detect._detect(detect._ALL, component.Source(Path("state.pt"), wrong)):
                summarise(each).compatibility()
        except UserError as error:
            lines.append(str(error))
    assert lines and all("\n" not in line and "state.pt" in line for line in lines)
