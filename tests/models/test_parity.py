"""CLIP's forward pass equals the public implementation's, on a tiny random checkpoint in its own layout.

Arrays recorded from openai/CLIP in float32 on CPU. The renames here are the shortest that will do; every source key
must be consumed and every leaf filled. (tests/weights has the other networks.)
"""

import json
import struct
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig

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
