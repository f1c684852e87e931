"""The decoder's network: a U-Net conditioned on a CLIP image embedding and a caption.

Ramesh et al. 2022, section 2.1. The image embedding is projected and added to the time embedding,
and projected to a few extra context tokens that precede the caption's. The caption comes in one
of three ways:

  * ``text_input="tokens"`` (the paper, GLIDE): the decoder's own transformer over the tokens. Its
    last position is projected and added to the time embedding; all positions are context.
    Positions after the caption hold learned padding embeddings and stay visible. An absent
    caption is padding everywhere.
  * ``text_input="clip"`` (Karlo): CLIP's final text states, projected and normalised, are context
    under their mask, and CLIP's text embedding may be projected and added to the time embedding.
    An absent caption is masked and adds nothing; Karlo uses the features of the empty string instead.
  * ``text_input="label"`` (Dhariwal & Nichol 2021, ADM, section 3): one of ``num_classes``, whose
    embedding is added to the time embedding. An absent class adds the mean of all embeddings: ADM
    has no class for "any", so this only stands in for a network that was trained without classes.

With ``image_emb_dim=None`` this is GLIDE, or ADM; with ``text_input=None`` only the image speaks.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.layers import LayerNorm
from dalle2_jax.models.remat import Remat
from dalle2_jax.models.transformer import TextConfig, Transformer
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.ranges import Range, VocabSize, Width


@dataclass(frozen=True)
class DecoderConfig:
    """The U-Net and its conditioning. ``unet.context_dim`` is the width of every context token.

    Raises:
      UserError: parts that do not belong together.
    """

    unet: UNetConfig = UNetConfig(context_dim=512)
    image_emb_dim: Width | None = 512  # width of CLIP's embeddings; None: no image embedding
    image_tokens: Annotated[int, Range(0, 1_000)] = 4
    text_input: str | None = None  # "tokens", "clip", "label" or None
    text: TextConfig | None = None  # the decoder's own encoder, for "tokens"
    text_width: Width | None = None  # width of CLIP's text states, for "clip"
    text_emb_proj: bool = False  # for "clip": CLIP's text embedding is added to the time embedding
    num_classes: VocabSize | None = None  # for "label"

    def __post_init__(self) -> None:
        if self.text_input not in ("tokens", "clip", "label", None):
            raise UserError(f"unknown text_input {self.text_input!r}: choose 'tokens', 'clip', 'label' or None")
        if (self.text_input == "tokens") != (self.text is not None):
            raise UserError("a decoder has a text encoder (text) if and only if text_input is 'tokens'")
        if (self.text_input == "clip") != (self.text_width is not None):
            raise UserError("a decoder has a text_width if and only if text_input is 'clip'")
        if (self.text_input == "label") != (self.num_classes is not None):
            raise UserError("a decoder has num_classes if and only if text_input is 'label'")
        if self.text_emb_proj and self.text_input != "clip":
            raise UserError("text_emb_proj needs text_input 'clip'")
        if self.has_context != (self.unet.context_dim is not None):
            raise UserError("set unet.context_dim if and only if there are image tokens or a caption to attend to")

    @property
    def text_length(self) -> int | None:
        """Length of captions that the decoder encodes itself; 1 for a class, None for neither."""
        if self.text_input == "label":
            return 1
        return self.text.context_length if self.text is not None and self.text_input == "tokens" else None

    @property
    def has_context(self) -> bool:
        """Whether there are any context tokens."""
        return self.text_input in ("tokens", "clip") or (self.image_emb_dim is not None and self.image_tokens > 0)


class Condition(NamedTuple):
    """The encoded condition of the U-Net, computed once a sample, not once a step.

    A tree of arrays, so two conditions are joined along the batch by jax.tree.map. Parts that a
    decoder does not have are None.
    """

    emb: jax.Array | None  # [B, unet.time_dim], added to the time embedding
    context: jax.Array | None  # [B, S, unet.context_dim]
    mask: jax.Array | None  # bool[B, S]; None shows every token


class CaptionEncoder(nn.Module):
    """GLIDE's text path: a bidirectional transformer in which padding is learned, not hidden.

    Params: ``token_embedding``, ``positional_embedding`` and ``padding_embedding`` [L, D],
    ``transformer``, ``ln_final``.
    """

    config: TextConfig
    remat: Remat
    dtype: str

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None) -> Float[Array, "B L D"]:
        config, normal = self.config, linear.normal
        shape = (config.context_length, config.width)
        if tokens.shape[1] != config.context_length:
            raise UserError(
                f"{tokens.shape[1]} tokens a caption but the decoder's context_length is {config.context_length}"
            )
        x = nn.Embed(
            config.vocab_size, config.width, dtype=self.dtype, embedding_init=normal(0.02), name="token_embedding"
        )(tokens)
        x = x + self.param("positional_embedding", normal(0.01), shape).astype(self.dtype)[None]
        padding = self.param("padding_embedding", normal(0.01), shape).astype(self.dtype)[None]
        if mask is not None:
            x = jnp.where(mask[:, :, None], x, padding)
        x = Transformer(config.transformer(self.remat, self.dtype), name="transformer")(x)
        return LayerNorm(self.dtype, name="ln_final")(x)


class DecoderNetwork(nn.Module):
    """Conditioning and U-Net. ``__call__`` is for training; sampling encodes once and denoises often.

    Params: ``unet``; for the image ``null_image_emb`` [E], ``image_emb_proj``, ``image_token_proj``
    (kernel [E, tokens, Dc]); for the caption ``caption_encoder``, ``caption_emb_proj`` and, where
    widths differ, ``caption_context_proj``; or ``text_seq_proj``, ``text_seq_norm``, ``text_emb_proj``;
    or ``label_embedding`` [classes, time_dim].
    """

    config: DecoderConfig

    def setup(self) -> None:
        config, unet = self.config, self.config.unet

        def dense(features: int) -> nn.Dense:
            return linear.Dense(features, dtype=unet.dtype)

        self.unet = UNet(unet)
        context_dim = cast(int, unet.context_dim)  # None only without context
        if config.image_emb_dim is not None:
            self.null_image_emb = self.param("null_image_emb", nn.initializers.zeros, (config.image_emb_dim,))
            self.image_emb_proj = dense(unet.time_dim)
            if config.image_tokens:
                self.image_token_proj = linear.DenseGeneral((config.image_tokens, context_dim), dtype=unet.dtype)
        if config.text is not None and config.text_input == "tokens":
            self.caption_encoder = CaptionEncoder(config.text, unet.remat, unet.dtype)
            self.caption_emb_proj = dense(unet.time_dim)
            if config.text.width != context_dim:
                self.caption_context_proj = dense(context_dim)
        elif config.text_input == "clip":
            self.text_seq_proj = dense(context_dim)
            self.text_seq_norm = LayerNorm(unet.dtype)
            if config.text_emb_proj:
                self.text_emb_proj = dense(unet.time_dim)
        elif config.text_input == "label":
            self.label_embedding = nn.Embed(
                cast(int, config.num_classes),
                unet.time_dim,
                dtype=unet.dtype,
                embedding_init=linear.normal(1.0),
            )

    def encode_condition(
        self,
        image_emb: Float[Array, "B E"] | None,
        text_emb: Float[Array, "B Et"] | None = None,
        text: Int[Array, "B L"] | Float[Array, "B L Dt"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
        drop_image: Bool[Array, "B"] | None = None,
        drop_text: Bool[Array, "B"] | None = None,
    ) -> Condition:
        """Encodes what does not change from step to step.

        Args:
          image_emb: CLIP image embeddings, in the space of the embedding contract.
          text_emb: CLIP text embeddings, only with ``text_emb_proj``.
          text: token ids for "tokens", CLIP's final text states for "clip", the class [B, 1] for "label".
          mask: true on the caption; None is true everywhere.
          drop_image: true where the learned null embedding replaces the image's.
          drop_text: true where the caption is absent.

        Returns:
          The Condition, in the compute dtype.
        """
        added, tokens, visible = [], [], []
        if self.config.image_emb_dim is not None:
            image_emb = cast(jax.Array, image_emb)
            if drop_image is not None:
                image_emb = jnp.where(drop_image[:, None], self.null_image_emb[None], image_emb)
            added.append(self.image_emb_proj(image_emb))
            if self.config.image_tokens:
                tokens.append(self.image_token_proj(image_emb))
                visible.append(jnp.ones(tokens[-1].shape[:2], bool))
        if drop_text is not None and text is not None:
            mask = jnp.ones(text.shape[:2], bool) if mask is None else mask
            mask = mask & ~drop_text[:, None]
        if self.config.text_input == "tokens":
            states = self.caption_encoder(cast(jax.Array, text), mask)
            added.append(self.caption_emb_proj(states[:, -1]))
            same_width = states.shape[-1] == self.config.unet.context_dim
            tokens.append(states if same_width else self.caption_context_proj(states))
            mask = None  # padding is learned here, and visible
        elif self.config.text_input == "clip":
            tokens.append(self.text_seq_norm(self.text_seq_proj(text)))
            if self.config.text_emb_proj:
                added.append(self._text_emb(cast(jax.Array, text_emb), drop_text))
        elif self.config.text_input == "label":
            added.append(self._label_emb(cast(jax.Array, text), mask))
        if self.config.text_input != "clip":
            mask = None
        return Condition(
            emb=sum(added[1:], added[0]) if added else None,
            context=jnp.concatenate(tokens, axis=1) if tokens else None,
            mask=None if mask is None else jnp.concatenate([*visible, mask], axis=1),
        )

    def _text_emb(self, text_emb: jax.Array, drop_text: jax.Array | None) -> jax.Array:
        projected = self.text_emb_proj(text_emb)
        if drop_text is None:
            return projected
        return jnp.where(drop_text[:, None], jnp.zeros((), projected.dtype), projected)

    def _label_emb(self, label: jax.Array, mask: jax.Array | None) -> jax.Array:
        known = self.label_embedding(label[:, 0])
        if mask is None:
            return known
        anyone = self.label_embedding.embedding.mean(axis=0).astype(known.dtype)
        return jnp.where(mask[:, :1], known, anyone[None])

    def denoise(
        self,
        x_t: Float[Array, "B H W Cin"],
        t: Int[Array, "B"],
        condition: Condition,
        train: bool = False,
        noise_level: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H W Cout"]:
        """One evaluation of the U-Net at original timesteps t; float32."""
        return self.unet(x_t, t, condition.emb, condition.context, condition.mask, train, noise_level)

    def __call__(
        self,
        x_t: Float[Array, "B H W Cin"],
        t: Int[Array, "B"],
        image_emb: Float[Array, "B E"] | None,
        text_emb: Float[Array, "B Et"] | None = None,
        text: Int[Array, "B L"] | Float[Array, "B L Dt"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
        drop_image: Bool[Array, "B"] | None = None,
        drop_text: Bool[Array, "B"] | None = None,
        train: bool = False,
        noise_level: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H W Cout"]:
        """``encode_condition`` then ``denoise``: what training differentiates, and what init calls."""
        condition = self.encode_condition(image_emb, text_emb, text, mask, drop_image, drop_text)
        return self.denoise(x_t, t, condition, train, noise_level)
