"""CLIP scores: how well an image matches its caption, by the cosine of their CLIP embeddings.

Two figures have this name. `clip_score` is 100 cos, which torchmetrics computes, and which the curves of FID against
CLIP score in GLIDE, unCLIP and Imagen plot; `dalle2 evaluate` reports it. `clip_s` is CLIP-S of Hessel et al. 2021,
section 3: 2.5 max(cos, 0). Both depend on the CLIP: compare figures of one CLIP only.
"""

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks


def clip_score(image_emb: Float[np.ndarray, "N D"], text_emb: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N"]:
    """Returns 100 cos of each image and its caption, from -100 to 100.

    Args:
      image_emb: CLIP image embeddings, of any norm.
      text_emb: CLIP text embeddings of the captions, of any norm.

    Raises:
      DataError: the embeddings differ in number or dimension, or are not finite.
    """
    return 100.0 * _cosines(image_emb, text_emb)


def clip_s(image_emb: Float[np.ndarray, "N D"], text_emb: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N"]:
    """Returns CLIP-S of each image and its caption, from 0 to 2.5.

    Args:
      image_emb: CLIP image embeddings, of any norm.
      text_emb: CLIP text embeddings of the captions, of any norm. Captions begin with "A photo depicts" in the paper.

    Raises:
      DataError: as `clip_score`.
    """
    return 2.5 * np.maximum(_cosines(image_emb, text_emb), 0.0)


def _cosines(image_emb: Float[np.ndarray, "N D"], text_emb: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N"]:
    images, texts = blocks.checked_pair(image_emb, text_emb, ("image embeddings", "text embeddings"))
    if len(images) != len(texts):
        raise DataError(f"there are {len(images)} image embeddings and {len(texts)} text embeddings: give pairs")
    a, b = (blocks.unit_rows(each.astype(np.float64)) for each in (images, texts))
    return np.einsum("nd,nd->n", a, b)
