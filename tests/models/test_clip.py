"""CLIP's towers, by theory: sizes, pooling, causality, batch statistics, published counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig

TEXT = TextConfig(vocab_size=20, context_length=6, width=16, layers=2, heads=2)
VIT = ClipConfig(8, TEXT, VisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2))
RESNET = replace(VIT, vision=ResNetConfig((1, 1, 1, 1), width=4, heads=4, image_size=32))
TOKENS = jnp.array([[1, 5, 6, 19, 0, 0], [1, 19, 0, 0, 0, 0]], jnp.int32)
MASK = TOKENS > 0
LENGTHS = (4, 2)


def images_of(config):
    side = config.vision.image_size
    return jnp.tanh(normal(1, 2, side, side, 3))


@pytest.fixture(scope="module", params=["vit", "resnet"])
def clip(request):
    config = {"vit": VIT, "resnet": RESNET}[request.param]
    return config, random_variables(Clip(config), images_of(config), TOKENS, MASK)


def test_shapes_and_temperature(clip):
    config, variables = clip
    image_emb, text_emb, scale = jitted(Clip(config))(variables, images_of(config), TOKENS, MASK)
    assert image_emb.shape == text_emb.shape == (2, 8)
    np.testing.assert_allclose(scale, np.exp(variables["params"]["logit_scale"]), rtol=1e-5)
    norms = jnp.linalg.norm(text_emb, axis=-1)
    assert jnp.abs(norms - 1).max() > 0.1  # raw
    assert ("batch_stats" in variables) == isinstance(config.vision, ResNetConfig)


def test_initial_temperature():
    params = jax.jit(Clip(VIT).init)(jax.random.key(0), images_of(VIT), TOKENS)["params"]
    np.testing.assert_allclose(jnp.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-5)


def test_normalises_images_itself(clip):
    config, variables = clip
    plain = replace(config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    image = images_of(config)
    by_hand = (image / 2 + 0.5 - jnp.array(config.image_mean).reshape(1, 1, 1, 3)) / jnp.array(
        config.image_std
    ).reshape(1, 1, 1, 3)
    out = jitted(Clip(config), "encode_image")(variables, image)
    close(jitted(Clip(plain), "encode_image")(variables, by_hand), out)


def encode_text(tokens, mask=None):
    variables = random_variables(Clip(VIT), images_of(VIT), TOKENS)
    return jitted(Clip(VIT), "encode_text")(variables, tokens, mask)


def test_text_is_read_at_the_end_token():
    masked, states = encode_text(TOKENS, MASK)
    assert states.shape == (2, 6, 16)
    close(masked, encode_text(TOKENS)[0])  # 19 is the largest id
    padded = jnp.where(MASK, TOKENS, 7)
    same(masked, encode_text(padded, MASK)[0])
    small_end = jnp.where(TOKENS == 19, 2, TOKENS)
    differ(encode_text(small_end, MASK)[0], encode_text(small_end)[0])


def test_text_is_causal():
    states = encode_text(TOKENS)[1]
    changed = encode_text(TOKENS.at[:, 3:].set(9))[1]
    same(states[:, :3], changed[:, :3])
    differ(states[:, 3:], changed[:, 3:])


def test_batch_statistics_move_in_training_alone():
    model = Clip(RESNET)
    variables = random_variables(model, images_of(RESNET), TOKENS)
    train = jitted(model, "encode_image", train=True, mutable=("batch_stats",))
    _, updated = train(variables, images_of(RESNET))
    jax.tree.map(lambda a, b: differ(b, a), variables["batch_stats"], updated["batch_stats"])
    encode = jitted(model, "encode_image")
    close(encode(variables, images_of(RESNET).at[1].set(0.0))[0], encode(variables, images_of(RESNET))[0])


def test_bfloat16_returns_float32(clip):
    config, variables = clip
    args = variables, images_of(config), TOKENS, MASK
    half, exact = jitted(Clip(replace(config, dtype="bfloat16")))(*args), jitted(Clip(config))(*args)
    for ours, theirs in zip(half[:2], exact[:2], strict=True):
        assert ours.dtype == jnp.float32
        close(ours, theirs, 0.1)


def test_bad_input():
    variables = random_variables(Clip(VIT), images_of(VIT), TOKENS)
    with pytest.raises(UserError, check=mentions("16x16", "8x16")):
        Clip(VIT).apply(variables, jnp.zeros((1, 8, 16, 3)), method=Clip.encode_image)
    with pytest.raises(UserError, check=mentions("4 tokens", "context_length", 6)):
        Clip(VIT).apply(variables, TOKENS[:, :4], method=Clip.encode_text)
    with pytest.raises(UserError, check=mentions("image_size 30", "patch_size 16")):
        VisionConfig(30, 16)
    with pytest.raises(UserError, check=mentions("image_size 100", "stride 32")):
        ResNetConfig(image_size=100)
    with pytest.raises(UserError, check=mentions("2048", "7 heads")):
        ResNetConfig(heads=7)
