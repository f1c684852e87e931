"""The prior's network: from a caption and its CLIP text embedding to a CLIP image embedding.

Ramesh et al. 2022, section 2.2: a causal transformer over the sequence

    [encoded text (L) | CLIP text embedding | timestep | noised CLIP image embedding | query]

whose output at the query is the predicted image embedding. Its width is independent of
CLIP's. Positions are learned, L + 4 of them. Padded text is hidden; the last four never are.

A prior that goes from noise to the embedding at once (ECLIPSE, Patel et al. 2023, arXiv 2312.04655,
section 3.2) needs no timestep: without ``time_token`` that token is missing, and its position.

"Encoded text" is a token embedding of the prior's own (``text_input="tokens"``, the paper) or a
projection of frozen CLIP's final text states (``text_input="clip"``, Karlo).

The text prefix, L + 1 tokens, attends to neither the noised embedding nor the timestep: a sampler
computes its keys and values once (``encode_prefix``) and then runs three tokens a step (``denoise``).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.attention import KeyValues
from dalle2_jax.models.layers import LayerNorm, TimeMLP
from dalle2_jax.models.transformer import Transformer, TransformerConfig, causal_mask
from dalle2_jax.ranges import Depth, Length, VocabSize, Width


@dataclass(frozen=True)
class PriorConfig:
    """The prior's transformer and its inputs.

    Raises:
      UserError: ``text_input`` without the field it needs (vocab_size or text_width).
    """

    width: Width = 512
    layers: Depth = 12
    heads: Depth = 8
    embed_dim: Width = 512  # CLIP's
    context_length: Length = 77
    text_input: str = "tokens"  # or "clip"
    vocab_size: VocabSize | None = None  # for "tokens"
    text_width: Width | None = None  # for "clip": width of CLIP's text states
    learned_null: bool = True  # False: the caller encodes the empty caption instead (Karlo)
    activation: str = "gelu"
    final_norm: bool = True
    time_token: bool = True
    remat: str = "none"
    dtype: str = "float32"

    # The stage also uses these members of any prior's config, besides embed_dim, context_length, text_input, text_width
    # and learned_null.

    drops: ClassVar[tuple[str, ...]] = ("text",)  # parts that may be absent, each a drop_* of the network
    embed_length: ClassVar[float | None] = None  # of the embeddings it is made for; None: as the contract has them
    hidden_token: ClassVar[int | None] = None  # a token that is hidden wherever it stands
    timesteps: ClassVar[int | None] = None  # how many it tells apart; None: any

    def __post_init__(self) -> None:
        if self.text_input not in ("tokens", "clip"):
            raise UserError(f"unknown text_input {self.text_input!r}: choose 'tokens' or 'clip'")
        needed = "vocab_size" if self.text_input == "tokens" else "text_width"
        if getattr(self, needed) is None:
            raise UserError(f"a prior with text_input {self.text_input!r} needs {needed}")
        self.transformer()

    @property
    def tail(self) -> int:
        """Tokens that change from step to step: timestep, noised embedding, query."""
        return 3 if self.time_token else 2

    def transformer(self) -> TransformerConfig:
        """Returns the transformer's own config."""
        return TransformerConfig(
            self.width, self.layers, self.heads, self.activation, remat=self.remat, dtype=self.dtype
        )


class PriorCache(NamedTuple):
    """The text prefix of a sample, ready for any number of ``denoise`` calls."""

    past: KeyValues  # [layers, B, L + 1, N, K] each
    mask: jax.Array  # bool[B, L + 1], false on padded text


class PriorNetwork(nn.Module):
    """Predicts the un-noised image embedding.

    Params: ``token_embedding`` or ``text_seq_proj``; ``text_emb_proj``, ``time_mlp`` (with a time
    token), ``image_emb_proj``; ``query`` [D], ``positional_embedding`` [L + 1 + tail, D]; ``null_text``
    [D] and ``null_text_emb`` [D] if ``learned_null``; ``transformer``, ``ln_final``, ``out_proj``.
    """

    config: PriorConfig

    def setup(self) -> None:
        config, normal = self.config, linear.normal
        if config.text_input == "tokens":
            self.token_embedding = nn.Embed(
                cast(int, config.vocab_size), config.width, dtype=config.dtype, embedding_init=normal(0.02)
            )
        else:
            self.text_seq_proj = linear.Dense(config.width, dtype=config.dtype)
        self.text_emb_proj = linear.Dense(config.width, dtype=config.dtype)
        if config.time_token:
            self.time_mlp = TimeMLP(config.width, config.width, config.dtype)
        self.image_emb_proj = linear.Dense(config.width, dtype=config.dtype)
        self.query = self.param("query", normal(0.02), (config.width,))
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.01), (config.context_length + 1 + config.tail, config.width)
        )
        if config.learned_null:
            self.null_text = self.param("null_text", normal(0.02), (config.width,))
            self.null_text_emb = self.param("null_text_emb", normal(0.02), (config.width,))
        self.transformer = Transformer(config.transformer())
        if config.final_norm:
            self.ln_final = LayerNorm(config.dtype)
        self.out_proj = linear.Dense(config.embed_dim, dtype=config.dtype)

    def __call__(
        self,
        x_t: Float[Array, "B E"],
        t: Int[Array, "B"],
        text_emb: Float[Array, "B E"],
        text: Int[Array, "B L"] | Float[Array, "B L Dt"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B E"]:
        """Evaluates the full sequence, for training.

        Args:
          x_t: noised image embeddings, in the space of the embedding contract.
          t: original timesteps, 0..T-1; of no matter without a time token.
          text_emb: CLIP text embeddings.
          text: token ids for "tokens", CLIP's final text states for "clip".
          mask: true on the caption, false on padding.
          drop_text: true where learned null embeddings replace all that comes from the caption.

        Returns:
          The predicted image embeddings, float32[B, E].

        Raises:
          UserError: a caption of another length than context_length, or drop_text without
            learned_null.
        """
        prefix, visible = self._prefix(text_emb, text, mask, drop_text)
        tail = self._tail(x_t, t)
        visible = jnp.concatenate([visible, jnp.ones((x_t.shape[0], self.config.tail), bool)], axis=1)
        sequence = jnp.concatenate([prefix, tail], axis=1)
        return self._read(self.transformer(sequence, _attention_mask(visible)))

    def encode_prefix(
        self,
        text_emb: Float[Array, "B E"],
        text: Int[Array, "B L"] | Float[Array, "B L Dt"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
    ) -> PriorCache:
        """Runs the tokens that no step changes; arguments as in a call."""
        prefix, visible = self._prefix(text_emb, text, mask, drop_text)
        return PriorCache(self.transformer.prefill(prefix, _attention_mask(visible))[1], visible)

    def denoise(self, cache: PriorCache, x_t: Float[Array, "B E"], t: Int[Array, "B"]) -> Float[Array, "B E"]:
        """Predicts from the cached prefix; equals a call with the arguments that made the cache."""
        visible = jnp.concatenate([cache.mask, jnp.ones((x_t.shape[0], self.config.tail), bool)], axis=1)
        mask = _attention_mask(visible)[:, :, -self.config.tail :]
        return self._read(self.transformer.extend(self._tail(x_t, t), cache.past, mask))

    def _prefix(
        self, text_emb: jax.Array, text: jax.Array, mask: jax.Array, drop_text: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens [B, L + 1, D], whether they are visible bool[B, L + 1])."""
        config = self.config
        if text.shape[1] != config.context_length:
            raise UserError(
                f"{text.shape[1]} tokens a caption but the prior's context_length is {config.context_length}"
            )
        states = self.token_embedding(text) if config.text_input == "tokens" else self.text_seq_proj(text)
        summary = self.text_emb_proj(text_emb)[:, None]
        if drop_text is not None:
            if not config.learned_null:
                raise UserError("this prior has no learned null embedding: encode the empty caption instead")
            dropped = drop_text[:, None, None]
            states = jnp.where(dropped, self.null_text.astype(config.dtype)[None, None], states)
            summary = jnp.where(dropped, self.null_text_emb.astype(config.dtype)[None, None], summary)
            mask = mask | drop_text[:, None]  # a caption's length would tell of it
        tokens = jnp.concatenate([states, summary], axis=1)
        visible = jnp.concatenate([mask, jnp.ones((mask.shape[0], 1), bool)], axis=1)
        return tokens + self.positional_embedding[: -config.tail].astype(config.dtype)[None], visible

    def _tail(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the tokens of a step, [B, tail, D]."""
        config, dtype = self.config, self.config.dtype
        query = jnp.broadcast_to(self.query.astype(dtype), (x_t.shape[0], config.width))
        time = [self.time_mlp(t)] if config.time_token else []
        tokens = jnp.stack([*time, self.image_emb_proj(x_t), query], axis=1)
        return tokens + self.positional_embedding[-config.tail :].astype(dtype)[None]

    def _read(self, states: jax.Array) -> jax.Array:
        last = states[:, -1]
        if self.config.final_norm:
            last = self.ln_final(last)
        return self.out_proj(last).astype(jnp.float32)


def _attention_mask(visible: Bool[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """Causal, and only visible keys."""
    return causal_mask(visible.shape[1]) & visible[:, None, None, :]
