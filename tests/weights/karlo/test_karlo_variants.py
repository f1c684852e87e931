"""Karlo's released files, Kandinsky's and ECLIPSE's priors, and folders that are damaged or not supported."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guided_files import source
from karlo_recordings import (
    FOLDER,
    VARIATIONS,
    error,
    imported,
    karlo,
    recorded,
    stage_of,
)
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.errors import WeightsError
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import Variables
from dalle2_jax.weights.component import Source, merge_parts
from dalle2_jax.weights.config_files import FieldError
from dalle2_jax.weights.families import guided_diffusion
from dalle2_jax.weights.karlo import diffusers as karlo_folders
from dalle2_jax.weights.karlo import original, priors
from dalle2_jax.weights.rules import to_tensors
from dalle2_jax.weights.stage_writer import Trees, read_component
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

# --- Karlo's own files ----------------------------------------------------------------------

UNET = UNetConfig(
    image_size=16,
    out_channels=6,
    channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    context_dim=12,
)
PRIOR = PriorConfig(128, 2, 2, 10, 7, "clip", text_width=10, learned_null=False)
DECODER = DecoderConfig(UNET, 10, 3, "clip", text_width=10, text_emb_proj=True)
UPSAMPLER = dataclasses.replace(
    UNET,
    image_size=64,
    in_channels=6,
    out_channels=3,
    attention_resolutions=(),
    context_dim=None,
    scale_shift=False,
    middle_attention=False,
)


def random_params(module, *inputs):
    """Returns random parameters of a network."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: noise.standard_normal(leaf.shape).astype(np.float32), shapes)


def prior_params():
    emb, text = jnp.zeros((1, 10)), jnp.zeros((1, 7, 10))
    return random_params(PriorNetwork(PRIOR), emb, jnp.zeros(1, jnp.int32), emb, text, jnp.ones((1, 7), bool))


RENAMED = {
    # name in diffusers' folder: name in Karlo's file, as in the published conversion
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "prd_embedding": "prd_emb",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
    "transformer_blocks": "transformer.resblocks",
    "norm1": "ln_1",
    "norm3": "ln_2",
    "attn1.to_out.0": "attn.c_proj",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
}


def with_karlo_names(folder):
    """Returns a prior's tensors with Karlo's names: q, k and v interleaved by blocks of 64 rows."""
    theirs = {}
    for key, value in folder.items():
        for one, other in RENAMED.items():
            key = key.replace(one, other)
        theirs[key] = value
    for key in [key for key in theirs if "to_q" in key]:
        parts = [theirs.pop(key.replace("to_q", f"to_{name}")) for name in "qkv"]
        rows = [np.split(part, len(part) // 64) for part in parts]
        packed = np.concatenate([piece for block in zip(*rows, strict=True) for piece in block])
        theirs[key.replace("attn1.to_q", "attn.c_qkv")] = packed
    return {f"model.{key}": value for key, value in theirs.items()}


def test_karlos_prior_with_its_statistics():
    params = prior_params()
    tensors = with_karlo_names(dict(to_tensors(priors.prior_rules(PRIOR), params)))
    (weights,) = original.detect(source(tensors))
    stats = np.random.default_rng(2).uniform(0.5, 1.5, (2, 10)).astype(np.float32)
    (white,) = original.detect(source({"0": stats[0], "1": stats[1]}, "ViT-L-14_stats.th"))
    joined = merge_parts([weights, white])["prior"]
    stage = dataclasses.replace(testing.tiny_stage("prior"), model=PRIOR, whiten=True)
    trees = read_component(joined, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, trees.params, params)
    np.testing.assert_array_equal([trees.stats["mean"], trees.stats["std"]], stats)
    assert joined.config["model"]["heads"] == 2 and joined.config["text"]["context_length"] == 7
    assert joined.config["conditioning"] == {"drop_text": 0.2, "whiten": True}
    assert joined.config["sampling"] == {"name": "ddpm", "clip_sample": 10.0, "steps": 25, "guidance": 4.0}
    fields = {"path": "file.pt", "missing": ("stats/mean", "stats/std")}
    with pytest.raises(WeightsError, check=mentions("ViT-L-14_stats.th", **fields)):
        read_component(weights, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))


def test_karlos_decoder():
    x, emb = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 10))
    params = random_params(DecoderNetwork(DECODER), x, jnp.zeros(1, jnp.int32), emb, emb, jnp.zeros((1, 7, 10)))
    unet = dict(to_tensors(guided_diffusion.unet_rules(UNET), params["unet"]))
    projections = {
        "cf_param": params["null_image_emb"],
        "clip_emb.weight": params["image_emb_proj"]["kernel"].T,
        "clip_emb.bias": params["image_emb_proj"]["bias"],
        # channel c of token k is row 3 c + k
        "clip_tok_proj.weight": np.stack([params["image_token_proj"]["kernel"][:, r % 3, r // 3] for r in range(36)]),
        "clip_tok_proj.bias": np.stack([params["image_token_proj"]["bias"][r % 3, r // 3] for r in range(36)]),
        "text_feat_proj.weight": params["text_emb_proj"]["kernel"].T,
        "text_feat_proj.bias": params["text_emb_proj"]["bias"],
        "text_seq_proj.0.weight": params["text_seq_proj"]["kernel"].T,
        "text_seq_proj.0.bias": params["text_seq_proj"]["bias"],
        "text_seq_proj.1.weight": params["text_seq_norm"]["scale"],
        "text_seq_proj.1.bias": params["text_seq_norm"]["bias"],
    }
    (component,) = original.detect(source({f"model.{key}": value for key, value in {**unet, **projections}.items()}))
    trees = read_component(component, Trees(params, {}))
    jax.tree.map(np.testing.assert_array_equal, trees.params, params)
    model = component.config["model"]
    assert UNetConfig(**model["unet"]) == UNET and model["image_tokens"] == 3
    assert component.config["diffusion"]["variance"] == "learned_range"
    assert component.config["conditioning"] == {"drop_text": 0.3, "drop_image": 0.1, "empty_caption": True}


@pytest.mark.parametrize("both", [True, False])
def test_karlos_upsampler(both):
    x, t = jnp.zeros((1, 64, 64, 6)), jnp.zeros(1, jnp.int32)
    first = random_params(UNet(UPSAMPLER), x, t)
    last = jax.tree.map(np.negative, first)
    names = {"model_first_steps.": first} | ({"model_last_step.": last} if both else {})
    tables = ((guided_diffusion.unet_rules(UPSAMPLER, name), tree) for name, tree in names.items())
    tensors = {key: value for rules, tree in tables for key, value in to_tensors(rules, tree)}
    (component,) = original.detect(source(tensors))
    stage = stage_of(component)
    assert stage.model == UPSAMPLER and stage.low_size == 16 and stage.last_network == both
    trees = read_component(component, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, trees.params, first)
    jax.tree.map(np.testing.assert_array_equal, trees.stats, {"last": last} if both else {})


def test_other_files_are_not_detected():
    for tensors in ({"0": (3,)}, {"0": (3,), "1": (4,)}, {"input_blocks.0.0.weight": (4, 3, 3, 3)}, {}):
        assert original.detect(source(tensors)) == []
    for key in ("model.prd_emb", "model.cf_param", "model_first_steps.input_blocks.0.0.weight"):
        with pytest.raises(WeightsError, check=mentions()):  # truncated
            original.detect(source({key: (1,)}))


# --- Kandinsky, ECLIPSE ---------------------------------------------------------------------


@pytest.fixture
def kandinsky(tmp_path):
    """Returns a folder in Kandinsky's layout with Karlo-tiny's prior and CLIP."""
    for name in ("prior", "text_encoder", "tokenizer"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    shutil.copytree(VARIATIONS / "image_encoder", tmp_path / "image_encoder")
    (tmp_path / "scheduler").mkdir()
    schedule = json.loads((FOLDER / "prior_scheduler" / "scheduler_config.json").read_text())
    write(tmp_path / "scheduler" / "scheduler_config.json", schedule | {"clip_sample_range": 10.0})
    write(tmp_path / "model_index.json", {"_class_name": "KandinskyV22PriorPipeline"})
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


def test_kandinskys_prior_includes_its_clip(kandinsky):
    system = imported(priors.detect(Source.open(kandinsky)))
    assert system.keys() == {"clip", "prior"} and system["clip"].stage.model.vision is not None
    ours, theirs = system["prior"], karlo()["prior"]
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert ours.stage.sampling == dataclasses.replace(theirs.stage.sampling, clip_sample=10.0) and ours.stage.whiten
    assert ours.component.family == "Kandinsky 2.2 prior"


def test_a_single_prior_uses_the_scheduler_of_a_sibling_folder():
    (component,) = priors.detect(Source.open(FOLDER / "prior"))
    assert component.stage == "prior" and component.config["sampling"]["clip_sample"] == 5.0
    assert stage_of(component, karlo()["clip"].stage).whiten


@pytest.fixture
def eclipse(tmp_path):
    """Returns a folder in ECLIPSE's layout with Karlo-tiny's prior without time, and its tensors."""
    file = open_tensors(FOLDER / "prior" / "diffusion_pytorch_model.safetensors")
    tensors = {key: each.read() for key, each in file.items()}
    tensors = {key: value for key, value in tensors.items() if not key.startswith("time_embedding.")}
    tensors["positional_embedding"] = np.delete(tensors["positional_embedding"], 78, axis=1)
    tensors["clip_mean"] = tensors["clip_std"] = np.zeros((1, 48), np.float32)
    config = json.loads((FOLDER / "prior" / "config.json").read_text()) | {"additional_embeddings": 3}
    write(tmp_path / "config.json", {k: v for k, v in config.items() if not k.startswith("time_embed")})
    sizes = {key: value.shape for key, value in tensors.items()}
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", sizes, tensors.items())
    return tmp_path, tensors


def one_evaluation(tensors, noise, text_emb, text_seq, mask, heads=4):
    """Returns the output of the public code in float64: tokens [text, text embedding, noise, query], causal."""
    t = {key: value.astype(np.float64) for key, value in tensors.items()}

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def split_heads(x):
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    tail = [dense(text_emb, "embedding_proj"), dense(noise, "proj_in"), np.tile(t["prd_embedding"][0], (len(noise), 1))]
    x = np.concatenate([dense(text_seq, "encoder_hidden_states_proj"), np.stack(tail, axis=1)], axis=1)
    x = x + t["positional_embedding"]
    hidden = np.pad(~mask, ((0, 0), (0, 3))) * -10000.0
    hidden = hidden[:, None] + np.triu(np.full((x.shape[1],) * 2, -10000.0), 1)
    for i in range(3):
        block = f"transformer_blocks.{i}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (split_heads(dense(h, f"{block}.attn1.to_{name}")) for name in "qkv")
        logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + hidden[:, None]
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        h = (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(h, f"{block}.attn1.to_out.0")
        h = np.asarray(jax.nn.gelu(dense(norm(x, f"{block}.norm3"), f"{block}.ff.net.0.proj"), approximate=False))
        x = x + dense(h.astype(np.float64), f"{block}.ff.net.2")
    return dense(norm(x, "norm_out")[:, -1], "proj_to_clip_embeddings")


def test_eclipses_prior_samples_in_one_evaluation(eclipse):
    folder, tensors = eclipse
    (component,) = priors.detect(Source.open(folder))
    assert component.family == "ECLIPSE prior" and component.stats == ()
    clip, theirs = karlo()["clip"], recorded(FOLDER / "parity.npz")
    stage = stage_of(component, clip.stage)
    stage.check_sampling(stage.sampling)
    trees = read_component(component, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    batch = {"tokens": theirs["text/input_ids"], "mask": theirs["text/attention_mask"] > 0}
    condition = stage.condition(stage.prepare_captions(clip.variables, batch))
    noise = theirs["prior/init_noise"]
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def sample(params, condition, x_T):
        return stage.sample(Variables(params, {}), keys, condition, stage.plan(x_T=x_T))

    inputs = (np.asarray(condition[name]) for name in ("text_emb", "text", "mask"))
    expected = one_evaluation(tensors, np.asarray(noise), *inputs)
    assert error(sample(trees.params, condition, noise), jnp.asarray(expected, jnp.float32)) < 1e-5


# --- unsupported folders --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "karlo", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path / "karlo"


def change(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


UNSUPPORTED = {
    # file: [(changed fields, path of the field that the error names)]
    "decoder/config.json": [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"encoder_hid_dim": 1280}, "encoder_hid_dim"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["ResnetUpsampleBlock2D"] * 4}, "up_block_types"),
        ({"layers_per_block": [1, 2, 3, 4]}, "layers_per_block"),
        ({"sample_size": [16, 24]}, "sample_size"),
        ({"block_out_channels": None}, "block_out_channels"),
        ({"attention_head_dim": [8, 4, 8, 8]}, "attention_head_dim"),
        ({"in_channels": "3"}, "in_channels"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
    ],
    "super_res_first/config.json": [({"add_attention": True}, "add_attention")],
    "prior/config.json": [
        ({"norm_in_type": "layer"}, "norm_in_type"),
        ({"additional_embeddings": 5}, "additional_embeddings"),
        ({"time_embed_dim": 13}, "time_embed_dim"),
        ({"num_layers": "three"}, "num_layers"),
        ({"num_layers": 2}, "num_layers"),  # the weights have 3
    ],
    "prior_scheduler/scheduler_config.json": [
        ({"_class_name": "DDIMScheduler"}, "_class_name"),
        ({"_class_name": None}, "_class_name"),
        ({"prediction_type": "v_prediction"}, "prediction_type"),
        ({"beta_schedule": "linear"}, "beta_schedule"),
        ({"variance_type": "learned_range"}, "variance_type"),
        ({"clip_sample_range": -1}, "clip_sample_range"),
    ],
}


@pytest.mark.parametrize(
    ("file", "fields", "field"), [(file, *case) for file, cases in UNSUPPORTED.items() for case in cases]
)
def test_errors_of_config_files_name_the_field(folder, file, fields, field):
    change(folder / file, **fields)
    with pytest.raises(FieldError, check=mentions(folder / file, path=folder / file, field=field)):
        karlo_folders.detect(Source.open(folder))


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("decoder/config.json", {"cross_attention_dim": 44}, ("text_proj/config.json", "cross_attention_dim")),
        (
            "super_res_first/config.json",
            {"block_out_channels": [4, 8, 12, 20]},
            ("super_res_last/config.json", "block_out_channels"),
        ),
    ],
)
def test_errors_of_two_config_files_that_differ_name_the_second(folder, file, fields, named):
    change(folder / file, **fields)
    with pytest.raises(FieldError, check=mentions(path=folder / named[0], field=named[1])):
        karlo_folders.detect(Source.open(folder))


@pytest.mark.parametrize("name", ["text_encoder", "prior", "text_proj", "super_res_last"])
def test_a_missing_component_is_named(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(WeightsError, check=mentions(name, path=folder)):
        karlo_folders.detect(Source.open(folder))
