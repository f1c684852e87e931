"""Attention for sequences (with a key-value cache) and for images (with a concatenated context).

Heads keep an axis of their own in every kernel ([D, 3, N, K] in, [N, K, D] out), so that
sharding the heads is sharding one axis. Logits and softmax are float32. Masks are bool, true
where a key is visible; a query without visible keys gets the mean of the values, never NaN.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.extend.backend
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dalle2_jax.models import linear


class KeyValues(NamedTuple):
    """Keys and values of previous tokens, [B, S, N, K] for a layer, [layers, B, S, N, K] for a stack."""

    keys: jax.Array
    values: jax.Array


def attend(
    queries: Float[Array, "B Q N K"],
    keys: Float[Array, "B S N K"],
    values: Float[Array, "B S N K"],
    mask: Bool[Array, "_B _N _Q S"] | None = None,
) -> Float[Array, "B Q N K"]:
    """Softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, eq. 1), the softmax in float32.

    Where the default devices are CUDA's, the shapes that cuDNN's fused attention takes are computed by it, without
    logits in memory. On CPUs many queries are divided into chunks, whose logits fit into the caches.

    Args:
      queries: in the compute dtype, as are keys and values.
      keys: of all tokens.
      values: of the same tokens.
      mask: true where a key is visible; broadcasts against [B, N, Q, S].
    """
    if _has_cudnn() and fits_cudnn(queries, keys, mask):
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries.shape[1], keys.shape[1]))
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask, implementation="cudnn")
    if _is_for_cpus() and has_chunks(queries, keys, mask):
        return _attend_by_chunks(queries, keys, values, mask)
    return _attend(queries, keys, values, mask)


CUDNN_HEAD_WIDTH = 128
"""Largest head width of cuDNN's fused attention on all supported devices."""


def fits_cudnn(queries: jax.Array, keys: jax.Array, mask: jax.Array | None) -> bool:
    """Whether cuDNN's fused attention takes these arguments: half precision, and with a mask even lengths."""
    width, lengths = queries.shape[-1], (queries.shape[1], keys.shape[1])
    even = mask is None or all(length % 2 == 0 for length in lengths)
    return queries.dtype == jnp.bfloat16 and width <= CUDNN_HEAD_WIDTH and width % 8 == 0 and even


def _has_cudnn() -> bool:
    """Whether the default devices are CUDA's."""
    return "cuda" in jax.extend.backend.get_backend().platform_version


CHUNK = 128
"""Queries of a chunk."""

MANY = 2**19
"""Pairs of a query and a key from which on chunks are faster on CPUs."""


def has_chunks(queries: jax.Array, keys: jax.Array, mask: jax.Array | None) -> bool:
    """Whether there are many logits, and the queries are whole chunks with the same visible keys."""
    pairs = queries.shape[1] * keys.shape[1]
    return pairs >= MANY and queries.shape[1] % CHUNK == 0 and (mask is None or mask.shape[2] == 1)


def _is_for_cpus() -> bool:
    """Whether the program that is traced will run on CPUs: by the mesh in force, or else the default devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.extend.backend.get_backend().platform == "cpu"
    return mesh.abstract_device.device_kind == "cpu"


def _attend_by_chunks(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `_attend`, computed for one chunk of queries after the other, and again for their gradients."""
    batch, length, *head = queries.shape
    chunks = jnp.moveaxis(queries.reshape(batch, length // CHUNK, CHUNK, *head), 1, 0)
    attend_chunk = jax.checkpoint(lambda chunk: _attend(chunk, keys, values, mask), prevent_cse=False)
    return jnp.moveaxis(jax.lax.map(attend_chunk, chunks), 0, 1).reshape(queries.shape)


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("bqnk,bsnk->bnqs", queries, keys, preferred_element_type=jnp.float32)
    logits = logits * queries.shape[-1] ** -0.5
    if mask is not None:
        # finite, so that a row without any visible key stays finite
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, values)


class SelfAttention(nn.Module):
    """Multi-head self-attention over [B, S, D] with one fused projection.

    Params: ``qkv`` kernel [D, 3, N, K], bias [3, N, K]; ``out`` kernel [N, K, D], bias [D].
    """

    heads: int
    qkv_std: float
    out_std: float
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "_B 1 S R"] | None, past: KeyValues | None
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """Attends to ``past`` (R - S tokens, none if None) and to x itself; returns x's own keys and values too."""
        width = x.shape[-1]
        qkv = linear.DenseGeneral(
            (3, self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=linear.normal(self.qkv_std),
            name="qkv",
        )(x)
        queries, own = qkv[:, :, 0], KeyValues(qkv[:, :, 1], qkv[:, :, 2])
        total = own if past is None else jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), past, own)
        out = linear.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=linear.normal(self.out_std),
            name="out",
        )(attend(queries, total.keys, total.values, mask))
        return out, own


class CrossAttention(nn.Module):
    """Attention of a normalised image h to a context c only (Vaswani et al. 2017, section 3.2.3).

        q = W_q h,    (k, v) = W_kv c,    result = W_o softmax(q k^T / sqrt(K)) v                  (1)

    The output projection starts at zero, so the residual branch does. Params: ``q`` kernel [C, N, K], ``context_kv``
    kernel [Dc, 2, N, K], ``out`` kernel [N, K, C].
    """

    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B S Dc"], context_mask: Bool[Array, "B S"] | None
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        head_width = channels // self.heads
        tokens = x.reshape(batch, height * width, channels)
        queries = linear.DenseGeneral((self.heads, head_width), dtype=self.dtype, name="q")(tokens)
        joined = linear.DenseGeneral((2, self.heads, head_width), dtype=self.dtype, name="context_kv")(context)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        zeros = nn.initializers.zeros
        out = linear.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, kernel_init=zeros, name="out")(
            attend(queries, joined[:, :, 0], joined[:, :, 1], mask)
        )
        return out.reshape(batch, height, width, channels)


class ContextAttention(nn.Module):
    """Attention of a normalised image to [context, itself] (GLIDE, Nichol et al. 2021, section 4.1).

    The context's keys and values are prepended to the image's own; the image is always
    visible. The output projection starts at zero, so the residual branch does. Params: ``qkv``
    kernel [C, 3, N, K], ``context_kv`` kernel [Dc, 2, N, K] (only with a context), ``out``
    kernel [N, K, C].
    """

    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B S Dc"] | None,
        context_mask: Bool[Array, "B S"] | None,
    ) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        head_width = channels // self.heads
        tokens = x.reshape(batch, height * width, channels)
        qkv = linear.DenseGeneral((3, self.heads, head_width), dtype=self.dtype, name="qkv")(tokens)
        keys, values = qkv[:, :, 1], qkv[:, :, 2]
        mask = None
        if context is not None:
            joined = linear.DenseGeneral((2, self.heads, head_width), dtype=self.dtype, name="context_kv")(context)
            keys = jnp.concatenate([joined[:, :, 0], keys], axis=1)
            values = jnp.concatenate([joined[:, :, 1], values], axis=1)
            if context_mask is not None:
                own = jnp.ones((batch, height * width), bool)
                mask = jnp.concatenate([context_mask, own], axis=1)[:, None, None, :]
        zeros = nn.initializers.zeros
        out = linear.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, kernel_init=zeros, name="out")(
            attend(qkv[:, :, 0], keys, values, mask)
        )
        return out.reshape(batch, height, width, channels)
