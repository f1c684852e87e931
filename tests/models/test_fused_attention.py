"""Attention without all logits in memory: cuDNN's, lowered without a CUDA device, and chunks of queries on CPUs."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models import attention

B, Q, S, N, K = 2, 64, 80, 4, 32


@pytest.fixture
def cuda(monkeypatch):
    """JAX as with a CUDA device and its cuDNN."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)


def lowered(dtype=jnp.bfloat16, queries=Q, mask=(B, 1, 1, S)):
    """Returns the program of the gradient of attention for CUDA."""
    shapes = [jax.ShapeDtypeStruct((B, length, N, K), dtype) for length in (queries, S, S)]
    visible = None if mask is None else jnp.ones(mask, bool)

    def loss(q, k, v):
        return attention.attend(q, k, v, visible).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("mask", [None, (B, 1, 1, S), (1, 1, Q, S)], ids=str)
def test_bfloat16_is_fused_forward_and_backward(cuda, mask):
    program = lowered(mask=mask)
    assert len(re.findall(r"custom_call @__cudnn\$fmha", program)) == 2
    assert f"tensor<{B}x{N}x{Q}x{S}xf32>" not in program


@pytest.mark.parametrize("options", [{"dtype": jnp.float32}, {"queries": 63}], ids=str)
def test_what_cudnn_does_not_take_is_not_fused(cuda, options):
    program = lowered(**options)
    assert "cudnn" not in program and f"x{S}xf32>" in program


def test_without_cuda_nothing_changes():
    args = [jnp.ones((B, length, N, K), jnp.bfloat16) for length in (Q, S, S)]
    program = str(jax.make_jaxpr(attention.attend)(*args))
    assert "cudnn" not in program and f"f32[{B},{N},{Q},{S}]" in program


LONG = 1024
"""Queries of which there are chunks."""


def long(seed, mask=None):
    """Returns queries, keys, values and a mask; another number of keys than of queries."""
    keys = jax.random.split(jax.random.key(seed), 3)
    lengths = (LONG, LONG + 5, LONG + 5)
    arrays = [jax.random.normal(key, (B, length, N, 8)) for key, length in zip(keys, lengths, strict=True)]
    return *arrays, None if mask is None else jax.random.bernoulli(jax.random.key(seed), 0.5, mask)


@pytest.mark.numerics
@pytest.mark.parametrize("mask", [None, (B, 1, 1, LONG + 5)], ids=str)
def test_chunks_have_the_values_and_gradients_of_all_logits(mask):
    queries, keys, values, visible = long(0, mask)
    weights = jax.random.normal(jax.random.key(1), queries.shape)

    def of(function):
        def loss(q, k, v):
            out = function(q, k, v, visible)
            return (out * weights).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(queries, keys, values)
        return out, *grads

    assert attention.has_chunks(queries, keys, visible)
    for one, other in zip(of(attention.attend), of(attention._attend), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-5)


def test_chunks_have_no_array_of_all_logits():
    queries, keys, values, _ = long(0)
    program = str(jax.make_jaxpr(jax.grad(lambda q: attention.attend(q, keys, values).sum()))(queries))
    assert f"f32[{B},{N},{LONG},{LONG + 5}]" not in program
    assert f"f32[{B},{N},{attention.CHUNK},{LONG + 5}]" in program


def test_few_logits_a_mask_for_each_query_and_other_devices_have_no_chunks():
    queries, keys, values, _ = long(0)
    assert not attention.has_chunks(queries[:, :128], keys, None)
    assert not attention.has_chunks(queries[:, :-1], keys, None)
    assert not attention.has_chunks(queries, keys, jnp.ones((1, 1, LONG, LONG + 5), bool))
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(attention.attend)(queries, keys, values))
    assert f"f32[{B},{N},{LONG},{LONG + 5}]" in program
