"""CLIP as a stage: the symmetric contrastive loss over the global batch, and the embeddings for other stages.

Radford et al. 2021, section 2.3: with unit embeddings z_i, z_t and temperature exp(s), logits are
exp(s) z_i z_t^T over all pairs of the batch, and the loss is the mean of the cross entropies over
rows and over columns. Under jit with a sharded batch the product is over the global batch: XLA
gathers what it needs. Section 2.5: s is clipped after every update, so that logits are scaled by
at most 100; weight decay applies to "all weights that are not gains or biases". ``contrastive`` has the loss in parts,
and SigLIP's.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dalle2_jax.errors import UserError
from dalle2_jax.models.clip import Clip, ClipConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.ranges import EmbeddingScale
from dalle2_jax.stages import images
from dalle2_jax.stages.base import Embeddings, Outputs, StageDefaults, TrainingRules, Variables, apply, clip_columns
from dalle2_jax.stages.contract import EmbeddingContract, fingerprint
from dalle2_jax.stages.contrastive import ContrastiveConfig, sigmoid_loss, softmax_loss
from dalle2_jax.stages.held_out import retrieval, unit
from dalle2_jax.types import Batch, Metrics, Params, Preprocessing

MIN_LOG_SCALE, MAX_LOG_SCALE = 0.0, math.log(100.0)
"""Range of the parameter ``logit_scale``. The lower end is that of OpenCLIP's training."""

DECAY_RULES = (
    (r"(^|/)(bias|scale|logit_scale|logit_bias)$", False),
    (r"", True),  # the token, class and positional embeddings too
)
"""CLIP's weight decay (Radford et al. 2021, section 2.5). ``logit_scale`` and ``logit_bias`` are the gain
and bias of the logits."""

CAPTION_FEATURES = ("text_emb", "text_seq")
"""Columns that CLIP computes from a caption."""

NULL_FEATURES = ("null_text_emb", "null_text_seq", "null_mask")
"""Columns that CLIP computes from the empty caption."""


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """How raw CLIP embeddings are scaled for the other stages.

    "unit": to unit length, times ``scale`` (17.2 in Ramesh et al. 2022, App. C, for 1,024
    dimensions: a standard deviation of 0.54 a dimension, as of images in [-1, 1]). "raw": times ``scale``.
    """

    normalisation: str = "unit"
    scale: EmbeddingScale = 17.2

    def __post_init__(self) -> None:
        if self.normalisation not in ("unit", "raw"):
            raise UserError(f"embedding.normalisation {self.normalisation!r} is unknown: use 'unit' or 'raw'")

    def apply(self, embedding: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """Maps raw (or predicted) embeddings into the contract's space."""
        return (unit(embedding) if self.normalisation == "unit" else embedding) * self.scale


@dataclasses.dataclass(frozen=True)
class ClipStage(StageDefaults):
    """Trains CLIP, and computes embeddings for the stages that require it.

    Images on the device are square already; those of another side than CLIP's are resized by the filter of
    ``preprocessing``.
    """

    model: ClipConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    preprocessing: Preprocessing = Preprocessing()
    name: str = "clip"
    objective: ContrastiveConfig = ContrastiveConfig()

    @property
    def network(self) -> Clip:
        return Clip(self.model, self.objective.loss == "sigmoid")

    def init(self, key: jax.Array) -> Variables:
        """Returns initial variables."""
        length, vision = self.model.text.context_length, self.model.vision
        text = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)
        if vision is None:
            variables = self.network.init(key, *text, method=Clip.encode_text)
        else:
            variables = self.network.init(key, jnp.zeros((1, vision.image_size, vision.image_size, 3)), *text)
        return Variables(variables["params"], variables["batch_stats"] if "batch_stats" in variables else {})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Pairs of images and captions."""
        return ("image", "tokens", "mask")

    @property
    def training_rules(self) -> TrainingRules:
        """The range of the temperature, CLIP's weight decay, and the average of a ResNet's batch-norm statistics."""
        if not isinstance(self.model.vision, ResNetConfig):
            return TrainingRules(DECAY_RULES, project=clip_log_scale)
        reason = "the batch norm of a ResNet tower normalises over the whole batch"
        return TrainingRules(DECAY_RULES, ("visual",), clip_log_scale, reason)

    def loss(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> tuple[jax.Array, Outputs]:
        """Returns the loss of ``objective``; metrics: recall@1 in the batch in both directions, temperature."""
        image = self._fit(batch["image"])
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        (image_emb, text_emb, _), updated = self.network.apply(
            variables, image, batch["tokens"], batch["mask"], train=True, mutable=["batch_stats"]
        )
        stats = updated["batch_stats"] if "batch_stats" in updated else stats
        return self.contrast(params, stats, frozen, {"image_emb": image_emb, "text_emb": text_emb})

    @property
    def contrastive(self) -> bool:
        """Each image is compared with all captions of the batch."""
        return True

    def embed(self, params: Params, stats: Params, frozen: Mapping[str, Variables], batch: Batch) -> Embeddings:
        """Returns raw image_emb and text_emb of a batch, as in training."""
        args = self._fit(batch["image"]), batch["tokens"], batch["mask"]
        image_emb, text_emb, _ = apply(self.network, params, *args, train=True)
        return {"image_emb": image_emb, "text_emb": text_emb}

    def contrast(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], embeddings: Embeddings
    ) -> tuple[jax.Array, Outputs]:
        """Returns the loss of raw embeddings of a batch; metrics as of `loss`."""
        image_emb, text_emb = embeddings["image_emb"], embeddings["text_emb"]
        # Imported weights, and the base weights of a LoRA, may be above the maximum. The value is clipped but not its
        # gradient, which would otherwise vanish and leave the temperature above the maximum.
        log_scale = params["logit_scale"]
        clipped = jax.lax.stop_gradient(jnp.clip(log_scale, MIN_LOG_SCALE, MAX_LOG_SCALE))
        scale = jnp.exp(clipped + (log_scale - jax.lax.stop_gradient(log_scale)))
        if self.objective.loss == "sigmoid":
            contrast = sigmoid_loss(unit(image_emb), unit(text_emb), scale, params["logit_bias"])
        else:
            contrast = softmax_loss(unit(image_emb), unit(text_emb), scale, self.objective.chunks)
        metrics = {
            "image_to_text": contrast.image_to_text.astype(jnp.float32).mean(),
            "text_to_image": contrast.text_to_image.astype(jnp.float32).mean(),
            "temperature": scale,
        }
        return contrast.loss, Outputs(metrics, stats)

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns recall@5 among the images and captions of the batch."""
        image_emb = self.encode_image(variables, batch["image"])
        return retrieval(image_emb, self.encode_text(variables, batch)["text_emb"])

    def contract(self, params: Params) -> EmbeddingContract:
        """Returns the embedding contract of these weights."""
        scaling = self.embedding.normalisation, self.embedding.scale
        return EmbeddingContract(fingerprint(params), self.model.embed_dim, *scaling, self.preprocessing)

    def encode_image(self, variables: Variables, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Returns embeddings of square images of any size, in the space of the embedding contract."""
        return self.embedding.apply(self._apply(variables, self._fit(image), method=Clip.encode_image))

    def encode_text(self, variables: Variables, batch: Batch) -> Batch:
        """Returns text_emb, in the space of the embedding contract, and text_seq of a batch's captions.

        Captions encoded for another context length than CLIP's are padded, or truncated before their end token.
        """
        tokens, mask = fit_captions(batch["tokens"], batch["mask"], self.model.text.context_length)
        text_emb, text_seq = self._apply(variables, tokens, mask, method=Clip.encode_text)
        return {"text_emb": self.embedding.apply(text_emb), "text_seq": text_seq}

    def encode_empty(self, variables: Variables, batch: Batch) -> Batch:
        """Returns `NULL_FEATURES`, those of the empty caption, repeated for each example of the batch.

        The mask has the length of the batch's captions, null_text_seq has CLIP's context length.
        """
        tokens, mask = empty_captions(batch["tokens"], batch["mask"])
        features = self.encode_text(variables, {"tokens": tokens[:1], "mask": mask[:1]})
        text_emb, text_seq = (jnp.repeat(features[name], len(tokens), axis=0) for name in CAPTION_FEATURES)
        return Batch(null_text_emb=text_emb, null_text_seq=text_seq, null_mask=mask)

    def complete(self, variables: Variables | None, batch: Batch, names: tuple[str, ...]) -> Batch:
        """Returns the batch with the columns of ``names`` that CLIP computes; existing columns are not overwritten.

        ``variables`` may be None where no column is missing.
        """
        missing = {*clip_columns(names)} - {*batch}
        if not missing:
            return batch
        if variables is None:
            raise ValueError(f"CLIP's variables are needed to compute {', '.join(sorted(missing))}")
        added = Batch()
        if "image_emb" in missing:
            added["image_emb"] = self.encode_image(variables, batch["image"])
        if missing.intersection(CAPTION_FEATURES):
            added.update(self.encode_text(variables, batch))
        if missing.intersection(NULL_FEATURES):
            added.update(self.encode_empty(variables, batch))
        return {**added, **batch}

    def _apply(self, variables: Variables, *args: jax.Array, method: Callable[..., Any]) -> Any:
        tree = {"params": variables.params} | ({"batch_stats": variables.stats} if variables.stats else {})
        return self.network.apply(tree, *args, method=method)

    def _fit(self, image: jax.Array) -> jax.Array:
        """Returns images at the size of CLIP's input; UserError for a CLIP without an image tower."""
        return images.resize(images.to_float(image), self.model.tower.image_size, self.preprocessing.resample)


def clip_log_scale(params: Params) -> Params:
    """Returns CLIP's parameters with ``logit_scale`` clipped to [`MIN_LOG_SCALE`, `MAX_LOG_SCALE`]."""
    return {**params, "logit_scale": jnp.clip(params["logit_scale"], MIN_LOG_SCALE, MAX_LOG_SCALE)}


def fit_captions(
    tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], length: int
) -> tuple[Int[Array, "B l"], Bool[Array, "B l"]]:
    """Truncates or pads captions to ``length`` tokens as the tokenizer does; the last token stays the end token."""
    missing = length - tokens.shape[1]
    if missing >= 0:
        return jnp.pad(tokens, ((0, 0), (0, missing))), jnp.pad(mask, ((0, 0), (0, missing)))
    end = jnp.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)
    last = jnp.where(mask[:, length:].any(axis=1, keepdims=True), end, tokens[:, length - 1 : length])
    return jnp.concatenate([tokens[:, : length - 1], last], axis=1), mask[:, :length]


def empty_captions(tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns the empty caption for each caption of a batch: begin token, end token, and padding (id 0)."""
    end = jnp.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)
    empty = jnp.pad(jnp.concatenate([tokens[:, :1], end], axis=1), ((0, 0), (0, tokens.shape[1] - 2)))
    return empty, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < 2, tokens.shape)


def without_captions(condition: Mapping[str, jax.Array], absent: Bool[Array, "B"]) -> dict[str, jax.Array]:
    """Returns text_emb, text and mask of a condition, replaced by its "null_" parts where a caption is absent."""

    def select(name: str) -> jax.Array:
        value = condition[name]
        return jnp.where(absent.reshape(-1, *(1,) * (value.ndim - 1)), condition[f"null_{name}"], value)

    return {name: select(name) for name in ("text_emb", "text", "mask")}
