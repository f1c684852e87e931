"""LAION's prior: the diffusion prior of the open DALLE2-pytorch checkpoints.

The same question as ``models.priors.prior`` and the same order of tokens,

    [encoded text (L) | CLIP text embedding | timestep | noised CLIP image embedding | query],

but another network: as wide as CLIP's embedding, so that CLIP's final text states, its text embedding
and the noised image embedding are tokens as they are; a table of timesteps; ``models.multi_query`` as
the transformer. Embeddings are of unit length, and only the image embedding is scaled by sqrt(width).

What stands in for absent text depends on the library's version that trained the weights (``nulls``):

    "learned"  1.9 and later. Padding and dropped text become null tokens, one for each place; a dropped
               text embedding another one; a dropped image embedding a third one. Guidance there drops the
               text and the *noised image* together: ``drop_image``.
    "padding"  0.23.1 to 1.8.4. Padding becomes null tokens; text was never dropped (a fault of theirs),
               so the caller encodes the empty caption instead.
    "hidden"   before. Padding, and all of a dropped text, is hidden from attention.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.multi_query import MultiQueryConfig, MultiQueryTransformer, unit
from dalle2_jax.models.priors.prior import PriorCache
from dalle2_jax.ranges import Depth, DiffusionSteps, Length, Range, Width

_NULLS = ("learned", "padding", "hidden")


@dataclass(frozen=True)
class LaionPriorConfig:
    """The network's sizes and parts; the defaults are those of the library's own largest example.

    All but ``attention`` (see ``models.multi_query``) can be read from a checkpoint's tensors.

    Raises:
      UserError: unknown ``nulls`` or ``attention``, or rotary positions in heads of odd width.
    """

    width: Width = 768  # CLIP's embeddings and text states have it too
    layers: Depth = 24
    heads: Depth = 32
    head_width: Width = 64
    mlp_width: Annotated[int, Range(1, 1_000_000)] = 3072
    context_length: Length = 77  # the most tokens of a caption; shorter ones are padded
    timesteps: DiffusionSteps | None = 1000  # rows of the learned table; None: sinusoids of any timestep, and an MLP
    text_tokens: Depth = 1  # tokens made of the text embedding, of the timestep, of the noised image embedding
    time_tokens: Depth = 1
    image_tokens: Depth = 1
    normformer: bool = True
    rotary: bool = True
    norm_in: bool = False
    norm_out: bool = True
    final_proj: bool = True
    nulls: str = "learned"
    attention: str = "cosine"
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.nulls not in _NULLS:
            raise UserError(f"unknown nulls {self.nulls!r}: choose one of {', '.join(_NULLS)}")
        self.transformer()

    def transformer(self) -> MultiQueryConfig:
        """Returns the transformer's own config."""
        return MultiQueryConfig(**{field.name: getattr(self, field.name) for field in fields(MultiQueryConfig)})

    # What the stage asks of any prior's config.

    text_input: ClassVar[str] = "clip"  # the network's input are CLIP's final text states
    hidden_token: ClassVar[int | None] = 0  # taken for padding, though in CLIP's vocabulary it is "!"

    @property
    def drops(self) -> tuple[str, ...]:
        """Parts that may be absent."""
        return {"learned": ("image", "text"), "padding": (), "hidden": ("text",)}[self.nulls]

    @property
    def embed_length(self) -> float:
        """Length of the image embeddings that are noised."""
        return math.sqrt(self.width)

    @property
    def embed_dim(self) -> int:
        """Width of CLIP's embeddings."""
        return self.width

    @property
    def text_width(self) -> int:
        """Width of CLIP's text states."""
        return self.width

    @property
    def learned_null(self) -> bool:
        """Whether the network itself can go without text."""
        return self.nulls != "padding"


class LaionPriorNetwork(nn.Module):
    """Predicts the un-noised image embedding, unit x sqrt(width).

    Params: ``time_embedding`` [T, D] or ``time_mlp``; ``text_emb_proj`` and ``image_emb_proj`` where they make more
    than one token; ``query`` [D]; ``null_text`` [L, D] unless padding is hidden; ``null_text_emb`` [tokens, D] and
    ``null_image_emb`` [D] if learned; ``transformer``; ``out_proj`` kernel [D, D] if ``final_proj``.
    """

    config: LaionPriorConfig

    def setup(self) -> None:
        config, normal = self.config, linear.normal(1.0)  # as the embeddings between which these stand
        if config.timesteps is None:
            self.time_mlp = SinusoidMLP(config.width, config.time_tokens * config.width, config.dtype)
        else:
            self.time_embedding = nn.Embed(
                config.timesteps, config.time_tokens * config.width, dtype=config.dtype, embedding_init=normal
            )
        if config.text_tokens > 1:
            self.text_emb_proj = linear.Dense(config.text_tokens * config.width, dtype=config.dtype)
        if config.image_tokens > 1:
            self.image_emb_proj = linear.Dense(config.image_tokens * config.width, dtype=config.dtype)
        self.query = self.param("query", normal, (config.width,))
        if config.nulls != "hidden":
            self.null_text = self.param("null_text", normal, (config.context_length, config.width))
        if config.nulls == "learned":
            self.null_text_emb = self.param("null_text_emb", normal, (config.text_tokens, config.width))
            self.null_image_emb = self.param("null_image_emb", normal, (config.width,))
        self.transformer = MultiQueryTransformer(config.transformer())
        if config.final_proj:
            self.out_proj = linear.Dense(config.width, use_bias=False, dtype=config.dtype)

    def __call__(
        self,
        x_t: Float[Array, "B D"],
        t: Int[Array, "B"],
        text_emb: Float[Array, "B D"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
        drop_image: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Evaluates the full sequence, for training.

        Args:
          x_t: noised image embeddings, unit length x sqrt(D) before the noise.
          t: original timesteps, 0..T-1.
          text_emb: CLIP text embeddings, of any length: only their direction is read.
          text: CLIP's final text states, at most context_length of them.
          mask: true on the caption (its end token included), false on padding.
          drop_text: true where the network goes without all that comes from the caption.
          drop_image: true where a learned null embedding replaces the noised image embedding.

        Returns:
          The predicted image embeddings, float32[B, D].

        Raises:
          UserError: a caption longer than context_length, or something dropped that the network has no null for.
        """
        prefix, visible = self._prefix(text_emb, text, mask, drop_text)
        tail = self._tail(x_t, t, drop_image)
        visible = _and_tail(visible, tail)
        return self._read(self.transformer(jnp.concatenate([prefix, tail], axis=1), visible))

    def encode_prefix(
        self,
        text_emb: Float[Array, "B D"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        drop_text: Bool[Array, "B"] | None = None,
    ) -> PriorCache:
        """Runs the tokens that no step changes; arguments as in a call."""
        prefix, visible = self._prefix(text_emb, text, mask, drop_text)
        return PriorCache(self.transformer.prefill(prefix, visible)[1], visible)

    def denoise(
        self,
        cache: PriorCache,
        x_t: Float[Array, "B D"],
        t: Int[Array, "B"],
        drop_image: Bool[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Predicts from the cached prefix; equals a call with the arguments that made the cache."""
        tail = self._tail(x_t, t, drop_image)
        return self._read(self.transformer.extend(tail, cache.past, _and_tail(cache.mask, tail)))

    def _prefix(
        self, text_emb: jax.Array, text: jax.Array, mask: jax.Array, drop_text: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens [B, L + text_tokens, D], whether they are visible bool[B, L + text_tokens])."""
        config, missing = self.config, self.config.context_length - text.shape[1]
        if missing < 0:
            raise UserError(
                f"{text.shape[1]} tokens a caption but the prior's context_length is {config.context_length}"
            )
        if drop_text is not None and not config.learned_null:
            raise UserError("this prior was never without text: encode the empty caption instead of dropping it")
        dtype, batch = config.dtype, text.shape[0]
        drop = jnp.zeros(batch, bool) if drop_text is None else drop_text
        states = jnp.pad(text.astype(dtype), ((0, 0), (0, missing), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (0, missing))) & ~drop[:, None]
        direction = unit(text_emb).astype(dtype)
        projected = self.text_emb_proj(direction) if config.text_tokens > 1 else direction
        summary = projected.reshape(batch, config.text_tokens, config.width)
        if config.nulls != "hidden":
            states = jnp.where(mask[:, :, None], states, self.null_text.astype(dtype)[None])
            mask = jnp.ones_like(mask)
        if config.nulls == "learned":
            summary = jnp.where(drop[:, None, None], self.null_text_emb.astype(dtype)[None], summary)
            drop = jnp.zeros_like(drop)
        visible = jnp.broadcast_to(~drop[:, None], (batch, config.text_tokens))
        return jnp.concatenate([states, summary], axis=1), jnp.concatenate([mask, visible], axis=1)

    def _tail(self, x_t: jax.Array, t: jax.Array, drop_image: jax.Array | None) -> jax.Array:
        """Returns the tokens of a step, [B, time_tokens + image_tokens + 1, D]."""
        config = self.config
        batch, dtype, width = x_t.shape[0], config.dtype, config.width
        time = self.time_mlp(t) if config.timesteps is None else self.time_embedding(t)
        image = self.image_emb_proj(x_t) if config.image_tokens > 1 else x_t.astype(dtype)
        image = image.reshape(batch, config.image_tokens, width)
        if drop_image is not None:
            if config.nulls != "learned":
                raise UserError("this prior has no null image embedding: it cannot go without the noised image")
            image = jnp.where(drop_image[:, None, None], self.null_image_emb.astype(dtype)[None, None], image)
        query = jnp.broadcast_to(self.query.astype(dtype), (batch, 1, width))
        return jnp.concatenate([time.reshape(batch, config.time_tokens, width), image, query], axis=1)

    def _read(self, states: jax.Array) -> jax.Array:
        last = states[:, -1]
        return (self.out_proj(last) if self.config.final_proj else last).astype(jnp.float32)


class SinusoidMLP(nn.Module):
    """Timestep to embedding without a table: sinusoids, sines first, and two hidden layers of twice the features.

    Frequency i of ``half = frequencies // 2`` is 10000^(-i / (half - 1)). Params: ``fc_1``, ``fc_2``, ``fc_3``.
    """

    frequencies: int
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t: Int[Array, "B"]) -> Float[Array, "B D"]:
        half = self.frequencies // 2
        rates = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
        angles = t.astype(jnp.float32)[:, None] * rates[None]
        h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(self.dtype)
        h = nn.silu(linear.Dense(2 * self.features, dtype=self.dtype, name="fc_1")(h))
        h = nn.silu(linear.Dense(2 * self.features, dtype=self.dtype, name="fc_2")(h))
        return linear.Dense(self.features, dtype=self.dtype, name="fc_3")(h)


def _and_tail(visible: jax.Array, tail: jax.Array) -> jax.Array:
    """The tokens of a step are always visible."""
    return jnp.concatenate([visible, jnp.ones(tail.shape[:2], bool)], axis=1)
