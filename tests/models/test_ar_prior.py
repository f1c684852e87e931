"""The autoregressive prior's network, by theory."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.priors.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.models.transformer import TextConfig

TEXT = TextConfig(vocab_size=11, context_length=5, width=12, layers=1, heads=2, activation="gelu")
CONFIG = ArPriorConfig(TEXT, width=16, layers=2, heads=2, context_length=9, embed_dim=6, components=4, buckets=7)
NO = jnp.array([False, False])


@pytest.fixture(scope="module")
def prior():
    args = (
        jnp.array([[3, 0, 6, 1], [2, 2, 5, 4]], jnp.int32),
        jnp.array([6, 2], jnp.int32),
        normal(2, 2, 6),
        jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32),
        jnp.array([[True, True, True, False, False], [True, True, True, True, True]]),
        NO,
    )
    return random_variables(ArPriorNetwork(CONFIG), *args), args


def test_every_input_matters(prior):
    params, args = prior
    predict = jitted(ArPriorNetwork(CONFIG))
    logits = predict(params, *args)
    assert logits.shape == (2, 4, 7) and logits.dtype == jnp.float32
    for i, arg in enumerate(args[:4]):
        changed = jnp.maximum(arg - 1, 0) if arg.dtype == jnp.int32 else arg + 1
        differ(predict(params, *args[:i], changed, *args[i + 1 :]), logits)
    for row in range(2):  # and of its own row alone
        swapped = [jnp.where(jnp.arange(2).reshape(2, *[1] * (arg.ndim - 1)) == row, arg, arg[::-1]) for arg in args]
        close(predict(params, *swapped)[row], logits[row])


def test_causal(prior):
    params, (codes, *rest) = prior
    predict = jitted(ArPriorNetwork(CONFIG))
    logits = predict(params, codes, *rest)
    for k in range(4):
        other = predict(params, codes.at[:, k].set((codes[:, k] + 3) % 7), *rest)
        same(other[:, : k + 1], logits[:, : k + 1])  # a code does not see itself either
        if k < 3:
            differ(other[:, k + 1], logits[:, k + 1])


def test_padding_has_no_effect(prior):
    params, (codes, dot, text_emb, text, mask, drop) = prior
    predict, noisy = jitted(ArPriorNetwork(CONFIG)), text.at[0, 3:].set(7)
    logits = predict(params, codes, dot, text_emb, text, mask, drop)
    same(logits, predict(params, codes, dot, text_emb, noisy, mask, drop))
    differ(predict(params, codes, dot, text_emb, noisy, jnp.ones_like(mask), drop)[0], logits[0])


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_cached_equals_full(prior, dtype, tolerance):
    params, (codes, *rest) = prior
    model, (dot, text_emb, text, mask, _) = ArPriorNetwork(replace(CONFIG, dtype=dtype)), rest
    drop = jnp.array([True, False])
    full = jitted(model)(params, codes, dot, text_emb, text, mask, drop)
    logits, past = jitted(model, "encode_prefix")(params, dot, text_emb, text, mask, drop)
    assert past.keys.shape == (2, 2, 5 + 2 + 3, 2, 8)
    cached = [logits]
    for index in range(3):
        logits, past = jitted(model, "step")(params, past, codes[:, index], jnp.int32(index))
        cached.append(logits)
    close(jnp.stack(cached, axis=1), full, tolerance)


def test_dropped_text_is_forgotten(prior):
    params, (codes, dot, text_emb, text, mask, _) = prior
    predict, drop = jitted(ArPriorNetwork(CONFIG)), jnp.array([True, False])
    logits = predict(params, codes, dot, text_emb, text, mask, drop)
    inputs = (dot + 1) % 7, text_emb + 1, jnp.flip(text, axis=1), jnp.flip(mask, axis=1)
    other = predict(params, codes, *inputs, drop)
    same(other[0], logits[0])
    differ(other[1], logits[1])
    kept = predict(params, codes, dot, text_emb, text, mask, NO)
    same(kept[1], logits[1])
    differ(kept[0], logits[0])
    close(kept, jitted(ArPriorNetwork(CONFIG))(params, codes, dot, text_emb, text, mask))
    # what is left still depends on the codes
    differ(predict(params, (codes + 1) % 7, dot, text_emb, text, mask, drop)[0], logits[0])


def test_remat_and_one_component(prior):
    params, args = prior
    logits = jitted(ArPriorNetwork(CONFIG))(params, *args)
    close(jitted(ArPriorNetwork(replace(CONFIG, remat=True)))(params, *args), logits)
    single = ArPriorNetwork(replace(CONFIG, components=1))
    codes, *inputs = args
    first, past = jitted(single, "encode_prefix")(params, *inputs)
    assert past.keys.shape[2] == 5 + 2
    close(first, logits[:, 0])
    close(jitted(single)(params, codes[:, :1], *inputs)[:, 0], logits[:, 0])


def test_parameters_at_the_papers_size():
    text = TextConfig(49_408, 256, 2048, 24, 32, "gelu")
    config = ArPriorConfig(text, 1664, 24, 26, 384, embed_dim=1024, components=319, buckets=1024)
    assert config.positions == 320
    codes, dot, mask = jnp.zeros((1, 319), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones((1, 256), bool)
    tokens = jnp.zeros((1, 256), jnp.int32)
    network = ArPriorNetwork(config)
    args = codes, dot, jnp.zeros((1, 1024)), tokens, mask, NO[:1]
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), *args))["params"]
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    encoder, decoder = (24 * (12 * d * d + 13 * d) for d in (2048, 1664))  # of a pre-norm transformer
    assert (round(encoder / 1e9, 3), round(decoder / 1e9, 3)) == (1.209, 0.798)
    # tokens, positions and padding, final norm
    assert count["caption_encoder"] == encoder + (49_408 + 2 * 256 + 2) * 2048
    assert count["latent_decoder"] == decoder
    assert count["context_kv"] == (2048 + 1) * 24 * 2 * 1664
    assert sum(count.values()) == 2_278_217_856


def test_bad_config():
    with pytest.raises(UserError, check=mentions("components 7", "embed_dim 6")):
        replace(CONFIG, components=7)
    with pytest.raises(UserError, check=mentions("4 components", "5 positions", "context_length", 4)):
        replace(CONFIG, context_length=4)
    with pytest.raises(UserError, check=mentions("buckets 1", 2)):
        replace(CONFIG, buckets=1)
    with pytest.raises(UserError, check=mentions("width 16", "3 heads")):
        replace(CONFIG, heads=3)
