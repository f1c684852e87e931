"""The prior's network, by theory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork

TOKENS = PriorConfig(width=16, layers=2, heads=2, embed_dim=6, context_length=5, vocab_size=11)
CLIP = replace(TOKENS, text_input="clip", vocab_size=None, text_width=7)
MASK = jnp.array([[True, True, True, False, False], [True, True, True, True, True]])
NO = jnp.array([False, False])
TEXT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


def inputs(config):
    text = TEXT if config.text_input == "tokens" else normal(3, 2, 5, 7)
    return normal(1, 2, 6), jnp.array([3, 900], jnp.int32), normal(2, 2, 6), text, MASK, NO


@pytest.fixture(scope="module", params=["tokens", "clip"])
def prior(request):
    config = {"tokens": TOKENS, "clip": CLIP}[request.param]
    args = inputs(config)
    return config, random_variables(PriorNetwork(config), *args), args


def test_every_input_matters(prior):
    config, params, args = prior
    predict = jitted(PriorNetwork(config))
    out = predict(params, *args)
    assert out.shape == (2, 6) and out.dtype == jnp.float32
    for i, arg in enumerate(args[:4]):
        changed = arg - 1 if arg.dtype == jnp.int32 else arg + 1
        differ(predict(params, *args[:i], changed, *args[i + 1 :]), out)


def test_padding_has_no_effect(prior):
    config, params, (*before, text, mask, drop) = prior
    predict, noisy = jitted(PriorNetwork(config)), text.at[0, 3:].set(7)
    out = predict(params, *before, text, mask, drop)
    same(out, predict(params, *before, noisy, mask, drop))
    differ(predict(params, *before, noisy, jnp.ones_like(mask), drop)[0], out[0])


def test_cached_equals_full(prior):
    config, params, (x_t, t, *text, _) = prior
    model, drop = PriorNetwork(config), jnp.array([True, False])
    cache = jitted(model, "encode_prefix")(params, *text, drop)
    assert cache.past.keys.shape == (2, 2, 6, 2, 8)
    for step in (t, t + 7):  # one cache, many steps
        out = jitted(model, "denoise")(params, cache, x_t, step)
        close(out, jitted(model)(params, x_t, step, *text, drop))


def test_dropped_text_is_forgotten(prior):
    config, params, (x_t, t, text_emb, text, mask, no_drop) = prior
    predict, drop = jitted(PriorNetwork(config)), jnp.array([True, False])
    out = predict(params, x_t, t, text_emb, text, mask, drop)
    other = predict(params, x_t, t, text_emb + 1, jnp.flip(text, axis=1), jnp.flip(mask, axis=1), drop)
    same(out[0], other[0])
    differ(out[1], other[1])
    kept = predict(params, x_t, t, text_emb, text, mask, no_drop)
    same(out[1], kept[1])
    differ(out[0], kept[0])
    close(kept, predict(params, x_t, t, text_emb, text, mask))
    differ(out[0], predict(params, x_t + 1, t, text_emb, text, mask, drop)[0])


def test_without_learned_null():
    model, args = PriorNetwork(replace(CLIP, learned_null=False)), inputs(CLIP)
    params = random_variables(model, *args[:-1])
    assert not any(name.startswith("null") for name in params["params"])
    with pytest.raises(UserError, check=mentions("learned null", "empty caption")):
        jax.eval_shape(model.apply, params, *args)


def test_bfloat16_and_remat(prior):
    config, params, args = prior
    half = jitted(PriorNetwork(replace(config, dtype="bfloat16", remat=True)))(params, *args)
    assert half.dtype == jnp.float32
    close(half, jitted(PriorNetwork(config))(params, *args), 0.1)


def test_bad_config():
    with pytest.raises(UserError, check=mentions("'tokens'", "vocab_size")):
        PriorConfig(text_input="tokens")
    with pytest.raises(UserError, check=mentions("'clip'", "text_width")):
        PriorConfig(text_input="clip")
    with pytest.raises(UserError, check=mentions("text_input", "'bytes'", "'tokens'")):
        PriorConfig(text_input="bytes")
    with pytest.raises(UserError, check=mentions("width 16", "3 heads")):
        replace(TOKENS, heads=3)
    with pytest.raises(UserError, check=mentions("3 tokens", "context_length", 5)):
        x_t, t, text_emb, text, mask, _ = inputs(TOKENS)
        random_variables(PriorNetwork(TOKENS), x_t, t, text_emb, text[:, :3], mask[:, :3])
