"""The U-Net, by theory: sizes, conditioning, masks, folding, initial silence, gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.errors import UserError
from dalle2_jax.models.attention import CrossAttention
from dalle2_jax.models.layers import (
    average_pool,
    fold_patches,
    unfold_patches,
    upsample_nearest,
)
from dalle2_jax.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    image_size=8,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=4,
    context_dim=6,
    norm_groups=4,
)
PLAIN = replace(CONFIG, context_dim=None, attention_resolutions=(), middle_attention=False, scale_shift=False)
T = jnp.array([3, 900], jnp.int32)


def inputs(config, side=8):
    context = None if config.context_dim is None else normal(2, 2, 3, config.context_dim)
    return normal(1, 2, side, side, config.in_channels), T, normal(3, 2, config.time_dim), context


MASK = jnp.array([[True, False, True], [True, True, False]])
ALL = jnp.ones_like(MASK)


@pytest.fixture(scope="module")
def net():
    args = *inputs(CONFIG), ALL
    return random_variables(UNet(CONFIG), *args), args


VARIANTS = {
    "context": CONFIG,
    "plain": PLAIN,
    "learned variance": replace(PLAIN, in_channels=6, out_channels=12),
    "folded": replace(PLAIN, patch_size=2),
    "convolution up and down": replace(PLAIN, resblock_updown=False),
    "wide embedding": replace(PLAIN, emb_dim=20),
    "count of heads": replace(CONFIG, num_heads=8),
    "cross attention": replace(CONFIG, context_attention="cross"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name):
    config = VARIANTS[name]
    out, params = jax.eval_shape(lambda: UNet(config).init_with_output(jax.random.key(0), *inputs(config)))
    assert out.shape == (2, 8, 8, config.out_channels) and out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_zero_at_init():
    """Every residual branch and the output start silent."""

    def last_kernels():
        params = UNet(CONFIG).init(jax.random.key(0), *inputs(CONFIG))["params"]
        flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves(params)}
        return {key: leaf for key, leaf in flat.items() if key.endswith(("conv_2/kernel", "attn/out/kernel"))} | {
            "kernel": params["conv_out"]["kernel"],
            "bias": params["conv_out"]["bias"],
        }

    leaves = jax.tree.leaves_with_path
    silent = jax.jit(last_kernels)()
    assert len(silent) == 10 + 4 + 2  # residual blocks, attentions, output
    assert not any(leaf.any() for leaf in silent.values())


def test_every_input_matters(net):
    params, args = net
    out = jitted(UNet(CONFIG))(params, *args)
    for i, arg in enumerate(args[:4]):
        differ(jitted(UNet(CONFIG))(params, *args[:i], arg + 1, *args[i + 1 :]), out)


def test_attention_stands_where_the_config_says(net):
    names = set(net[0]["params"])
    assert {"down_1_0_attn", "mid_attn", "up_1_0_attn", "up_1_1_attn"} <= names
    assert not {"down_0_0_attn", "up_0_0_attn"} & names
    folded = replace(CONFIG, patch_size=2)
    assert folded.attends(0) and not folded.attends(1)
    assert replace(CONFIG, num_heads=2).heads(16) == 2 and CONFIG.heads(16) == 4


def test_other_sizes_use_the_same_parameters(net):
    params, (_, t, emb, context, mask) = net
    for height, width in ((16, 8), (4, 4)):
        x = jnp.zeros((2, height, width, 3))
        assert jax.eval_shape(UNet(CONFIG).apply, params, x, t, emb, context, mask).shape == x.shape


def test_patches_are_only_folded():
    folded = replace(PLAIN, patch_size=2)
    by_hand = replace(PLAIN, in_channels=12, out_channels=12)
    x, t, emb, _ = inputs(folded)
    params = random_variables(UNet(folded), x, t, emb)
    expected = unfold_patches(jitted(UNet(by_hand))(params, fold_patches(x, 2), t, emb), 2)
    close(jitted(UNet(folded))(params, x, t, emb), expected)


def test_nothing_shifts():
    """Mirrored kernels give the mirrored image: padding and resampling favour no side."""
    x, t, emb, _ = inputs(PLAIN)
    params = random_variables(UNet(PLAIN), x, t, emb)
    mirrored = jax.tree.map(lambda p: jnp.flip(p, axis=1) if p.ndim == 4 else p, params)
    out = jitted(UNet(PLAIN))(params, x, t, emb)
    close(jnp.flip(jitted(UNet(PLAIN))(mirrored, jnp.flip(x, axis=2), t, emb), axis=2), out)


def test_context_mask(net):
    params, (x, t, emb, context, _) = net
    apply = jitted(UNet(CONFIG))
    out = apply(params, x, t, emb, context, MASK)
    same(out, apply(params, x, t, emb, jnp.where(MASK[:, :, None], context, 50.0), MASK))
    shown = apply(params, x, t, emb, context, ALL)
    differ(out, shown)
    close(apply(params, x, t, emb, context, None), shown)


def test_cross_attention_reads_the_context_only():
    """Equal to softmax(q k^T / sqrt(K)) v in numpy, where the keys are those of the visible context."""
    x, context = normal(0, 2, 2, 3, 8), normal(1, 2, 3, 6)
    layer = CrossAttention(heads=2)
    params = random_variables(layer, x, context, MASK)["params"]
    found = jax.jit(layer.apply)({"params": params}, x, context, MASK)
    params, context = jax.tree.map(np.asarray, (params, context))
    queries = np.einsum("bsc,cnk->bsnk", x.reshape(2, 6, 8), params["q"]["kernel"]) + params["q"]["bias"]
    joined = np.einsum("bsd,dpnk->bspnk", context, params["context_kv"]["kernel"]) + params["context_kv"]["bias"]
    logits = np.einsum("bqnk,bsnk->bnqs", queries, joined[:, :, 0]) / 2
    weights = np.exp(logits) * np.asarray(MASK)[:, None, None]
    mixed = np.einsum("bnqs,bsnk->bqnk", weights / weights.sum(axis=-1, keepdims=True), joined[:, :, 1])
    close(found, (np.einsum("bqnk,nkc->bqc", mixed, params["out"]["kernel"]) + params["out"]["bias"]).reshape(x.shape))


def test_both_kinds_of_context_attention(net):
    """Cross attention has parameters of its own after the image's attention, and hides what the mask hides."""
    config = replace(CONFIG, context_attention="cross")
    x, t, emb, context, _ = net[1]
    params = random_variables(UNet(config), *net[1])
    block = params["params"]["mid_attn"]
    assert {*block} == {"norm", "attn", "cross"} and {*block["cross"]} == {"norm", "attn"}
    assert "context_kv" in block["cross"]["attn"] and "context_kv" not in block["attn"]
    apply = jitted(UNet(config))
    out = apply(params, x, t, emb, context, MASK)
    same(out, apply(params, x, t, emb, jnp.where(MASK[:, :, None], context, 50.0), MASK))
    differ(out, apply(params, x, t, emb, context, ALL))
    with pytest.raises(UserError, check=mentions("context_attention", "'crossed'", "'cross'")):
        replace(CONFIG, context_attention="crossed")


def test_dropout(net):
    params, args = net
    model = UNet(replace(CONFIG, dropout=0.5))
    calm = jitted(model)(params, *args)
    same(calm, jitted(UNet(CONFIG))(params, *args))
    differ(jitted(model, train=True)(params, *args, rngs={"dropout": jax.random.key(7)}), calm)


def test_remat_has_the_same_gradient():
    config = replace(CONFIG, channel_mult=(1,), attention_resolutions=(8,))
    args = inputs(config)
    params = random_variables(UNet(config), *args)

    def gradient(remat):
        model = UNet(replace(config, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, *args)))))(params)

    jax.tree.map(lambda a, b: close(a, b, 1e-4), gradient(True), gradient(False))


def test_bfloat16_returns_float32(net):
    params, args = net
    half = jitted(UNet(replace(CONFIG, dtype="bfloat16")))(params, *args)
    assert half.dtype == jnp.float32
    close(half, jitted(UNet(CONFIG))(params, *args), 0.1)


def test_fold_and_resample():
    x = normal(0, 2, 4, 6, 3)
    folded = fold_patches(x, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(unfold_patches(folded, 2), x)
    np.testing.assert_array_equal(folded[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    large = upsample_nearest(x)
    np.testing.assert_array_equal(large, jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(average_pool(large, 2), x, rtol=1e-6)
    np.testing.assert_allclose(average_pool(x, 2)[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), rtol=1e-5)


def test_input_skip_adds_shares_of_the_input():
    """At initialisation it is silent, as the output; with shares (0.5, 2) of the two images in x it is their sum."""
    config = replace(PLAIN, in_channels=6, input_skip=True)
    x, t, emb, _ = inputs(config)

    @jax.jit
    def ends():
        params = UNet(config).init(jax.random.key(0), x, t, emb)["params"]
        return {name: params[name] for name in ("input_skip", "conv_out")}

    apply = jax.jit(UNet(config).apply)
    params = {**random_variables(UNet(config), x, t, emb)["params"], **ends()}
    np.testing.assert_array_equal(apply({"params": params}, x, t, emb), 0)
    shares = jnp.array([0.5, 0.5, 0.5, 2.0, 2.0, 2.0])
    params["input_skip"] = {**params["input_skip"], "bias": shares}
    close(apply({"params": params}, x, t, emb), 0.5 * x[..., :3] + 2.0 * x[..., 3:], 1e-6)
    without = jax.eval_shape(UNet(PLAIN).init, jax.random.key(0), x[..., :3], t, emb)
    assert "input_skip" not in without["params"]


def test_bad_input():
    x, t, emb, _ = inputs(PLAIN)
    params = random_variables(UNet(PLAIN), x, t, emb)
    with pytest.raises(UserError, check=mentions("7x8", "multiples of 2")):
        UNet(PLAIN).apply(params, x[:, :7], t, emb)
    with pytest.raises(UserError, check=mentions("in_channels", 3, "2 channels")):
        UNet(PLAIN).apply(params, x[..., :2], t, emb)
    with pytest.raises(UserError, check=mentions("context_dim", None, "context")):
        UNet(PLAIN).apply(params, x, t, emb, normal(2, 2, 3, 6))
    with pytest.raises(UserError, check=mentions("8 channels", "level 0", "norm_groups 3")):
        replace(CONFIG, norm_groups=3)
    with pytest.raises(UserError, check=mentions("16 channels", "level 1", "head_channels 5")):
        replace(CONFIG, head_channels=5)
    with pytest.raises(UserError, check=mentions("input_skip", "in_channels 4", "out_channels 3")):
        replace(PLAIN, in_channels=4, input_skip=True)
