"""What each policy of rematerialisation stores, read from the programs of gradients; none changes a value."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.config.parse import expand
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.remat import POLICIES
from dalle2_jax.models.transformer import Transformer, TransformerConfig
from dalle2_jax.models.unet import UNet, UNetConfig

UNET = UNetConfig(8, channels=16, channel_mult=(1,), num_res_blocks=1, head_channels=8, norm_groups=8)


def transformer(remat):
    return Transformer(TransformerConfig(16, 2, 2, remat=remat)), (jnp.ones((2, 5, 16)),)


def unet(remat):
    images, t = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
    return UNet(replace(UNET, attention_resolutions=(8,), remat=remat)), (images, t)


NETWORKS = {"transformer": (transformer, "dot_general"), "unet": (unet, "conv_general_dilated")}


def gradient(network, remat):
    """Returns the gradient of a sum over a network's output, and its parameters."""
    model, args = network(remat)
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * noise.standard_normal(leaf.shape, np.float32)), params)
    return jax.grad(lambda params: jnp.sum(jnp.square(model.apply(params, *args)))), params


@pytest.mark.parametrize("kind", NETWORKS)
def test_policies_compute_again_what_they_do_not_store(kind):
    network, product = NETWORKS[kind]
    programs = {}
    for remat in POLICIES:
        function, params = gradient(network, remat)
        programs[remat] = str(jax.make_jaxpr(function)(params))
    counts = {remat: program.count(f"= {product}") for remat, program in programs.items()}
    assert counts["none"] < counts["blocks"] == counts["offload"]
    if kind == "unet":
        assert counts["dots"] == counts["none"]
    else:
        assert counts["none"] < counts["dots"] < counts["blocks"]  # logits and weighted values of attention only
    assert [remat for remat, program in programs.items() if "Host" in program] == ["offload"]


@pytest.mark.parametrize("remat", ["dots", "offload"])
def test_the_gradient_is_the_same(remat):
    (function, params), (wanted, _) = gradient(transformer, remat), gradient(transformer, "none")
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        jax.jit(function)(params),
        jax.jit(wanted)(params),
    )


def test_names_are_checked_and_those_of_earlier_versions_parse():
    sizes = {"vocab_size": 8}
    parsed = [expand(PriorConfig, {**sizes, "remat": value}, "model").remat for value in (True, False, "dots")]
    assert parsed == ["blocks", "none", "dots"]
    with pytest.raises(ConfigError, check=mentions("'block'", "'blocks'", field="model.remat")):
        expand(PriorConfig, {**sizes, "remat": "block"}, "model")
    with pytest.raises(UserError, check=mentions("'dot'", "'dots'")):
        replace(UNET, remat="dot")
