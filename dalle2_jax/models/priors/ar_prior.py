"""The autoregressive prior's network: from a caption to the codes of a CLIP image embedding.

Ramesh et al. 2022, section 2.2: the image embedding, as a sequence of quantised principal
components, is predicted code by code by a causal transformer. Caption and CLIP text embedding are
its prefix, with a token for the quantised dot product of the two embeddings prepended to the codes.

Table 3 gives two transformers, and this is how they are read here:

  * The *text encoder* (context 256, width 2048, depth 24, heads 32: the same numbers as the
    decoder's) is GLIDE's text path over the caption's tokens. As in GLIDE (Nichol et al. 2021,
    section 4.1) its states are projected to keys and values of every layer of the latent decoder and
    prepended to that layer's own: a prefix that every token attends to.
  * The *latent decoder* (context 384, width 1664, depth 24, heads 26) runs over

        [CLIP text embedding | dot product | code 1 | ... | code 318]

    and its output at the dot product and after predicts codes 1 to 319. The caption's 256 states
    cannot be among its 384 positions, which 256 + 1 + 1 + 319 exceeds: hence the joined keys. 319
    codes, the dot product and the text embedding are 321 tokens; the last code is never read, so 320
    positions are used. The other 64 are not explained in the paper: 384 is a multiple of 128.

Table 3's "1B" is nominal: its two transformers alone hold 1.209B + 0.798B parameters. With the token
table and the projections this network has 2.28B.
"""

from dataclasses import dataclass
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.attention import KeyValues
from dalle2_jax.models.decoder import CaptionEncoder
from dalle2_jax.models.layers import LayerNorm
from dalle2_jax.models.transformer import (
    TextConfig,
    Transformer,
    TransformerConfig,
    causal_mask,
)
from dalle2_jax.ranges import Depth, Length, Range, Width

_OPENING = 2  # tokens before the codes: text embedding and dot product


@dataclass(frozen=True)
class ArPriorConfig:
    """The two transformers, and the alphabet of the codes.

    Raises:
      UserError: more components than CLIP has dimensions or than there are positions for.
    """

    text: TextConfig = TextConfig(activation="gelu")  # the caption's encoder
    width: Width = 512  # of the latent decoder, as are layers, heads and context_length
    layers: Depth = 12
    heads: Depth = 8
    context_length: Length = 384
    embed_dim: Width = 512  # CLIP's
    components: Length = 319  # codes an embedding
    buckets: Annotated[int, Range(2, 65_536)] = 1024  # values a code may have; the dot product's too
    activation: str = "gelu"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.components <= self.embed_dim:
            raise UserError(f"components {self.components} must be from 1 to CLIP's embed_dim {self.embed_dim}")
        if self.context_length < self.positions:
            raise UserError(
                f"{self.components} components need {self.positions} positions but context_length is "
                f"{self.context_length}: raise it or keep fewer components"
            )
        if self.buckets < 2:
            raise UserError(f"buckets {self.buckets} must be at least 2")
        self.transformer()

    @property
    def positions(self) -> int:
        """Input tokens of the latent decoder: the opening and all codes but the last."""
        return _OPENING + self.components - 1

    def transformer(self) -> TransformerConfig:
        """Returns the latent decoder's own config."""
        return TransformerConfig(
            self.width, self.layers, self.heads, self.activation, remat=self.remat, dtype=self.dtype
        )


class ArPriorNetwork(nn.Module):
    """Predicts each code from those before it.

    Codes are int32 in [0, buckets), the component with the largest variance first. Params: ``caption_encoder``,
    ``context_kv`` (kernel [Dt, layers, 2, N, K]), ``text_emb_proj``, ``code_embedding`` [buckets, D] (the
    dot product's too: its position tells it apart), ``positional_embedding`` [context_length, D],
    ``null_text_emb`` and ``null_dot`` [D], ``latent_decoder``, ``ln_final``, ``out_proj``.
    """

    config: ArPriorConfig

    def setup(self) -> None:
        config, normal = self.config, linear.normal
        self.caption_encoder = CaptionEncoder(config.text, config.remat, config.dtype)
        head_width = config.width // config.heads
        self.context_kv = linear.DenseGeneral((config.layers, 2, config.heads, head_width), dtype=config.dtype)
        self.text_emb_proj = linear.Dense(config.width, dtype=config.dtype)
        self.code_embedding = nn.Embed(config.buckets, config.width, dtype=config.dtype, embedding_init=normal(0.02))
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.01), (config.context_length, config.width)
        )
        self.null_text_emb = self.param("null_text_emb", normal(0.02), (config.width,))
        self.null_dot = self.param("null_dot", normal(0.02), (config.width,))
        self.latent_decoder = Transformer(config.transformer())
        self.ln_final = LayerNorm(config.dtype)
        # float32: a softmax over many buckets needs the digits. Zeros: training starts at log(buckets).
        self.out_proj = linear.Dense(config.buckets, kernel_init=nn.initializers.zeros)

    def __call__(
        self,
        codes: Int[Array, "B K"],
        dot: Int[Array, "B"],
        text_emb: Float[Array, "B E"],
        text: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B K Q"]:
        """All codes at once, for training.

        Args:
          codes: the embedding's codes; the k-th logits see the codes before the k-th.
          dot: the quantised dot product of image and text embedding.
          text_emb: CLIP text embeddings, in the space of the embedding contract.
          text: token ids of the captions.
          mask: true on the caption, false on padding.
          drop_text: true where the caption is dropped: it is all padding, and learned
            embeddings stand for the text embedding and for the dot product with it.

        Returns:
          Logits of each code over the buckets, float32[B, components, buckets].

        Raises:
          UserError: a caption of another length than the text encoder's context_length.
        """
        past = self._context(text, mask, drop_text)
        opening = self._opening(text_emb, dot, drop_text)
        tokens = jnp.concatenate([opening, self._embed(codes[:, :-1], _OPENING)], axis=1)
        states, _ = self.latent_decoder.append(tokens, past, _causal_after(text.shape[1], tokens.shape[1]))
        return self._read(states[:, _OPENING - 1 :])

    def encode_prefix(
        self,
        dot: Int[Array, "B"],
        text_emb: Float[Array, "B E"],
        text: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B Q"], KeyValues]:
        """Runs all that precedes the codes; arguments as in a call.

        Returns:
          The first code's logits, and keys and values [layers, B, L + components + 1, N, K] with room
          for all codes that ``step`` will read.
        """
        past = self._context(text, mask, drop_text)
        opening = self._opening(text_emb, dot, drop_text)
        states, own = self.latent_decoder.append(opening, past, _causal_after(text.shape[1], _OPENING))
        ahead = ((0, 0), (0, 0), (0, self.config.components - 1), (0, 0), (0, 0))
        past = jax.tree.map(lambda old, new: jnp.pad(jnp.concatenate([old, new], axis=2), ahead), past, own)
        return self._read(states[:, -1]), past

    def step(
        self, past: KeyValues, code: Int[Array, "B"], index: Int[Array, ""]
    ) -> tuple[Float[Array, "B Q"], KeyValues]:
        """Reads code number ``index`` (from 0) and returns the next one's logits, and ``past`` with it filled in."""
        start = past.keys.shape[2] - self.config.components + 1  # after the caption and the opening
        token = self._embed(code[:, None], _OPENING + index)
        visible = jnp.arange(past.keys.shape[2]) < start + index
        mask = jnp.append(visible, True)[None, None, None]
        states, own = self.latent_decoder.append(token, past, mask)
        write = jax.lax.dynamic_update_slice_in_dim
        past = jax.tree.map(lambda old, new: write(old, new, start + index, axis=2), past, own)
        return self._read(states[:, 0]), past

    def _context(self, text: jax.Array, mask: jax.Array, drop_text: jax.Array | None) -> KeyValues:
        """Returns the caption as keys and values of every layer, [layers, B, L, N, K]."""
        if drop_text is not None:
            mask = mask & ~drop_text[:, None]
        joined = self.context_kv(self.caption_encoder(text, mask)).transpose(2, 3, 0, 1, 4, 5)
        return KeyValues(joined[:, 0], joined[:, 1])

    def _opening(self, text_emb: jax.Array, dot: jax.Array, drop_text: jax.Array | None) -> jax.Array:
        """Returns the tokens before the codes, [B, 2, D]."""
        tokens = jnp.stack([self.text_emb_proj(text_emb), self.code_embedding(dot)], axis=1)
        if drop_text is not None:
            nulls = jnp.stack([self.null_text_emb, self.null_dot]).astype(tokens.dtype)[None]
            tokens = jnp.where(drop_text[:, None, None], nulls, tokens)
        return tokens + self._positions(0, _OPENING)

    def _embed(self, codes: jax.Array, start: int | jax.Array) -> jax.Array:
        return self.code_embedding(codes) + self._positions(start, codes.shape[1])

    def _positions(self, start: int | jax.Array, length: int) -> jax.Array:
        """Returns the embedding of ``length`` positions from ``start``, [1, length, D]."""
        rows = jax.lax.dynamic_slice_in_dim(self.positional_embedding, start, length)
        return rows.astype(self.config.dtype)[None]

    def _read(self, states: jax.Array) -> jax.Array:
        return self.out_proj(self.ln_final(states).astype(jnp.float32))


def _causal_after(context: int, length: int) -> Bool[Array, "1 1 S R"]:
    """True on the full context and on keys <= query."""
    return jnp.concatenate([jnp.ones((1, 1, length, context), bool), causal_mask(length)], axis=-1)
