"""The pre-norm transformer under CLIP's towers, the prior and the caption encoder.

Its layers are one scanned block with stacked parameters [layers, ...]: depth costs no compile
time. x <- x + attention(norm(x)); x <- x + mlp(norm(x)) (Radford et al. 2021, section 2.4).
"""

from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.attention import KeyValues, SelfAttention
from dalle2_jax.models.layers import LayerNorm, activation
from dalle2_jax.models.remat import Remat, block_input, policy_name, rematerialised
from dalle2_jax.ranges import Depth, Length, MlpRatio, VocabSize, Width


@dataclass(frozen=True)
class TransformerConfig:
    """Width, depth and heads of a transformer.

    Raises:
      UserError: the heads do not divide the width, the MLP has no hidden unit, or the activation or the
        policy of rematerialisation is unknown.
    """

    width: Width = 512
    layers: Depth = 12
    heads: Depth = 8
    activation: str = "gelu"  # or "quick_gelu"
    mlp_ratio: MlpRatio = 4.0
    remat: Remat = "none"  # what is stored for the backward pass, see `remat`
    dtype: str = "float32"  # compute dtype; parameters are float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by {self.heads} heads: change one of them")
        if int(self.width * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio} leaves no hidden unit of width {self.width}: raise it")
        activation(self.activation)
        policy_name(self.remat)


@dataclass(frozen=True)
class TextConfig:
    """A transformer over tokens: CLIP's text tower, or the decoder's own caption encoder.

    Raises:
      UserError: as `TransformerConfig`.
    """

    vocab_size: VocabSize = 49408
    context_length: Length = 77
    width: Width = 512
    layers: Depth = 12
    heads: Depth = 8
    activation: str = "quick_gelu"
    mlp_ratio: MlpRatio = 4.0

    def __post_init__(self) -> None:
        self.transformer(remat="none", dtype="float32")

    def transformer(self, remat: Remat, dtype: str) -> TransformerConfig:
        """Returns the transformer of this text encoder."""
        return TransformerConfig(
            self.width, self.layers, self.heads, self.activation, self.mlp_ratio, remat=remat, dtype=dtype
        )


class Block(nn.Module):
    """One layer. Its signature is nn.scan's: carry, broadcast mask, this layer's cache -> carry, output."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, past: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        config, normal = self.config, linear.normal
        x = block_input(x)
        # CLIP's initial deviations: residual branches shrink with depth (Radford et al. 2019, section 2.3)
        residual_std = config.width**-0.5 * (2 * config.layers) ** -0.5
        h, own = SelfAttention(config.heads, config.width**-0.5, residual_std, config.dtype, name="attn")(
            LayerNorm(config.dtype, name="ln_1")(x), mask, past
        )
        x = x + h
        hidden = int(config.width * config.mlp_ratio)
        h = LayerNorm(config.dtype, name="ln_2")(x)
        h = linear.Dense(hidden, dtype=config.dtype, kernel_init=normal((2 * config.width) ** -0.5), name="fc")(h)
        h = activation(config.activation)(h)
        h = linear.Dense(config.width, dtype=config.dtype, kernel_init=normal(residual_std), name="proj")(h)
        # without a cache no keys and values are stacked
        return x + h, (None if past is None else own)


class Transformer(nn.Module):
    """``config.layers`` blocks, scanned; params lie under ``blocks`` with a leading layer axis.

    ``mask`` is bool, true where a key is visible: [B or 1, 1, S, S]; with None all are.
    """

    config: TransformerConfig

    def setup(self) -> None:
        # inside a scan no two copies of a layer meet, so the barrier against their merging is not needed
        block = rematerialised(Block, self.config.remat, prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - flax annotates int, documents tuples
            length=self.config.layers,
        )(self.config)

    def __call__(self, x: Float[Array, "B S D"], mask: Bool[Array, "_B 1 S S"] | None = None) -> Float[Array, "B S D"]:
        """Evaluates the full sequence; the result is in the compute dtype."""
        return self.blocks(x.astype(self.config.dtype), mask, None)[0]

    def prefill(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "_B 1 S S"] | None = None
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """As a call, and also returns every layer's keys and values, [layers, B, S, N, K]."""
        config = self.config
        shape = (config.layers, x.shape[0], 0, config.heads, config.width // config.heads)
        empty = jnp.zeros(shape, config.dtype)
        return cast(Any, self.blocks)(x.astype(config.dtype), mask, KeyValues(empty, empty))

    def extend(
        self, x: Float[Array, "B S D"], past: KeyValues, mask: Bool[Array, "_B 1 S R"] | None = None
    ) -> Float[Array, "B S D"]:
        """Runs S new tokens after the R - S tokens of ``prefill``."""
        return self.append(x, past, mask)[0]

    def append(
        self, x: Float[Array, "B S D"], past: KeyValues, mask: Bool[Array, "_B 1 S R"] | None = None
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """As ``extend``, and also returns the new tokens' keys and values, [layers, B, S, N, K]."""
        return cast(Any, self.blocks)(x.astype(self.config.dtype), mask, past)


def causal_mask(length: int) -> Bool[Array, "1 1 S S"]:
    """True where key <= query."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
