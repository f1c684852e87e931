"""The scanned transformer, its masks, its cache and its layers, by theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.attention import attend
from dalle2_jax.models.layers import (
    GroupNorm,
    LayerNorm,
    activation,
    timestep_embedding,
)
from dalle2_jax.models.transformer import (
    Block,
    Transformer,
    TransformerConfig,
    causal_mask,
)

CONFIG = TransformerConfig(width=16, layers=3, heads=2)


MODEL = Transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    return random_variables(MODEL, normal(1, 2, 5, 16))


def test_stacked_parameters(params):
    blocks = params["params"]["blocks"]
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 16, 3, 2, 8)
    assert blocks["attn"]["out"]["kernel"].shape == (3, 2, 8, 16)
    assert blocks["fc"]["kernel"].shape == (3, 16, 64)


def test_initial_layers_differ():
    init = jax.jit(MODEL.init)(jax.random.key(0), normal(1, 1, 2, 16))["params"]["blocks"]
    assert jnp.abs(init["fc"]["kernel"][0] - init["fc"]["kernel"][1]).max() > 0.1
    np.testing.assert_allclose(init["fc"]["kernel"].std(), 32**-0.5, rtol=0.05)
    np.testing.assert_allclose(init["attn"]["qkv"]["kernel"].std(), 16**-0.5, rtol=0.05)
    np.testing.assert_allclose(init["proj"]["kernel"].std(), 16**-0.5 * 6**-0.5, rtol=0.05)


def test_scan_equals_loop(params):
    x, mask = normal(1, 2, 5, 16), causal_mask(5)
    expected = x
    for i in range(CONFIG.layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["blocks"])
        expected = jitted(Block(CONFIG))({"params": layer}, expected, mask, None)[0]
    close(jitted(MODEL)(params, x, mask), expected)


def test_causal(params):
    x = normal(1, 2, 5, 16)
    out = jitted(MODEL)(params, x, causal_mask(5))
    changed = jitted(MODEL)(params, x.at[:, 3:].add(1.0), causal_mask(5))
    same(out[:, :3], changed[:, :3])
    differ(changed[:, 3:], out[:, 3:])
    differ(jitted(MODEL)(params, x, None)[:, :3], out[:, :3])


def test_prefill_and_extend_equal_one_pass(params):
    x, mask = normal(1, 2, 6, 16), causal_mask(6)
    head, past = jitted(MODEL, "prefill")(params, x[:, :4], mask[..., :4, :4])
    tail = jitted(MODEL, "extend")(params, x[:, 4:], past, mask[..., 4:, :])
    assert past.keys.shape == (3, 2, 4, 2, 8)
    close(jnp.concatenate([head, tail], axis=1), jitted(MODEL)(params, x, mask))


def test_remat_has_the_same_gradient(params):
    x = normal(1, 2, 5, 16)

    def gradient(remat):
        model = Transformer(TransformerConfig(16, 3, 2, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, x)))))(params)

    jax.tree.map(close, gradient(True), gradient(False))


def test_depth_costs_no_equations():
    def equations(layers):
        model = Transformer(TransformerConfig(16, layers, 2))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3, 16)))
        return len(str(jax.make_jaxpr(model.apply)(shapes, jnp.zeros((1, 3, 16)))).splitlines())

    assert equations(2) == equations(40)


def test_attend_is_softmax_and_keeps_hidden_rows_finite():
    q, k, v = normal(0, 1, 2, 1, 4), normal(1, 1, 3, 1, 4), normal(2, 1, 3, 1, 4)
    mask = jnp.array([[True, False, True], [False, False, False]])[None, None]
    weights = np.exp(np.asarray(q[0, 0, 0] @ k[0, :, 0].T) / 2) * np.array([1, 0, 1])
    out = jax.jit(attend)(q, k, v, mask)
    np.testing.assert_allclose(out[0, 0, 0], weights / weights.sum() @ np.asarray(v[0, :, 0]), rtol=1e-5)
    np.testing.assert_allclose(out[0, 1, 0], v[0, :, 0].mean(axis=0), rtol=1e-5)


def test_bfloat16_attention_keeps_float32_logits():
    # logits 128 and 128.25: bfloat16 holds neither apart
    q = jnp.full((1, 1, 1, 64), 16, jnp.bfloat16)
    k = jnp.ones((1, 2, 1, 64), jnp.bfloat16).at[0, 1, 0, 0].set(1.125)
    v = jnp.stack([jnp.zeros((1, 1, 64)), jnp.ones((1, 1, 64))], axis=1).astype(jnp.bfloat16)
    out = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(out.astype(jnp.float32), 1 / (1 + np.exp(-0.25)), rtol=1e-2)


def test_layer_norm():
    x = 3 * normal(0, 2, 4, 8) + 100
    params = {"params": {"scale": normal(1, 8), "bias": normal(2, 8)}}
    x64 = np.asarray(x, np.float64)
    unit = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    expected = unit * np.asarray(params["params"]["scale"]) + np.asarray(params["params"]["bias"])
    np.testing.assert_allclose(jitted(LayerNorm())(params, x), expected, atol=1e-4)
    assert jitted(LayerNorm("bfloat16"))(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_norm():
    x = 3 * normal(0, 2, 4, 3, 12) + 100
    params = {"params": {"scale": normal(1, 12), "bias": normal(2, 12)}}
    groups = np.asarray(x, np.float64).reshape(2, 12, 4, 3)  # [B, HW, G, C/G]
    unit = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = unit.reshape(x.shape) * np.asarray(params["params"]["scale"]) + np.asarray(params["params"]["bias"])
    np.testing.assert_allclose(jitted(GroupNorm(4))(params, x), expected, atol=1e-4)


def test_timestep_embedding():
    t = jnp.array([0, 7, 999], jnp.int32)
    out = np.asarray(jax.jit(timestep_embedding, static_argnums=1)(t, 7))
    frequencies = 10000.0 ** (-np.arange(3) / 3)
    angles = np.array([0, 7, 999])[:, None] * frequencies
    np.testing.assert_allclose(out[:, :3], np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(out[:, 3:6], np.sin(angles), atol=1e-3)
    assert not out[:, 6].any()


def test_activations():
    x = jnp.array([-2.0, 0.0, 1.0])
    np.testing.assert_allclose(activation("quick_gelu")(x), x / (1 + np.exp(-1.702 * np.asarray(x))), rtol=1e-5)
    np.testing.assert_allclose(activation("gelu")(x), [-0.0455003, 0.0, 0.8413447], rtol=1e-5)


@pytest.mark.parametrize("bad", [{"heads": 3}, {"activation": "swish"}])
def test_bad_config(bad):
    with pytest.raises(UserError):
        TransformerConfig(**({"width": 16, "heads": 2} | bad))
