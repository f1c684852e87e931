"""Karlo's layouts: names and shapes at full size, import and export bit for bit, other sizes, unsupported stages."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from guided_files import shapes as published
from guided_files import source
from karlo_recordings import FOLDER, VARIATIONS, imported, karlo, stage_of
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import WeightsError
from dalle2_jax.text import clip_tokenizer
from dalle2_jax.weights.component import Source, merge_parts
from dalle2_jax.weights.karlo import diffusers as karlo_folders
from dalle2_jax.weights.karlo import diffusers_unet, original, priors
from dalle2_jax.weights.karlo.export import VARIATIONS as INNER
from dalle2_jax.weights.karlo.export import TrainedStage, export_diffusers
from dalle2_jax.weights.rules import check, shapes, under
from dalle2_jax.weights.stage_writer import Trees
from dalle2_jax.weights.tensors import open_tensors

CONFIGS = runpy.run_path(str(Path(__file__).parents[3] / "configs" / "karlo.py"))

# --- full size ------------------------------------------------------------------------------


def configured(name):
    """Returns a stage of configs/karlo.py, and the shapes of its variables."""
    config = CONFIGS["get_config"](name).to_dict()
    clip = Experiment.from_config(CONFIGS["get_config"]("clip").to_dict()).build(49_408, None)
    stage = clip if name == "clip" else Experiment.from_config(config).build(49_408, clip)
    return stage, jax.eval_shape(stage.init, jax.random.key(0))


def assert_bijection(rules, tree, tensors):
    """Asserts that a table is a bijection between a tree of shapes and published names and shapes."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    check(rules, tensors, paths, "the published file")
    assert shapes(rules, tree) == tensors


def prefixed(prefix, name):
    return {f"{prefix}{key}": shape for key, shape in published(name).items()}


def test_full_size_prior():
    stage, (params, stats) = configured("prior")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_022_028_544
    both = [*under("params", "", priors.prior_rules(stage.model)), *under("stats", "", priors.prior_stats())]
    assert_bijection(both, {"params": params, "stats": stats}, published("diffusers_karlo_prior"))
    assert_bijection(original.prior_rules(stage.model), params, prefixed("model.", "karlo_orig_prior"))


def test_full_size_decoder():
    stage, (params, _) = configured("decoder")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 893_318_086
    folder = prefixed("decoder.", "diffusers_karlo_decoder") | prefixed("text_proj.", "diffusers_karlo_text_proj")
    assert_bijection(karlo_folders.decoder_rules(stage.model), params, folder)
    assert_bijection(original.decoder_rules(stage.model), params, prefixed("model.", "karlo_orig_decoder"))
    (detected,) = original.detect(source(prefixed("model.", "karlo_orig_decoder")))
    assert stage_of(detected, stage.clip).model.unet == dataclasses.replace(
        stage.model.unet, dropout=0.0, remat="none", dtype="float32"
    )


def test_full_size_upsampler():
    stage, (params, stats) = configured("upsampler_1")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 691_579_523
    assert jax.tree.structure(stats["last"]) == jax.tree.structure(params)
    assert_bijection(diffusers_unet.unet_rules(stage.model), params, published("diffusers_karlo_super_res"))
    own = prefixed("model_first_steps.", "karlo_orig_sr_one") | prefixed("model_last_step.", "karlo_orig_sr_one")
    (detected,) = original.detect(source(own))
    both = [*under("params", "", detected.params), *under("stats", "", detected.stats)]
    assert_bijection(both, {"params": params, "stats": stats}, own)
    assert (stage_of(detected).low_size, stage_of(detected).model.image_size) == (64, 256)


def test_full_size_clip():
    _, (params, _) = configured("clip")
    text, visual = (sum(leaf.size for leaf in jax.tree.leaves(params[name])) for name in ("text", "visual"))
    assert (text, visual) == (123_650_304, 303_966_208)


def test_full_size_kandinsky():
    """Kandinsky 2.2's prior has Karlo's shape, for embeddings of 1,280."""
    stage, _ = configured("prior")
    model = dataclasses.replace(stage.model, embed_dim=1280, text_width=1280)
    clip = dataclasses.replace(stage.clip, model=dataclasses.replace(stage.clip.model, embed_dim=1280))
    params, stats = jax.eval_shape(dataclasses.replace(stage, model=model, clip=clip).init, jax.random.key(0))
    both = [*under("params", "", priors.prior_rules(model)), *under("stats", "", priors.prior_stats())]
    assert_bijection(both, {"params": params, "stats": stats}, published("diffusers_kandinsky22_prior"))


# --- import and export of folders -----------------------------------------------------------


def trained(system):
    """Returns imported stages as stages to export."""
    return {
        name: TrainedStage(stage, Trees(*variables), component.tokenizer)
        for name, (stage, variables, component) in system.items()
    }


def assert_same(one, other):
    """Asserts that two systems are equal bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].stage == other[name].stage
        assert one[name].component.config == other[name].component.config
        jax.tree.map(np.testing.assert_array_equal, one[name].variables, other[name].variables)
    assert one["clip"].component.tokenizer == other["clip"].component.tokenizer


def test_import_inverts_export(tmp_path):
    export_diffusers(tmp_path, trained(karlo()))
    again = karlo_folders.detect(Source.open(tmp_path))
    assert_same(karlo(), imported(again))
    for folder, inner in ((FOLDER, tmp_path), (VARIATIONS, tmp_path / INNER)):
        theirs, ours = (json.loads((place / "model_index.json").read_text()) for place in (folder, inner))
        assert ours == theirs
    for name in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last"):
        theirs, ours = (open_tensors(f / name / "diffusion_pytorch_model.safetensors") for f in (FOLDER, tmp_path))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key].read(), theirs[key].read()) for key in theirs)
        theirs, ours = (json.loads((f / name / "config.json").read_text()) for f in (FOLDER, tmp_path))
        assert ours.items() <= theirs.items() and ours["_class_name"]
    for name in ("prior", "decoder", "super_res"):
        theirs, ours = ((f / f"{name}_scheduler" / "scheduler_config.json").read_text() for f in (FOLDER, tmp_path))
        assert json.loads(ours) == json.loads(theirs)


def test_folders_of_both_pipelines_are_one_system(tmp_path):
    """Shared components are imported once; each single folder is a system too."""
    shutil.copytree(VARIATIONS, tmp_path / "iv")
    shared = "decoder decoder_scheduler super_res_first super_res_scheduler text_encoder text_proj tokenizer"
    for name in shared.split():
        shutil.copytree(FOLDER / name, tmp_path / "iv" / name)
    with pytest.raises(WeightsError, check=mentions("super_res_last", path=tmp_path / "iv")):
        karlo_folders.detect(Source.open(tmp_path / "iv"))
    shutil.copytree(FOLDER / "super_res_last", tmp_path / "iv" / "super_res_last")
    components = karlo_folders.detect(Source.open(tmp_path / "iv"))
    assert {component.stage for component in components} == {"clip", "decoder", "upsampler_1"}
    text_to_image = karlo_folders.detect(Source.open(FOLDER))
    both, alone = merge_parts([*text_to_image, *components]), merge_parts(text_to_image)
    assert both.keys() == alone.keys() == {"clip", "prior", "decoder", "upsampler_1"}
    assert both["clip"].config["model"]["vision"] is not None and alone["clip"].config["model"]["vision"] is None
    assert both["decoder"].where == alone["decoder"].where


# --- other sizes ----------------------------------------------------------------------------


OTHER = {
    "clip": {
        "model": {
            "embed_dim": 12,
            "text": {"width": 12, "layers": 1, "heads": 3, "activation": "gelu", "mlp_ratio": 3.0},
            "vision": {"kind": "vit", "image_size": 12, "patch_size": 4, "width": 8, "layers": 1, "heads": 2},
        },
        "embedding": {"normalisation": "raw", "scale": 1.0},
    },
    "prior": {
        "model": {"width": 8, "layers": 2, "heads": 2, "text_input": "clip", "learned_null": False},
        "conditioning": {"whiten": False},
        "diffusion": {"schedule": "cosine", "num_steps": 50, "prediction": "eps"},
        "sampling": {"name": "ddpm", "steps": 4, "clip_sample": None},
    },
    "decoder": {
        "model": {
            "unet": {
                "image_size": 12,
                "out_channels": 6,
                "channels": 4,
                "channel_mult": [1, 1.5, 3],
                "num_res_blocks": 1,
                "attention_resolutions": [12],
                "head_channels": 2,
                "context_dim": 10,
                "scale_shift": False,
                "norm_groups": 2,
                "emb_dim": 14,
            },
            "image_tokens": 3,
            "text_input": "clip",
            "text_emb_proj": True,
        },
        "conditioning": {"empty_caption": True},
        "diffusion": {
            "schedule": "cosine",
            "num_steps": 70,
            "prediction": "eps",
            "variance": "learned_range",
            "loss": "hybrid",
        },
        "sampling": {"name": "ddpm", "steps": 4, "clip_sample": 2.0},
    },
    "upsampler_1": {
        "model": {
            "image_size": 24,
            "in_channels": 6,
            "channels": 4,
            "channel_mult": [1, 2],
            "num_res_blocks": 2,
            "attention_resolutions": [],
            "middle_attention": False,
            "norm_groups": 4,
        },
        "conditioning": {"low_size": 12, "crop_fraction": 0.5},
        "diffusion": {"schedule": "cosine", "num_steps": 60, "prediction": "eps"},
        "sampling": {"name": "ddpm", "steps": 3},
    },
}
"""A system with Karlo's layout, and sizes and options that differ from Karlo's."""


def other(changes=None):
    """`TrainedStage` stages of random weights, of ``OTHER`` with some ``{"stage.section.field": value}`` changed."""
    tokenizer = clip_tokenizer(600)
    configs = json.loads(json.dumps(OTHER))
    for path, value in (changes or {}).items():
        *sections, field = path.split(".")
        section = configs
        for name in sections:
            section = section[name]
        section[field] = value
    stages, clip = {}, None
    for name, config in configs.items():
        config |= {"stage": name}
        if name != "upsampler_1":
            config["text"] = {"vocab_size": 600, "context_length": 9}
        stage = Experiment.from_config(config).build(600, clip)
        clip = stage if name == "clip" else clip
        stages[name] = TrainedStage(stage, Trees(*testing.tiny_variables(stage)), tokenizer)
    return stages


def test_import_inverts_export_at_other_sizes(tmp_path):
    stages = other()
    export_diffusers(tmp_path, stages)
    again = imported(karlo_folders.detect(Source.open(tmp_path)))
    for name, (stage, variables, _) in again.items():
        # The files do not contain the temperature.
        temperature = {"logit_scale": variables.params["logit_scale"]} if name == "clip" else {}
        theirs = stages[name].stage.model
        jax.tree.map(np.testing.assert_array_equal, variables.params, stages[name].trees.params | temperature)
        assert stage.model == theirs
    assert {again[name].stage.diffusion.num_steps for name in ("prior", "decoder", "upsampler_1")} == {50, 70, 60}
    assert again["prior"].stage.diffusion.prediction == "eps" and again["prior"].stage.sampling.clip_sample is None
    np.testing.assert_array_equal(again["prior"].variables.stats["std"], 1.0)
    np.testing.assert_array_equal(again["prior"].variables.stats["mean"], 0.0)
    jax.tree.map(np.testing.assert_array_equal, again["upsampler_1"].variables.stats["last"], variables.params)


def test_export_in_bfloat16(tmp_path):
    stages = other()
    (tmp_path / "half").mkdir()
    export_diffusers(tmp_path / "half", stages, jax.numpy.bfloat16)
    again = imported(karlo_folders.detect(Source.open(tmp_path / "half")))
    kernel = stages["prior"].trees.params["out_proj"]["kernel"]
    np.testing.assert_allclose(again["prior"].variables.params["out_proj"]["kernel"], kernel, rtol=2**-8)


@pytest.mark.parametrize(
    ("changes", "stage", "named"),
    [
        ({"clip.embedding.normalisation": "unit"}, "clip", "embedding"),
        ({"clip.model.text.width": 6}, "clip", "model.text.width"),
        ({"prior.model.learned_null": True}, "prior", "model.learned_null"),
        ({"prior.model.time_token": False}, "prior", "model.time_token"),
        ({"prior.model.text_input": "tokens"}, "prior", "model.text_input"),
        ({"prior.diffusion.schedule": "linear"}, "prior", "schedule 'linear'"),
        ({"prior.diffusion.prediction": "v"}, "prior", "prediction 'v'"),
        ({"decoder.conditioning.empty_caption": False}, "decoder", "conditioning.empty_caption"),
        ({"decoder.model.text_emb_proj": False}, "decoder", "model.text_emb_proj"),
        ({"decoder.model.unet.num_heads": 2}, "decoder", "num_heads 2"),
        ({"upsampler_1.model.patch_size": 2}, "upsampler_1", "patch_size 2"),
        ({"upsampler_1.model.input_skip": True}, "upsampler_1", "input_skip True"),
        ({"upsampler_1.model.resblock_updown": False}, "upsampler_1", "resblock_updown False"),
        (
            {"upsampler_1.model.attention_resolutions": [12], "upsampler_1.model.num_heads": 2},
            "upsampler_1",
            "middle_attention",
        ),
        ({"decoder.model.unet.middle_attention": False}, "decoder", "middle_attention"),
        ({"upsampler_1.conditioning.upscale": "linear"}, "upsampler_1", "conditioning.upscale"),
        ({"upsampler_1.conditioning.low_size": 6}, "upsampler_1", "conditioning.low_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_properties_are_named(tmp_path, changes, stage, named):
    with pytest.raises(WeightsError, check=mentions(f"stage {stage}", named)):
        export_diffusers(tmp_path, other(changes))
    assert not [*tmp_path.iterdir()]


def test_systems_that_are_not_a_pipeline(tmp_path):
    stages = other()
    for omitted in ("decoder", "clip"):
        with pytest.raises(WeightsError, check=mentions("diffusers", f"stage {omitted}", "lacks")):
            export_diffusers(tmp_path, {name: stage for name, stage in stages.items() if name != omitted})
    with pytest.raises(WeightsError, check=mentions("diffusers", "stage upsampler_2")):
        export_diffusers(tmp_path, {**stages, "upsampler_2": stages["upsampler_1"]})
    without = {name: stage for name, stage in other({"clip.model.vision": None}).items() if name != "prior"}
    with pytest.raises(WeightsError, check=mentions("diffusers", "prior", "image tower")):
        export_diffusers(tmp_path, without)
    assert not [*tmp_path.iterdir()]
