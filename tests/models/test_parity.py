"""Forward passes equal the public implementations', on tiny random checkpoints in their own layouts.

Arrays recorded from openai/CLIP and diffusers (Karlo's classes) in float32 on CPU. The renames
here are the shortest that will do; every source key must be consumed and every leaf filled.
"""

import json
import struct
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.decoder import Condition, DecoderConfig, DecoderNetwork
from dalle2_jax.models.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.unet import UNet, UNetConfig

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"


def read_safetensors(name):
    raw = (FIXTURES / f"{name}.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(raw[8 + size :][slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for key, entry in header.items()
    }


class Source:
    """A torch state dict that is taken apart key by key."""

    def __init__(self, tensors):
        self.left = dict(tensors)

    def take(self, key):
        return self.left.pop(key)

    def norm(self, key):
        return {"scale": self.take(f"{key}.weight"), "bias": self.take(f"{key}.bias")}

    def dense(self, key):
        return {"kernel": self.take(f"{key}.weight").T, "bias": self.take(f"{key}.bias")}

    def conv(self, key):
        return {"kernel": self.take(f"{key}.weight").transpose(2, 3, 1, 0), "bias": self.take(f"{key}.bias")}

    def heads_in(self, keys, heads):
        """[(N K), D] each -> kernel [D, len(keys), N, K]."""
        kernels = [self.take(f"{key}.weight") for key in keys]
        biases = [self.take(f"{key}.bias") for key in keys]
        kernel = np.stack([k.reshape(heads, -1, k.shape[-1]) for k in kernels]).transpose(3, 0, 1, 2)
        return {"kernel": kernel, "bias": np.stack([b.reshape(heads, -1) for b in biases])}

    def heads_out(self, key, heads):
        kernel = self.take(f"{key}.weight").T
        return {"kernel": kernel.reshape(heads, -1, kernel.shape[-1]), "bias": self.take(f"{key}.bias")}


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def openai_blocks(source, prefix, layers, heads):
    def block(p):
        weight, bias = source.take(f"{p}.attn.in_proj_weight"), source.take(f"{p}.attn.in_proj_bias")
        kernel = weight.reshape(3, heads, -1, weight.shape[-1]).transpose(3, 0, 1, 2)
        return {
            "ln_1": source.norm(f"{p}.ln_1"),
            "attn": {
                "qkv": {"kernel": kernel, "bias": bias.reshape(3, heads, -1)},
                "out": source.heads_out(f"{p}.attn.out_proj", heads),
            },
            "ln_2": source.norm(f"{p}.ln_2"),
            "fc": source.dense(f"{p}.mlp.c_fc"),
            "proj": source.dense(f"{p}.mlp.c_proj"),
        }

    return {"blocks": stack([block(f"{prefix}.resblocks.{i}") for i in range(layers)])}


def openai_vit(source, config):
    width = config.vision.width
    patches = source.take("visual.conv1.weight").transpose(2, 3, 1, 0).reshape(-1, width)
    return {
        "logit_scale": source.take("logit_scale"),
        "visual": {
            "patch_embed": {"kernel": patches},
            "class_embedding": source.take("visual.class_embedding"),
            "positional_embedding": source.take("visual.positional_embedding"),
            "ln_pre": source.norm("visual.ln_pre"),
            "transformer": openai_blocks(source, "visual.transformer", config.vision.layers, config.vision.heads),
            "ln_post": source.norm("visual.ln_post"),
            "proj": {"kernel": source.take("visual.proj")},
        },
        "text": openai_text(source, config.text),
    }


def openai_text(source, config):
    return {
        "token_embedding": {"embedding": source.take("token_embedding.weight")},
        "positional_embedding": source.take("positional_embedding"),
        "transformer": openai_blocks(source, "transformer", config.layers, config.heads),
        "ln_final": source.norm("ln_final"),
        "proj": {"kernel": source.take("text_projection")},
    }


def karlo_prior(source, config):
    def block(p):
        attention = [f"{p}.attn1.to_{name}" for name in "qkv"]
        return {
            "ln_1": source.norm(f"{p}.norm1"),
            "attn": {
                "qkv": source.heads_in(attention, config.heads),
                "out": source.heads_out(f"{p}.attn1.to_out.0", config.heads),
            },
            "ln_2": source.norm(f"{p}.norm3"),
            "fc": source.dense(f"{p}.ff.net.0.proj"),
            "proj": source.dense(f"{p}.ff.net.2"),
        }

    source.take("clip_mean"), source.take("clip_std")  # the stage's embedding contract
    return {
        "time_mlp": {f"fc_{i}": source.dense(f"time_embedding.linear_{i}") for i in (1, 2)},
        "image_emb_proj": source.dense("proj_in"),
        "text_emb_proj": source.dense("embedding_proj"),
        "text_seq_proj": source.dense("encoder_hidden_states_proj"),
        "positional_embedding": source.take("positional_embedding")[0],
        "query": source.take("prd_embedding")[0, 0],
        "transformer": {"blocks": stack([block(f"transformer_blocks.{i}") for i in range(config.layers)])},
        "ln_final": source.norm("norm_out"),
        "out_proj": source.dense("proj_to_clip_embeddings"),
    }


def diffusers_unet(source, config):
    def res(p):
        out = {
            "norm_1": source.norm(f"{p}.norm1"),
            "conv_1": source.conv(f"{p}.conv1"),
            "emb_proj": source.dense(f"{p}.time_emb_proj"),
            "norm_2": source.norm(f"{p}.norm2"),
            "conv_2": source.conv(f"{p}.conv2"),
        }
        if f"{p}.conv_shortcut.weight" in source.left:
            out["skip"] = source.conv(f"{p}.conv_shortcut")
        return out

    def attention(p):
        heads = source.left[f"{p}.to_q.weight"].shape[0] // config.head_channels
        return {
            "norm": source.norm(f"{p}.group_norm"),
            "attn": {
                "qkv": source.heads_in([f"{p}.to_{name}" for name in "qkv"], heads),
                "context_kv": source.heads_in([f"{p}.add_{name}_proj" for name in "kv"], heads),
                "out": source.heads_out(f"{p}.to_out.0", heads),
            },
        }

    params = {
        "conv_in": source.conv("conv_in"),
        "time_mlp": {f"fc_{i}": source.dense(f"time_embedding.linear_{i}") for i in (1, 2)},
        "mid_0": res("mid_block.resnets.0"),
        "mid_1": res("mid_block.resnets.1"),
        "norm_out": source.norm("conv_norm_out"),
        "conv_out": source.conv("conv_out"),
    }
    if config.middle_attention:
        params["mid_attn"] = attention("mid_block.attentions.0")
    last = len(config.channel_mult) - 1
    for level in range(last + 1):
        for way, theirs, count in (("down", level, 0), ("up", last - level, 1)):
            block = f"{way}_blocks.{theirs}"
            for i in range(config.num_res_blocks + count):
                params[f"{way}_{level}_{i}"] = res(f"{block}.resnets.{i}")
                if config.attends(level):
                    params[f"{way}_{level}_{i}_attn"] = attention(f"{block}.attentions.{i}")
        if level < last:
            params[f"down_{level}_sample"] = res(f"down_blocks.{level}.downsamplers.0")
        if level:
            params[f"up_{level}_sample"] = res(f"up_blocks.{last - level}.upsamplers.0")
    return params


def karlo_text_proj(source, config):
    dense = source.dense
    tokens = dense("clip_extra_context_tokens_proj")
    count, width = config.image_tokens, config.unet.context_dim
    return {
        "null_image_emb": source.take("learned_classifier_free_guidance_embeddings"),
        "text_emb_proj": dense("embedding_proj"),
        "image_emb_proj": dense("clip_image_embeddings_project_to_time_embeddings"),
        "image_token_proj": {  # theirs is [channel, token], ours [token, channel]
            "kernel": tokens["kernel"].reshape(-1, width, count).transpose(0, 2, 1),
            "bias": tokens["bias"].reshape(width, count).T,
        },
        "text_seq_proj": dense("encoder_hidden_states_proj"),
        "text_seq_norm": source.norm("text_encoder_hidden_states_norm"),
    }


def checked(module, source, params, *args, **kwargs):
    """The bijection: nothing left over, nothing missing, every shape equal."""
    assert not source.left
    params = jax.tree.map(jnp.asarray, params)
    expected = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    return {"params": params}


def close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5 * scale)


def load(name):
    return {key: jnp.asarray(value) for key, value in np.load(FIXTURES / f"{name}.npz").items()}


def nhwc(x):
    return jnp.transpose(x, (0, 2, 3, 1))


def test_openai_clip_vit():
    config = ClipConfig(
        32, TextConfig(100, 16, 64, 2, 1), VisionConfig(32, 8, 128, 2, 2), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )
    recorded = load("clip_vit")
    # with mean and deviation 0.5 the model's normalisation is the identity: fed as recorded
    image, tokens = nhwc(recorded["image"]), recorded["tokens"].astype(jnp.int32)
    source, model = Source(read_safetensors("clip_vit")), Clip(config)
    params = checked(model, source, openai_vit(source, config), image, tokens)
    image_emb, text_emb, scale = jax.jit(model.apply)(params, image, tokens)
    close(image_emb, recorded["image_features"])
    close(text_emb, recorded["text_features"])
    states = jax.jit(partial(model.apply, method=Clip.encode_text))(params, tokens)[1]
    close(states, recorded["text_ln_final_all_positions"])
    unit = [e / jnp.linalg.norm(e, axis=-1, keepdims=True) for e in (image_emb, text_emb)]
    np.testing.assert_allclose(scale * unit[0] @ unit[1].T, recorded["logits_per_image"], atol=1e-4)


@pytest.fixture(scope="module")
def karlo():
    return load("karlo")


def both(karlo, name):
    return jnp.concatenate([karlo[f"text/uncond_{name}"], karlo[f"text/{name}"]])


@pytest.mark.parametrize("cached", [False, True])
def test_karlo_prior(karlo, cached):
    config = PriorConfig(64, 3, 4, 48, 77, "clip", text_width=48, learned_null=False)
    x, t = karlo["prior_fwd/x"], karlo["prior_fwd/t"].astype(jnp.int32)
    text = both(karlo, "text_embeds"), both(karlo, "last_hidden_state"), both(karlo, "attention_mask") > 0
    source, model = Source(read_safetensors("karlo_prior")), PriorNetwork(config)
    params = checked(model, source, karlo_prior(source, config), x, t, *text)
    if cached:
        cache = jax.jit(partial(model.apply, method=PriorNetwork.encode_prefix))(params, *text)
        out = jax.jit(partial(model.apply, method=PriorNetwork.denoise))(params, cache, x, t)
    else:
        out = jax.jit(model.apply)(params, x, t, *text)
    close(out, karlo["prior_fwd/out"])


def test_karlo_decoder(karlo):
    unet = UNetConfig(16, 3, 6, 8, (1, 2, 3, 4), 3, (8, 4, 2), 8, context_dim=40, norm_groups=4)
    config = DecoderConfig(unet, 48, 4, "clip", text_width=48, text_emb_proj=True)
    x, t = nhwc(karlo["decoder_fwd/x"]), karlo["decoder_fwd/t"].astype(jnp.int32)
    image_emb = jnp.tile(karlo["prior/image_embeds"], (2, 1))
    text = both(karlo, "text_embeds"), both(karlo, "last_hidden_state"), both(karlo, "attention_mask") > 0
    source, projections = Source(read_safetensors("karlo_decoder")), Source(read_safetensors("karlo_text_proj"))
    params = {"unet": diffusers_unet(source, unet)} | karlo_text_proj(projections, config)
    source.left |= projections.left
    model = DecoderNetwork(config)
    params = checked(model, source, params, x, t, image_emb, *text)
    null = jnp.array([True, True, False, False])
    encode = jax.jit(partial(model.apply, method=DecoderNetwork.encode_condition))
    condition = encode(params, image_emb, *text, null)
    close(condition.context, karlo["text_proj/ctx"])
    close(condition.emb, karlo["text_proj/class_labels"])
    np.testing.assert_array_equal(condition.mask, karlo["decoder_fwd/mask"].astype(bool))
    condition = Condition(karlo["text_proj/class_labels"], karlo["text_proj/ctx"], condition.mask)
    denoise = jax.jit(partial(model.apply, method=DecoderNetwork.denoise))
    close(denoise(params, x, t, condition), nhwc(karlo["decoder_fwd/out"]))


def test_karlo_super_resolution(karlo):
    config = UNetConfig(
        64, 6, 3, 4, (1, 2, 3, 4), 3, (), scale_shift=False, middle_attention=False, norm_groups=2
    )
    x, t = nhwc(karlo["sr_fwd/x"]), karlo["sr_fwd/t"].astype(jnp.int32)
    source, model = Source(read_safetensors("karlo_super_res_first")), UNet(config)
    params = checked(model, source, diffusers_unet(source, config), x, t)
    close(jax.jit(model.apply)(params, x, t), nhwc(karlo["sr_fwd/out"]))
