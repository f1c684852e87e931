"""Karlo's own files, Kandinsky's and ECLIPSE's priors, and folders that are damaged or of another architecture."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guided_files import source
from karlo_recordings import FOLDER, VARIATIONS, error, imported, karlo, recorded, stage_of

from dalle2_jax import testing
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import Variables
from dalle2_jax.types import UserError
from dalle2_jax.weights import guided, karlo_files, merged, priors
from dalle2_jax.weights import karlo as karlo_folders
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.landing import Trees, read
from dalle2_jax.weights.rules import empty
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


def drawn(module, *inputs):
    """Random parameters of a network."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: noise.standard_normal(leaf.shape).astype(np.float32), shapes)


def prior_params():
    emb, text = jnp.zeros((1, 10)), jnp.zeros((1, 7, 10))
    return drawn(PriorNetwork(PRIOR), emb, jnp.zeros(1, jnp.int32), emb, text, jnp.ones((1, 7), bool))


RENAMED = {
    # their names in diffusers' folder -> in Karlo's file, as the published conversion has it
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


def as_karlo_has_it(folder):
    """A prior's tensors from diffusers' names to Karlo's: q, k and v in turns, 64 rows of each."""
    theirs = {}
    for key, value in folder.items():
        for one, other in RENAMED.items():
            key = key.replace(one, other)
        theirs[key] = value
    for key in [key for key in theirs if "to_q" in key]:
        parts = [theirs.pop(key.replace("to_q", f"to_{name}")) for name in "qkv"]
        rows = [np.split(part, len(part) // 64) for part in parts]
        packed = np.concatenate([piece for turn in zip(*rows, strict=True) for piece in turn])
        theirs[key.replace("attn1.to_q", "attn.c_qkv")] = packed
    return {f"model.{key}": value for key, value in theirs.items()}


def test_karlo_s_own_prior_with_its_statistics():
    params = prior_params()
    tensors = as_karlo_has_it(dict(empty(priors.prior_rules(PRIOR), params)))
    (weights,) = karlo_files.recognise(source(tensors))
    stats = np.random.default_rng(2).standard_normal((2, 10)).astype(np.float32)
    (white,) = karlo_files.recognise(source({"0": stats[0], "1": stats[1]}, "ViT-L-14_stats.th"))
    whole = merged([weights, white])["prior"]
    stage = dataclasses.replace(testing.tiny_stage("prior"), model=PRIOR, whiten=True)
    trees = read(whole, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, trees.params, params)
    np.testing.assert_array_equal([trees.stats["mean"], trees.stats["std"]], stats)
    assert whole.config["model"]["heads"] == 2 and whole.config["text"]["context_length"] == 7
    assert whole.config["conditioning"] == {"drop_text": 0.2, "whiten": True}
    assert whole.config["sampling"] == {"name": "ddpm", "clip": 10.0, "steps": 25, "guidance": 4.0}
    with pytest.raises(UserError, match=r"file.pt says nothing of .* \(ViT-L-14_stats.th completes it\)"):
        read(weights, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))


def test_karlo_s_own_decoder():
    x, emb = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 10))
    params = drawn(DecoderNetwork(DECODER), x, jnp.zeros(1, jnp.int32), emb, emb, jnp.zeros((1, 7, 10)))
    unet = dict(empty(guided.unet_rules(UNET), params["unet"]))
    told = {
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
    (component,) = karlo_files.recognise(source({f"model.{key}": value for key, value in {**unet, **told}.items()}))
    trees = read(component, Trees(params, {}))
    jax.tree.map(np.testing.assert_array_equal, trees.params, params)
    model = component.config["model"]
    assert UNetConfig(**model["unet"]) == UNET and model["image_tokens"] == 3
    assert component.config["diffusion"]["variance"] == "learned_range"
    assert component.config["conditioning"] == {"drop_text": 0.3, "drop_image": 0.1, "empty_caption": True}


@pytest.mark.parametrize("both", [True, False])
def test_karlo_s_own_upsampler(both):
    x, t = jnp.zeros((1, 64, 64, 6)), jnp.zeros(1, jnp.int32)
    first = drawn(UNet(UPSAMPLER), x, t)
    last = jax.tree.map(np.negative, first)
    names = {"model_first_steps.": first} | ({"model_last_step.": last} if both else {})
    tables = ((guided.unet_rules(UPSAMPLER, name), tree) for name, tree in names.items())
    tensors = {key: value for rules, tree in tables for key, value in empty(rules, tree)}
    (component,) = karlo_files.recognise(source(tensors))
    stage = stage_of(component)
    assert stage.model == UPSAMPLER and stage.low_size == 16 and stage.last_network == both
    trees = read(component, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, trees.params, first)
    jax.tree.map(np.testing.assert_array_equal, trees.stats, {"last": last} if both else {})


def test_other_files_are_none_of_karlo_s():
    for tensors in ({"0": (3,)}, {"0": (3,), "1": (4,)}, {"input_blocks.0.0.weight": (4, 3, 3, 3)}, {}):
        assert karlo_files.recognise(source(tensors)) == []
    for key in ("model.prd_emb", "model.cf_param", "model_first_steps.input_blocks.0.0.weight"):
        with pytest.raises(UserError) as caught:  # cut short
            karlo_files.recognise(source({key: (1,)}))
        assert "\n" not in str(caught.value)


# --- Kandinsky, ECLIPSE ---------------------------------------------------------------------


@pytest.fixture
def kandinsky(tmp_path):
    """Karlo-tiny's prior and CLIP as a folder of Kandinsky's."""
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


def test_kandinsky_s_prior_brings_its_clip(kandinsky):
    system = imported(priors.recognise(Source.open(kandinsky)))
    assert system.keys() == {"clip", "prior"} and system["clip"].stage.model.vision is not None
    ours, theirs = system["prior"], karlo()["prior"]
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert ours.stage.sampling == dataclasses.replace(theirs.stage.sampling, clip=10.0) and ours.stage.whiten
    assert ours.component.family == "Kandinsky 2.2 prior"


def test_a_prior_alone_is_a_part_of_a_system():
    """Its scheduler is the one beside it."""
    (component,) = priors.recognise(Source.open(FOLDER / "prior"))
    assert component.stage == "prior" and component.config["sampling"]["clip"] == 5.0
    assert stage_of(component, karlo()["clip"].stage).whiten


@pytest.fixture
def eclipse(tmp_path):
    """Karlo-tiny's prior without time, as ECLIPSE writes it; its tensors."""
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
    """What the public code does (float64): [text, text embedding, noise, query], causal, padding hidden."""
    t = {key: value.astype(np.float64) for key, value in tensors.items()}

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def apart(x):
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    tail = [dense(text_emb, "embedding_proj"), dense(noise, "proj_in"), np.tile(t["prd_embedding"][0], (len(noise), 1))]
    x = np.concatenate([dense(text_seq, "encoder_hidden_states_proj"), np.stack(tail, axis=1)], axis=1)
    x = x + t["positional_embedding"]
    hidden = np.pad(~mask, ((0, 0), (0, 3))) * -10000.0
    hidden = hidden[:, None] + np.triu(np.full((x.shape[1],) * 2, -10000.0), 1)
    for i in range(3):
        block = f"transformer_blocks.{i}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (apart(dense(h, f"{block}.attn1.to_{name}")) for name in "qkv")
        logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + hidden[:, None]
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        h = (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + dense(h, f"{block}.attn1.to_out.0")
        h = np.asarray(jax.nn.gelu(dense(norm(x, f"{block}.norm3"), f"{block}.ff.net.0.proj"), approximate=False))
        x = x + dense(h.astype(np.float64), f"{block}.ff.net.2")
    return dense(norm(x, "norm_out")[:, -1], "proj_to_clip_embeddings")


def test_eclipse_s_prior_draws_in_one_evaluation(eclipse):
    folder, tensors = eclipse
    (component,) = priors.recognise(Source.open(folder))
    assert component.family == "ECLIPSE prior" and component.stats == ()
    clip, theirs = karlo()["clip"], recorded(FOLDER / "parity.npz")
    stage = stage_of(component, clip.stage)
    stage.check_sampling(stage.sampling)
    trees = read(component, Trees(*jax.eval_shape(stage.init, jax.random.key(0))))
    batch = {"tokens": theirs["text/input_ids"], "mask": theirs["text/attention_mask"] > 0}
    condition = stage.condition(stage.read(clip.variables, batch))
    noise = theirs["prior/init_noise"]
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def draw(params, condition, x_T):
        return stage.draw(Variables(params, {}), keys, condition, stage.sampling, {}, x_T=x_T)

    told = (np.asarray(condition[name]) for name in ("text_emb", "text", "mask"))
    expected = one_evaluation(tensors, np.asarray(noise), *told)
    assert error(draw(trees.params, condition, noise), jnp.asarray(expected, jnp.float32)) < 1e-5


# --- what cannot be read --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "karlo", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path / "karlo"


def change(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


UNREADABLE = {
    "decoder/config.json": [
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported: only 'silu' is"),
        ({"encoder_hid_dim": 1280}, "encoder_hid_dim 1280"),
        ({"mid_block_type": "UNetMidBlock2D"}, "unknown mid_block_type in .*'UNetMidBlock2D'"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "unknown down_block_types in .*'DownBlock2D'"),
        ({"up_block_types": ["ResnetUpsampleBlock2D"] * 4}, r"on levels \[1, 2, 3\] on the way down but \[\]"),
        ({"layers_per_block": [1, 2, 3, 4]}, "levels of different depth"),
        ({"sample_size": [16, 24]}, "not square"),
        ({"block_out_channels": None}, "block_out_channels must be whole numbers"),
        ({"attention_head_dim": [8, 4, 8, 8]}, "heads of another width on each level"),
        ({"in_channels": "3"}, "in_channels must be whole numbers above 0, not '3'"),
        ({"norm_num_groups": 7}, "8 channels on level 0 are not divisible by norm_groups 7"),
        ({"cross_attention_dim": 44}, "cross_attention_dim 40 is not the U-Net's, 44"),
    ],
    "super_res_first/config.json": [
        ({"add_attention": True}, "add_attention True"),
        ({"block_out_channels": [4, 8, 12, 20]}, "the two super-resolution networks differ in shape"),
    ],
    "prior/config.json": [
        ({"norm_in_type": "layer"}, "norm_in_type 'layer'"),
        ({"additional_embeddings": 5}, "neither 4 nor ECLIPSE's 3"),
        ({"time_embed_dim": 13}, "time_embed_dim 13 is not the width 64"),
        ({"num_layers": "three"}, "num_layers must be a whole number"),
    ],
    "prior_scheduler/scheduler_config.json": [
        ({"_class_name": "DDIMScheduler"}, "is a DDIMScheduler"),
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction' is not known here"),
        ({"beta_schedule": "linear"}, "beta_schedule 'linear'"),
        ({"variance_type": "learned_range"}, "a prior of variance 'learned_range'"),
        ({"clip_sample_range": -1}, "no number above 0"),
    ],
}


@pytest.mark.parametrize(
    ("file", "fields", "says"), [(file, *case) for file, cases in UNREADABLE.items() for case in cases]
)
def test_what_no_network_here_has_is_one_line(folder, file, fields, says):
    change(folder / file, **fields)
    with pytest.raises(UserError, match=says) as caught:
        karlo_folders.recognise(Source.open(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["text_encoder", "prior", "text_proj", "super_res_last"])
def test_a_component_that_is_missing_is_named(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(UserError, match=f"lacks {name}: get the whole folder"):
        karlo_folders.recognise(Source.open(folder))


def test_tensors_that_do_not_fit_the_config_are_named(folder):
    change(folder / "prior" / "config.json", num_layers=2)
    (prior,) = (part for part in karlo_folders.recognise(Source.open(folder)) if part.stage == "prior")
    with pytest.raises(UserError, match="transformer_blocks.2.attn1.* and .* more with no place here"):
        imported([*karlo_folders.recognise(Source.open(folder))])
    assert prior.config["model"]["layers"] == 2
