"""Programs for CUDA devices, lowered without one: fused attention where cuDNN takes the shapes."""

import importlib
import re

import jax
import jax.numpy as jnp
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
