"""Karlo's layouts: names and shapes at full size, folders in and out bit for bit, other sizes, what does not fit."""

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

from dalle2_jax import build, testing
from dalle2_jax.text import clip_tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights import diffusers_unet, karlo_files, merged, priors
from dalle2_jax.weights import karlo as karlo_folders
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.karlo_export import VARIATIONS as INNER
from dalle2_jax.weights.karlo_export import Trained, export_diffusers
from dalle2_jax.weights.landing import Trees, stored_config
from dalle2_jax.weights.rules import check, shapes, under
from dalle2_jax.weights.tensors import open_tensors

CONFIGS = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "karlo.py"))

# --- full size ------------------------------------------------------------------------------


def configured(name):
    """A stage of configs/karlo.py, and the shapes of its variables."""
    config = CONFIGS["get_config"](name).to_dict()
    clip = build.build_stage(CONFIGS["get_config"]("clip").to_dict(), 49_408, None)
    stage = clip if name == "clip" else build.build_stage(config, 49_408, clip)
    return stage, jax.eval_shape(stage.init, jax.random.key(0))


def fits(rules, tree, tensors):
    """A table is a bijection between a tree of shapes and a checkpoint's published names and shapes."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    check(rules, tensors, paths, "the published file")
    assert shapes(rules, tree) == tensors


def prefixed(prefix, name):
    return {f"{prefix}{key}": shape for key, shape in published(name).items()}


def test_full_size_prior():
    stage, (params, stats) = configured("prior")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_022_028_544
    both = [*under("params", "", priors.prior_rules(stage.model)), *under("stats", "", priors.prior_stats())]
    fits(both, {"params": params, "stats": stats}, published("diffusers_karlo_prior"))
    fits(karlo_files.prior_rules(stage.model), params, prefixed("model.", "karlo_orig_prior"))


def test_full_size_decoder():
    stage, (params, _) = configured("decoder")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 893_318_086
    folder = prefixed("decoder.", "diffusers_karlo_decoder") | prefixed("text_proj.", "diffusers_karlo_text_proj")
    fits(karlo_folders.decoder_rules(stage.model), params, folder)
    fits(karlo_files.decoder_rules(stage.model), params, prefixed("model.", "karlo_orig_decoder"))
    (recognised,) = karlo_files.recognise(source(prefixed("model.", "karlo_orig_decoder")))
    assert stage_of(recognised, stage.clip).model.unet == dataclasses.replace(
        stage.model.unet, dropout=0.0, remat=False, dtype="float32"
    )


def test_full_size_upsampler():
    stage, (params, stats) = configured("upsampler_1")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 691_579_523
    assert jax.tree.structure(stats["last"]) == jax.tree.structure(params)
    fits(diffusers_unet.unet_rules(stage.model), params, published("diffusers_karlo_super_res"))
    own = prefixed("model_first_steps.", "karlo_orig_sr_one") | prefixed("model_last_step.", "karlo_orig_sr_one")
    (recognised,) = karlo_files.recognise(source(own))
    both = [*under("params", "", recognised.params), *under("stats", "", recognised.stats)]
    fits(both, {"params": params, "stats": stats}, own)
    assert (stage_of(recognised).low_size, stage_of(recognised).model.image_size) == (64, 256)


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
    fits(both, {"params": params, "stats": stats}, published("diffusers_kandinsky22_prior"))


# --- folders, in and out --------------------------------------------------------------------


def trained(system):
    """What an export takes of imported stages."""
    return {
        name: Trained(stored_config(component), stage.model, Trees(*variables), component.tokenizer)
        for name, (stage, variables, component) in system.items()
    }


def same(one, other):
    """Two systems, bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].stage == other[name].stage
        assert one[name].component.config == other[name].component.config
        jax.tree.map(np.testing.assert_array_equal, one[name].variables, other[name].variables)
    assert one["clip"].component.tokenizer == other["clip"].component.tokenizer


def test_out_and_in_again_is_the_same_bit_for_bit(tmp_path):
    export_diffusers(tmp_path, trained(karlo()))
    again = karlo_folders.recognise(Source.open(tmp_path))
    same(karlo(), imported(again))
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
    """What they share is taken once; each alone is a system too."""
    shutil.copytree(VARIATIONS, tmp_path / "iv")
    shared = "decoder decoder_scheduler super_res_first super_res_scheduler text_encoder text_proj tokenizer"
    for name in shared.split():
        shutil.copytree(FOLDER / name, tmp_path / "iv" / name)
    with pytest.raises(UserError, match="lacks super_res_last: get the whole folder"):
        karlo_folders.recognise(Source.open(tmp_path / "iv"))
    shutil.copytree(FOLDER / "super_res_last", tmp_path / "iv" / "super_res_last")
    components = karlo_folders.recognise(Source.open(tmp_path / "iv"))
    assert {component.stage for component in components} == {"clip", "decoder", "upsampler_1"}
    text_to_image = karlo_folders.recognise(Source.open(FOLDER))
    whole, alone = merged([*text_to_image, *components]), merged(text_to_image)
    assert whole.keys() == alone.keys() == {"clip", "prior", "decoder", "upsampler_1"}
    assert whole["clip"].config["model"]["vision"] is not None and alone["clip"].config["model"]["vision"] is None
    assert whole["decoder"].where == alone["decoder"].where


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
        "sampling": {"name": "ddpm", "steps": 4, "clip": None},
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
        "sampling": {"name": "ddpm", "steps": 4, "clip": 2.0},
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
"""A system of the layout, and of no size or part that Karlo has."""


def other(changes=None):
    """`Trained` stages of random weights, of ``OTHER`` with some ``{"stage.section.field": value}`` changed."""
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
        config |= {"stage": name, "data": {}, "optim": {}, "mesh": {}}
        if name != "upsampler_1":
            config["text"] = {"vocab_size": 600, "context_length": 9}
        stage = build.build_stage(config, 600, clip)
        clip = stage if name == "clip" else clip
        stages[name] = Trained(config, stage.model, Trees(*testing.tiny_variables(stage)), tokenizer)
    return stages


def test_other_sizes_go_out_and_in(tmp_path):
    stages = other()
    export_diffusers(tmp_path, stages)
    again = imported(karlo_folders.recognise(Source.open(tmp_path)))
    for name, (stage, variables, _) in again.items():
        temperature = {"logit_scale": variables.params["logit_scale"]} if name == "clip" else {}  # which no file has
        theirs = stages[name].model
        jax.tree.map(np.testing.assert_array_equal, variables.params, stages[name].trees.params | temperature)
        assert stage.model == theirs
    # an embedding that was white stays as it is
    assert {again[name].stage.diffusion.num_steps for name in ("prior", "decoder", "upsampler_1")} == {50, 70, 60}
    assert again["prior"].stage.diffusion.prediction == "eps" and again["prior"].stage.sampling.clip is None
    np.testing.assert_array_equal(again["prior"].variables.stats["std"], 1.0)
    np.testing.assert_array_equal(again["prior"].variables.stats["mean"], 0.0)
    jax.tree.map(np.testing.assert_array_equal, again["upsampler_1"].variables.stats["last"], variables.params)


def test_half_the_size(tmp_path):
    stages = other()
    (tmp_path / "half").mkdir()
    export_diffusers(tmp_path / "half", stages, jax.numpy.bfloat16)
    again = imported(karlo_folders.recognise(Source.open(tmp_path / "half")))
    kernel = stages["prior"].trees.params["out_proj"]["kernel"]
    np.testing.assert_allclose(again["prior"].variables.params["out_proj"]["kernel"], kernel, rtol=2**-8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip.embedding.normalisation": "unit"}, "stage clip .* raw, scaled by 1"),
        ({"clip.model.text.width": 6}, "stage clip .* not as wide"),
        ({"prior.model.learned_null": True}, "stage prior .* learned embedding, not the empty caption"),
        ({"prior.model.time_token": False}, "stage prior .* no time token"),
        ({"prior.model.text_input": "tokens"}, "stage prior .* reads tokens"),
        ({"prior.diffusion.schedule": "linear"}, "stage prior: UnCLIPScheduler has no schedule 'linear'"),
        ({"prior.diffusion.prediction": "v"}, "stage prior: UnCLIPScheduler predicts no 'v'"),
        ({"decoder.conditioning.empty_caption": False}, "stage decoder .* hidden, not the empty caption"),
        ({"decoder.model.text_emb_proj": False}, r"stage decoder .* \(text_emb_proj\)"),
        ({"decoder.model.unet.num_heads": 2}, "stage decoder: .* heads of one width, not 2 on every level"),
        ({"upsampler_1.model.patch_size": 2}, "stage upsampler_1: diffusers' U-Nets have no patch_size 2"),
        ({"upsampler_1.model.input_skip": True}, "stage upsampler_1: diffusers' U-Nets have no input_skip True"),
        ({"upsampler_1.model.resblock_updown": False}, "stage upsampler_1: .* no resblock_updown False"),
        (
            {"upsampler_1.model.attention_resolutions": [12], "upsampler_1.model.num_heads": 2},
            "stage upsampler_1: .* attention in the middle if and only if there is a context",
        ),
        ({"decoder.model.unet.middle_attention": False}, "stage decoder: .* attention in the middle if and only if"),
        ({"upsampler_1.conditioning.upscale": "linear"}, "stage upsampler_1 .* enlarged linearly"),
        ({"upsampler_1.conditioning.low_size": 6}, "stage upsampler_1 .* other pictures than the decoder's, 12 wide"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as error:
        export_diffusers(tmp_path, other(changes))
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_systems_that_are_no_pipeline(tmp_path):
    stages = other()
    for left_out, says in (("decoder", "need stage decoder"), ("clip", "need stage clip")):
        with pytest.raises(UserError, match=says):
            export_diffusers(tmp_path, {name: stage for name, stage in stages.items() if name != left_out})
    with pytest.raises(UserError, match="no stage upsampler_2"):
        export_diffusers(tmp_path, {**stages, "upsampler_2": stages["upsampler_1"]})
    without = {name: stage for name, stage in other({"clip.model.vision": None}).items() if name != "prior"}
    with pytest.raises(UserError, match="neither a prior nor an image tower"):
        export_diffusers(tmp_path, without)
    assert not [*tmp_path.iterdir()]
