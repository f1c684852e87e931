"""Parameter counts equal the published checkpoints' (shapes alone: nothing is allocated)."""

import math

import jax
import jax.numpy as jnp
import pytest

from dalle2_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.unet import UNet, UNetConfig

LADDER_64, LADDER_256 = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)
SIDES = (32, 16, 8)


def count(module, *args, **kwargs):
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def example_inputs(unet):
    return jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels)), jnp.zeros((1,), jnp.int32)


CLIPS = {
    # openai/CLIP ViT-L/14: text 123,650,304 + vision 303,966,208 + the temperature
    "vit_l14": (ClipConfig(768, TextConfig(49408, 77, 768, 12, 12), VisionConfig(224, 14, 1024, 24, 16)), 427_616_513),
    "rn50": (ClipConfig(1024, TextConfig(49408, 77, 512, 12, 8), ResNetConfig()), 102_007_137),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name):
    config, published = CLIPS[name]
    side = config.vision.image_size
    assert count(Clip(config), jnp.zeros((1, side, side, 3)), jnp.zeros((1, 77), jnp.int32)) == published


def test_karlo_prior():
    config = PriorConfig(2048, 20, 32, 768, 77, "clip", text_width=768, learned_null=False)
    emb, t = jnp.zeros((1, 768)), jnp.zeros((1,), jnp.int32)
    text = emb, jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool)
    assert count(PriorNetwork(config), emb, t, *text) == 1_022_028_544


UNETS = {
    "karlo_super_resolution": (
        UNetConfig(256, 6, 3, 320, LADDER_64, 3, (), scale_shift=False, middle_attention=False),
        691_579_523,
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    config, published = UNETS[name]
    assert count(UNet(config), *example_inputs(config)) == published


ADMS = {
    "64": (UNetConfig(64, 3, 6, 192, LADDER_64, 3, SIDES), 295_904_454),
    "256": (UNetConfig(256, 3, 6, 256, LADDER_256, 2, SIDES), 553_838_086),
    "upsampler": (UNetConfig(256, 6, 6, 192, LADDER_256, 2, SIDES, num_heads=4), 311_795_910),
}


@pytest.mark.parametrize("name", ADMS)
def test_adm(name):
    unet, published = ADMS[name]
    config = DecoderConfig(unet, None, text_input="label", num_classes=1000)
    assert count(DecoderNetwork(config), *example_inputs(unet), None, None, jnp.zeros((1, 1), jnp.int32)) == published


GLIDE_TEXT = TextConfig(50257, 128, 512, 16, 8, "gelu")
GLIDES = {
    "base": (UNetConfig(64, 3, 6, 192, LADDER_64, 3, SIDES, context_dim=512), 385_030_726),
    "base_inpaint": (UNetConfig(64, 7, 6, 192, LADDER_64, 3, SIDES, context_dim=512), 385_037_638),
    "upsample": (UNetConfig(256, 6, 6, 192, LADDER_256, 2, SIDES, context_dim=512), 398_361_286),
    "upsample_inpaint": (UNetConfig(256, 10, 6, 192, LADDER_256, 2, SIDES, context_dim=512), 398_368_198),
}


@pytest.mark.parametrize("name", GLIDES)
def test_glide(name):
    unet, published = GLIDES[name]
    config = DecoderConfig(unet, None, text_input="tokens", text=GLIDE_TEXT)
    tokens = jnp.zeros((1, 128), jnp.int32)
    assert count(DecoderNetwork(config), *example_inputs(unet), None, None, tokens) == published


def test_karlo_decoder():
    unet = UNetConfig(64, 3, 6, 320, LADDER_64, 3, SIDES, context_dim=1536)
    config = DecoderConfig(unet, 768, 4, "clip", text_width=768, text_emb_proj=True)
    emb, states = jnp.zeros((1, 768)), jnp.zeros((1, 77, 768))
    assert count(DecoderNetwork(config), *example_inputs(unet), emb, emb, states) == 893_318_086
