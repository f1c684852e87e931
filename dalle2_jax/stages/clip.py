"""CLIP as a stage: the symmetric contrastive loss over the global batch, and the embeddings it lends.

Radford et al. 2021, section 2.3: with unit embeddings z_i, z_t and temperature exp(s) clipped at
100, logits are exp(s) z_i z_t^T over all pairs of the batch, and the loss is the mean of the cross
entropies over rows and over columns. Under jit with a sharded batch the product is over the
global batch: XLA gathers what it needs.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from dalle2_jax.models.clip import Clip, ClipConfig
from dalle2_jax.stages import images
from dalle2_jax.stages.base import Outputs, Variables
from dalle2_jax.types import Batch, Params, UserError

MAX_LOG_SCALE = math.log(100.0)

READ = ("text_emb", "text_seq")
"""What CLIP says of a caption."""

READ_EMPTY = ("null_text_emb", "null_text_seq", "null_mask")
"""What it says of the empty one."""


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """How raw CLIP embeddings are handed to the other stages.

    "unit": to unit length, times ``scale`` (17.2 in Ramesh et al. 2022, App. C, for 1,024
    dimensions: a deviation of 0.54 a dimension, that of pictures in [-1, 1]). "raw": times ``scale``.
    """

    normalisation: str = "unit"
    scale: float = 17.2

    def __post_init__(self) -> None:
        if self.normalisation not in ("unit", "raw"):
            raise UserError(f"embedding.normalisation {self.normalisation!r} is unknown: use 'unit' or 'raw'")

    def apply(self, embedding: Float[Array, "B E"]) -> Float[Array, "B E"]:
        """Maps raw (or predicted) embeddings into the contract's space."""
        return (unit(embedding) if self.normalisation == "unit" else embedding) * self.scale


@dataclasses.dataclass(frozen=True)
class ClipStage:
    """Trains CLIP, and encodes for the stages that borrow it."""

    model: ClipConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    name: str = "clip"
    borrows: tuple[str, ...] = ()

    @property
    def network(self) -> Clip:
        return Clip(self.model)

    def init(self, key: jax.Array) -> Variables:
        """Returns fresh variables."""
        length, vision = self.model.text.context_length, self.model.vision
        text = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)
        if vision is None:
            variables = self.network.init(key, *text, method=Clip.encode_text)
        else:
            variables = self.network.init(key, jnp.zeros((1, vision.image_size, vision.image_size, 3)), *text)
        return Variables(variables["params"], variables.get("batch_stats", {}))

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """CLIP borrows nothing."""
        return batch

    def loss(self, params: Params, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Outputs]:
        """The symmetric contrastive loss; metrics: recall@1 within the batch both ways, temperature."""
        image = self._fit(batch["image"])
        variables = {"params": params} | ({"batch_stats": stats} if stats else {})
        (image_emb, text_emb, _), updated = self.network.apply(
            variables, image, batch["tokens"], batch["mask"], train=True, mutable=["batch_stats"]
        )
        scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOG_SCALE))
        logits = scale * unit(image_emb) @ unit(text_emb).T
        labels = jnp.arange(logits.shape[0])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = 0.5 * (cross_entropy(logits, labels).mean() + cross_entropy(logits.T, labels).mean())
        metrics = {
            "image_to_text": (logits.argmax(axis=1) == labels).astype(jnp.float32).mean(),
            "text_to_image": (logits.argmax(axis=0) == labels).astype(jnp.float32).mean(),
            "temperature": scale,
        }
        return loss, Outputs(metrics, updated.get("batch_stats", stats))

    def encode_image(self, variables: Variables, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Embeds square pictures of any size, in the contract's space."""
        return self.embedding.apply(self._apply(variables, self._fit(image), method=Clip.encode_image))

    def read(self, variables: Variables, batch: Batch) -> Batch:
        """Returns what CLIP says of a batch's captions: text_emb in the contract's space, and text_seq.

        Captions encoded for another context than CLIP's are cut, the last token still the end token, or padded.
        """
        tokens, mask = fit_captions(batch["tokens"], batch["mask"], self.model.text.context_length)
        text_emb, text_seq = self._apply(variables, tokens, mask, method=Clip.encode_text)
        return {"text_emb": self.embedding.apply(text_emb), "text_seq": text_seq}

    def read_empty(self, variables: Variables, batch: Batch) -> Batch:
        """Returns what CLIP says of the empty caption, a row for each of the batch's: `READ_EMPTY`.

        The mask has the batch's own length, the states have CLIP's.
        """
        tokens, mask = empty_captions(batch["tokens"], batch["mask"])
        said = self.read(variables, {"tokens": tokens[:1], "mask": mask[:1]})
        rows = {f"null_{name}": jnp.repeat(row, len(tokens), axis=0) for name, row in said.items()}
        return {**rows, "null_mask": mask}

    def complete(self, variables: Variables | None, batch: Batch, names: tuple[str, ...]) -> Batch:
        """Returns the batch with those of ``names`` that it lacks, of "image_emb", `READ` and `READ_EMPTY`.

        CLIP is asked for those alone: where none is lacking, ``variables`` may be None. Nothing is overwritten.
        """
        missing, added = {*names} - {*batch}, {}
        if "image_emb" in missing:
            added["image_emb"] = self.encode_image(variables, batch["image"])
        if missing.intersection(READ):
            added |= self.read(variables, batch)
        if missing.intersection(READ_EMPTY):
            added |= self.read_empty(variables, batch)
        return {**added, **batch}

    def _apply(self, variables: Variables, *args, method):
        tree = {"params": variables.params} | ({"batch_stats": variables.stats} if variables.stats else {})
        return self.network.apply(tree, *args, method=method)

    def _fit(self, image: jax.Array) -> jax.Array:
        """UserError for a CLIP without an image tower."""
        return images.resize(images.to_float(image), self.model.tower.image_size)


def fit_captions(
    tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], length: int
) -> tuple[Int[Array, "B l"], Bool[Array, "B l"]]:
    """Cuts or pads captions to ``length`` tokens as the tokenizer would have, the end token last."""
    missing = length - tokens.shape[1]
    if missing >= 0:
        return jnp.pad(tokens, ((0, 0), (0, missing))), jnp.pad(mask, ((0, 0), (0, missing)))
    end = jnp.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)
    last = jnp.where(mask[:, length:].any(axis=1, keepdims=True), end, tokens[:, length - 1 : length])
    return jnp.concatenate([tokens[:, : length - 1], last], axis=1), mask[:, :length]


def empty_captions(tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Returns the empty caption for each of the batch's: its begin token, its end token, and padding (id 0)."""
    end = jnp.take_along_axis(tokens, mask.sum(axis=1, keepdims=True) - 1, axis=1)
    empty = jnp.pad(jnp.concatenate([tokens[:, :1], end], axis=1), ((0, 0), (0, tokens.shape[1] - 2)))
    return empty, jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < 2, tokens.shape)


def without_captions(condition: Mapping[str, jax.Array], absent: Bool[Array, "B"]) -> dict[str, jax.Array]:
    """Returns text_emb, text and mask of a condition, the empty caption's (its "null_" parts) where one is absent."""

    def chosen(name: str) -> jax.Array:
        value = condition[name]
        return jnp.where(absent.reshape(-1, *(1,) * (value.ndim - 1)), condition[f"null_{name}"], value)

    return {name: chosen(name) for name in ("text_emb", "text", "mask")}


def unit(embedding: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scales rows to unit length; a zero row stays zero and its gradient finite."""
    squares = jnp.sum(jnp.square(embedding), axis=-1, keepdims=True)
    return embedding * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
