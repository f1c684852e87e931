"""What is measured of held-out embeddings while CLIP or a prior is trained."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.types import Batch, Metrics

SAMPLED = 64
"""Maximum number of embeddings of a batch that a prior samples."""


def unit(embedding: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scales rows to unit length; a zero row stays zero and its gradient finite."""
    squares = jnp.sum(jnp.square(embedding), axis=-1, keepdims=True)
    return embedding * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def retrieval(image_emb: Float[Array, "B E"], text_emb: Float[Array, "B E"], k: int = 5) -> Metrics:
    """Returns recall@k among the examples of a batch, from image to caption and the reverse.

    Returns:
      "image_to_text_at_k" and "text_to_image_at_k", fractions; k / B by chance.
    """
    similarity = unit(image_emb) @ unit(text_emb).T
    own = jnp.diagonal(similarity)
    better = {
        "image_to_text": jnp.sum(similarity > own[:, None], axis=1),
        "text_to_image": jnp.sum(similarity > own[None, :], axis=0),
    }
    return {f"{name}_at_{k}": jnp.mean((rank < k).astype(jnp.float32)) for name, rank in better.items()}


def head(batch: Batch, count: int = SAMPLED) -> Batch:
    """Returns the first examples of a batch."""
    return jax.tree.map(lambda column: column[:count], batch)


def cosines(sampled: Float[Array, "B E"], batch: Batch) -> Metrics:
    """Returns mean cosines of sampled image embeddings, and what using the text embedding itself would reach.

    Args:
      sampled: one image embedding for each caption.
      batch: the captions' examples, with image_emb and text_emb.

    Returns:
      "cosine_image" to the caption's own image, "cosine_other" to another image, "cosine_text" to the caption;
      and "cosine_text_image" of the caption's text embedding to its image, the baseline of "cosine_image".
    """
    sampled, image, text = unit(sampled), unit(batch["image_emb"]), unit(batch["text_emb"])
    pairs = {
        "cosine_image": (sampled, image),
        "cosine_other": (sampled, jnp.roll(image, 1, axis=0)),
        "cosine_text": (sampled, text),
        "cosine_text_image": (text, image),
    }
    return {name: jnp.mean(jnp.sum(left * right, axis=-1)) for name, (left, right) in pairs.items()}
