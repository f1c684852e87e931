"""The transformer of LAION's prior: many query heads over one head of keys and values.

In addition to the sequence's keys there is a learned null key and value, visible to every token
(multi-query attention: Shazeer 2019; positions: rotary, Su et al. 2021, and T5's learned bias, Raffel
et al. 2020, section 2.1). The output of attention is normed again before it is added (Shleifer et al.
2021), the feed-forward layer is a SwiGLU (Shazeer 2020), and no layer or norm has a bias. It is causal.

Versions of the library that trained such weights differ in what no weight shows, hence ``attention``:

    "cosine"   16 cos(q, k) + b                     dalle2-pytorch 1.4.3 and later
    "relaxed"  q k / sqrt(K) + 128 b                0.23.3 to 1.4.2
    "dot"      q k / sqrt(K) + b                    before 0.16.0; its last norm is an ordinary one
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.attention import KeyValues
from dalle2_jax.models.layers import NORM_EPSILON
from dalle2_jax.models.remat import block_input, rematerialised
from dalle2_jax.ranges import Depth, Range, Width

_BUCKETS, _FARTHEST = 32, 128  # of the position bias: half the buckets are single distances, half grow to _FARTHEST
_ROTATED = 32  # at most so many features of a head are rotated
_COSINE_SCALE = 16.0
_BIAS_SCALES = {"cosine": 1.0, "relaxed": 128.0, "dot": 1.0}


@dataclass(frozen=True)
class MultiQueryConfig:
    """The transformer's sizes and parts.

    Raises:
      UserError: an unknown ``attention``, or rotary positions in heads of odd width.
    """

    width: Width
    layers: Depth
    heads: Depth
    head_width: Width
    mlp_width: Annotated[int, Range(1, 1_000_000)]
    normformer: bool  # a norm within the feed-forward layer
    rotary: bool
    norm_in: bool
    norm_out: bool
    attention: str
    remat: str
    dtype: str

    def __post_init__(self) -> None:
        if self.attention not in _BIAS_SCALES:
            raise UserError(f"unknown attention {self.attention!r}: choose one of {', '.join(sorted(_BIAS_SCALES))}")
        if self.rotary and self.head_width % 2:
            raise UserError(f"rotary positions turn pairs: head_width {self.head_width} must be even")


def unit(x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """x over its length, computed in float32; zeros stay zeros."""
    wide = x.astype(jnp.float32)
    # a bound within the root: the length of zeros has no gradient
    return (wide * jax.lax.rsqrt(jnp.maximum(jnp.sum(wide * wide, -1, keepdims=True), 1e-24))).astype(x.dtype)


class ScaleLayerNorm(nn.Module):
    """Layer norm with a scale and no bias, over the last axis, in float32, returned in ``dtype``. Params: scale [D].

    ``by_largest`` divides by the largest element first (Ding et al. 2021, section 2.4), which matters to
    the epsilon, and to the sign where all elements are negative.
    """

    dtype: str = "float32"
    by_largest: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))[None, None]
        x = x.astype(jnp.float32)
        if self.by_largest:
            x = x / jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + NORM_EPSILON) * scale).astype(self.dtype)


class Positions(NamedTuple):
    """What a query knows of where it stands and where the keys stand; the null key comes first among them."""

    bias: jax.Array  # float32[N, Q, 1 + R], added to the logits
    angles: jax.Array  # float32[Q, rotated / 2], of the queries and of their own keys


class MultiQueryAttention(nn.Module):
    """N query heads, one key and value head. Its output is already normed.

    Params: ``q`` kernel [D, N, K], ``kv`` kernel [D, 2, K], ``null_kv`` [2, K], ``out`` kernel [N, K, D], ``ln_out``.
    """

    config: MultiQueryConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "_B 1 S R"], positions: Positions, past: KeyValues | None
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """Attends to the null key, to ``past`` and to x itself; returns x's own keys and values too, [B, S, K]."""
        config, normal = self.config, linear.normal
        spread = normal(config.width**-0.5)
        shape = (config.heads, config.head_width)
        queries = linear.DenseGeneral(shape, use_bias=False, dtype=config.dtype, kernel_init=spread, name="q")(x)
        both = linear.DenseGeneral(
            (2, config.head_width), use_bias=False, dtype=config.dtype, kernel_init=spread, name="kv"
        )(x)
        null = self.param("null_kv", normal(1.0), (2, config.head_width)).astype(config.dtype)
        keys, null_key = both[:, :, 0], null[0]
        if config.rotary:
            queries = _rotate(queries, positions.angles[None, :, None])
            keys = _rotate(keys, positions.angles[None])
        if config.attention == "cosine":
            queries, keys, null_key = unit(queries), unit(keys), unit(null_key)
        own = KeyValues(keys, both[:, :, 1])
        nulls = KeyValues(*(jnp.broadcast_to(one, (x.shape[0], 1, config.head_width)) for one in (null_key, null[1])))
        parts = (nulls, own) if past is None else (nulls, past, own)
        total = jax.tree.map(lambda *every: jnp.concatenate(every, axis=1), *parts)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=True)
        out = linear.DenseGeneral(
            config.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=config.dtype,
            kernel_init=normal((config.heads * config.head_width) ** -0.5),
            name="out",
        )(self._attend(queries, total, mask, positions.bias))
        return ScaleLayerNorm(config.dtype, name="ln_out")(out), own

    def _attend(self, queries: jax.Array, past: KeyValues, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """Softmax over keys that all heads share; returns [B, Q, N, K]."""
        config = self.config
        scale = _COSINE_SCALE if config.attention == "cosine" else config.head_width**-0.5
        logits = jnp.einsum("bqnk,bsk->bnqs", queries, past.keys, preferred_element_type=jnp.float32)
        logits = logits * scale + (bias * _BIAS_SCALES[config.attention])[None]
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).astype(past.values.dtype)
        return jnp.einsum("bnqs,bsk->bqnk", weights, past.values)


class MultiQueryBlock(nn.Module):
    """One layer. Its signature is nn.scan's: carry, broadcast mask and positions, this layer's cache -> carry, output.

    Params: ``ln_1``, ``attn``; ``ln_2``, ``fc`` kernel [D, 2, H] (value, then gate), ``ln_mid`` with normformer,
    ``proj`` kernel [H, D].
    """

    config: MultiQueryConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, positions: Positions, past: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        config, normal = self.config, linear.normal
        x = block_input(x)
        h, own = MultiQueryAttention(config, name="attn")(
            ScaleLayerNorm(config.dtype, name="ln_1")(x), mask, positions, past
        )
        x = x + h
        h = ScaleLayerNorm(config.dtype, name="ln_2")(x)
        h = linear.DenseGeneral(
            (2, config.mlp_width),
            use_bias=False,
            dtype=config.dtype,
            kernel_init=normal(config.width**-0.5),
            name="fc",
        )(h)
        h = h[:, :, 0] * nn.silu(h[:, :, 1])
        if config.normformer:
            h = ScaleLayerNorm(config.dtype, name="ln_mid")(h)
        residual_std = (2 * config.layers * config.mlp_width) ** -0.5
        h = linear.Dense(
            config.width, use_bias=False, dtype=config.dtype, kernel_init=normal(residual_std), name="proj"
        )(h)
        # without a cache no keys and values are stacked
        return x + h, (None if past is None else own)


class MultiQueryTransformer(nn.Module):
    """``config.layers`` blocks, scanned, over a sequence whose order is all that positions tell.

    Params: ``position_bias`` [32, N]; ``ln_in``; ``blocks`` with a leading layer axis; ``ln_out``.
    ``visible`` is true where a token is visible to those after it.
    """

    config: MultiQueryConfig

    def setup(self) -> None:
        config = self.config
        # inside a scan no two copies of a layer meet, so the barrier against their merging is not needed
        block = rematerialised(MultiQueryBlock, config.remat, prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=config.layers,
        )(config)
        self.position_bias = self.param("position_bias", linear.normal(0.02), (_BUCKETS, config.heads))
        if config.norm_in:
            self.ln_in = ScaleLayerNorm(config.dtype)
        if config.norm_out:
            self.ln_out = ScaleLayerNorm(config.dtype, by_largest=config.attention != "dot")

    def __call__(self, x: Float[Array, "B S D"], visible: Bool[Array, "_B S"]) -> Float[Array, "B S D"]:
        """Evaluates the full sequence; the result is in the compute dtype."""
        return self._run(x, visible, None)[0]

    def prefill(
        self, x: Float[Array, "B S D"], visible: Bool[Array, "_B S"]
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """As a call, and also returns every layer's keys and values, [layers, B, S, K]."""
        empty = jnp.zeros((self.config.layers, x.shape[0], 0, self.config.head_width), self.config.dtype)
        return cast(Any, self._run(x, visible, KeyValues(empty, empty)))

    def extend(self, x: Float[Array, "B S D"], past: KeyValues, visible: Bool[Array, "_B R"]) -> Float[Array, "B S D"]:
        """Runs S new tokens after the R - S tokens of ``prefill``."""
        return self._run(x, visible, past)[0]

    def _run(self, x: jax.Array, visible: jax.Array, past: KeyValues | None) -> tuple[jax.Array, KeyValues | None]:
        config, (new, total) = self.config, (x.shape[1], visible.shape[1])
        mask = jnp.tril(jnp.ones((total, total), bool))[None, None, -new:] & visible[:, None, None, :]
        x = x.astype(config.dtype)
        x, own = self.blocks(self.ln_in(x) if config.norm_in else x, mask, self._positions(new, total), past)
        return (self.ln_out(x) if config.norm_out else x), own

    def _positions(self, new: int, total: int) -> Positions:
        """Those of the last ``new`` of ``total`` tokens."""
        places = np.arange(total - new, total)
        bias = jnp.take(self.position_bias, _buckets(places, total), axis=0).transpose(2, 0, 1)
        half = min(_ROTATED, self.config.head_width) // 2
        frequencies = 10000.0 ** (-np.arange(half) / half)
        return Positions(bias, jnp.asarray(places[:, None] * frequencies, jnp.float32))


def _buckets(places: np.ndarray, total: int) -> np.ndarray:
    """Bucket of each query's distance to the null key and to ``total`` tokens, [Q, 1 + total].

    Distances count from the null key at 0, so a token itself and the one before it are both at distance 0.
    """
    distance = np.maximum(places[:, None] - np.arange(1 + total), 0)
    single = _BUCKETS // 2
    growth = np.log(np.maximum(distance, single) / single) / math.log(_FARTHEST / single)
    far = np.minimum(single + (growth * (_BUCKETS - single)).astype(int), _BUCKETS - 1)
    return np.where(distance < single, distance, far)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns neighbouring pairs of the first features by ``angles``, in float32; the other features stay."""
    turned = 2 * angles.shape[-1]
    pairs = x[..., :turned].astype(jnp.float32).reshape(*x.shape[:-1], turned // 2, 2)
    first, second, cos, sin = pairs[..., 0], pairs[..., 1], jnp.cos(angles), jnp.sin(angles)
    pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], turned).astype(x.dtype), x[..., turned:]], axis=-1)
