"""The decoder's conditioning, by theory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig

UNET = UNetConfig(
    image_size=8,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    context_dim=6,
    norm_groups=4,
)
TEXT = TextConfig(vocab_size=11, context_length=5, width=8, layers=1, heads=2)
IMAGE = DecoderConfig(UNET, image_emb_dim=7, image_tokens=4)
CONFIGS = {
    "paper": replace(IMAGE, text_input="tokens", text=TEXT),
    "glide": DecoderConfig(UNET, None, text_input="tokens", text=replace(TEXT, width=6)),
    "karlo": replace(IMAGE, text_input="clip", text_width=9, text_emb_proj=True),
    "image alone": IMAGE,
    "adm": DecoderConfig(replace(UNET, context_dim=None), None, text_input="label", num_classes=3),
}
T = jnp.array([3, 900], jnp.int32)
MASK = jnp.array([[True, True, True, False, False], [True, True, True, True, True]])
FIRST = jnp.array([True, False])
NO = jnp.array([False, False])
X = normal(0, 2, 8, 8, 3)


def condition_inputs(config):
    """(image_emb, text_emb, text, mask) as this decoder takes them."""
    image_emb = None if config.image_emb_dim is None else normal(1, 2, 7)
    if config.text_input is None:
        return image_emb, None, None, None
    if config.text_input == "clip":
        return image_emb, normal(2, 2, 7), normal(3, 2, 5, 9), MASK
    if config.text_input == "label":
        return image_emb, None, jnp.array([[2], [0]], jnp.int32), jnp.ones((2, 1), bool)
    return image_emb, None, jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32), MASK


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request):
    config = CONFIGS[request.param]
    return config, random_variables(DecoderNetwork(config), X, T, *condition_inputs(config))


def encode(decoder, image_emb, text_emb, text, mask, drop_image=NO, drop_text=NO):
    config, params = decoder
    args = image_emb, text_emb, text, mask, drop_image, drop_text
    return jitted(DecoderNetwork(config), "encode_condition")(params, *args)


def rows_equal(a, b, row):
    return all(np.array_equal(x[row], y[row]) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_condition_shapes(decoder):
    config = decoder[0]
    condition = encode(decoder, *condition_inputs(config))
    tokens = (4 if config.image_emb_dim else 0) + (5 if config.text_input in ("tokens", "clip") else 0)
    assert condition.emb.shape == (2, 32)
    assert condition.context.shape == (2, tokens, 6) if tokens else condition.context is None
    if config.text_input == "clip":
        np.testing.assert_array_equal(condition.mask, np.concatenate([np.ones((2, 4), bool), MASK], axis=1))
    else:
        assert condition.mask is None


def test_two_calls_equal_one(decoder):
    config, params = decoder
    whole = jitted(DecoderNetwork(config))(params, X, T, *condition_inputs(config))
    assert whole.shape == (2, 8, 8, 3) and whole.dtype == jnp.float32
    close(denoised(decoder, *condition_inputs(config)), whole)


@pytest.mark.parametrize("decoder", ["paper", "karlo", "image alone"], indirect=True)
def test_dropped_image_is_forgotten(decoder):
    config = decoder[0]
    image_emb, *text = condition_inputs(config)
    dropped, other = (encode(decoder, emb, *text, FIRST) for emb in (image_emb, image_emb + 1))
    assert rows_equal(dropped, other, 0) and not rows_equal(dropped, other, 1)
    kept = encode(decoder, image_emb, *text)
    assert rows_equal(dropped, kept, 1) and not rows_equal(dropped, kept, 0)


def denoised(decoder, *args):
    config, params = decoder
    return jitted(DecoderNetwork(config), "denoise")(params, X, T, encode(decoder, *args))


@pytest.mark.parametrize("decoder", ["paper", "glide", "karlo", "adm"], indirect=True)
def test_dropped_text_is_forgotten(decoder):
    config = decoder[0]
    image_emb, text_emb, text, mask = condition_inputs(config)
    other_emb = None if text_emb is None else text_emb + 1
    dropped = denoised(decoder, image_emb, text_emb, text, mask, NO, FIRST)
    other_text = 1 - text // 2 if config.text_input == "label" else jnp.flip(text, axis=1)
    other = denoised(decoder, image_emb, other_emb, other_text, ~mask, NO, FIRST)
    same(dropped[0], other[0])
    differ(dropped[1], other[1])
    kept = denoised(decoder, image_emb, text_emb, text, mask)
    same(dropped[1], kept[1])
    differ(dropped[0], kept[0])
    if image_emb is not None:
        differ(dropped[0], denoised(decoder, image_emb + 1, text_emb, text, mask, NO, FIRST)[0])


@pytest.mark.parametrize("decoder", ["paper", "glide", "karlo"], indirect=True)
def test_padding_is_not_read(decoder):
    config = decoder[0]
    image_emb, text_emb, text, mask = condition_inputs(config)
    out = denoised(decoder, image_emb, text_emb, text, mask)
    same(out, denoised(decoder, image_emb, text_emb, text.at[0, 3:].set(9), mask))


@pytest.mark.parametrize("decoder", ["adm"], indirect=True)
def test_a_class_is_its_embedding_and_no_class_their_mean(decoder):
    config, params = decoder
    text = condition_inputs(config)[2]
    table = params["params"]["label_embedding"]["embedding"]
    same(encode(decoder, None, None, text, None).emb, table[text[:, 0]])
    mean = table.mean(axis=0)
    close(encode(decoder, None, None, text, jnp.array([[False], [True]])).emb, jnp.stack([mean, table[0]]))
    close(encode(decoder, None, None, text, None, NO, FIRST).emb, jnp.stack([mean, table[0]]))


def test_bfloat16_returns_float32():
    config = CONFIGS["paper"]
    args = X, T, *condition_inputs(config), FIRST, FIRST
    params = random_variables(DecoderNetwork(config), *args)
    half = DecoderNetwork(replace(config, unet=replace(UNET, dtype="bfloat16")))
    out = jitted(half)(params, *args)
    assert out.dtype == jnp.float32
    close(out, jitted(DecoderNetwork(config))(params, *args), 0.1)


def test_bad_config():
    for change, facts in (
        ({"text_input": "bytes"}, ["text_input", "'bytes'", "'tokens'"]),
        ({"text_input": "tokens"}, ["text encoder", "text_input", "'tokens'"]),
        ({"text_width": 9}, ["text_width", "'clip'"]),
        ({"text_emb_proj": True}, ["text_emb_proj", "'clip'"]),
        ({"num_classes": 3}, ["num_classes", "'label'"]),
        ({"text_input": "label"}, ["num_classes", "'label'"]),
        ({"image_tokens": 0}, ["unet.context_dim"]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            replace(IMAGE, **change)
