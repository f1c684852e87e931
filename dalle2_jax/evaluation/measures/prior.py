"""Measures of the prior: how near its samples are to true image embeddings, and what it adds to the decoder."""

import numpy as np
from jaxtyping import Float

from dalle2_jax.errors import UserError
from dalle2_jax.evaluation.context import CAPTION, PRIOR, TEXT, Context, unit
from dalle2_jax.evaluation.features import extract
from dalle2_jax.evaluation.figures import Figure, Figures, mean_of, share_of
from dalle2_jax.evaluation.measures.clip import own_rank
from dalle2_jax.system import load
from dalle2_jax.system.cascade import PRIORS

TEXT_ITSELF = "text embedding"
"""The baseline of sampled embeddings: the text embedding in their place."""


def prior(context: Context, num: int) -> Figures:
    """Samples an image embedding for each caption, and measures its cosines.

    "cosine_image" is to the caption's own image, "cosine_unrelated" to another image, "cosine_text" to the caption;
    "nearest" is the share of samples that are nearest to their own image of all N. The baseline is the text embedding
    in place of the sample; for "cosine_text" it is the true image embedding.
    """
    check_prior(context, num)
    found, options = context.embedded(num), context.options
    size = options.batch_size or min(64, len(found.captions))
    settings = options.sampling.get("prior", {})
    sampled = unit(context.system.prior(found.captions, seed=options.seed, batch_size=size, prior=settings))
    image, text = found.image_emb, found.text_emb
    unrelated = np.roll(image, 1, axis=0)
    figures: Figures = {
        "cosine_image": _cosine(sampled, image).compared(_cosine(text, image), TEXT_ITSELF),
        "cosine_text": _cosine(sampled, text).compared(_cosine(image, text), "true image embedding"),
        "nearest": _nearest(sampled, image).compared(_nearest(text, image), TEXT_ITSELF),
    }
    if len(image) > 1:
        figures["cosine_unrelated"] = _cosine(sampled, unrelated).compared(_cosine(text, unrelated), TEXT_ITSELF)
    return figures


def check_prior(context: Context, num: int) -> None:
    """Raises UserError if the system has no prior."""
    if not any(name in context.system.stages for name in PRIORS.values()):
        raise UserError(load.missing_stage(context.system.path, load.choose_prior(context.system.path)))


def _cosine(left: Float[np.ndarray, "N E"], right: Float[np.ndarray, "N E"]) -> Figure:
    return mean_of(np.einsum("ne,ne->n", left.astype(np.float64), right.astype(np.float64)))


def _nearest(rows: Float[np.ndarray, "N E"], image: Float[np.ndarray, "N E"]) -> Figure:
    return share_of(own_rank(rows @ image.T) == 0)


def ablation(context: Context, num: int) -> Figures:
    """Generates images in the three ways of Ramesh et al. 2022, figure 8, and measures each with CLIP.

    The decoder is conditioned on the caption only ("caption"); on the caption and the text embedding in place of an
    image embedding ("text_embedding"); and on the caption and the prior's sample ("prior"). Each is compared with the
    true image by the cosine of CLIP's image embeddings ("_image"), and with the caption ("_text").
    """
    check_ablation(context, num)
    captions, network = context.captions(num), context.clip_network
    real = context.source.select(("image",)).fetch(context.indices(num))["image"]
    image = unit(extract(network, real))
    text = unit(context.clip.embed_text(captions))
    figures: Figures = {}
    for condition in (CAPTION, TEXT, PRIOR):
        emb = unit(context.samples(num, condition).features(network, num))
        figures[f"{condition}_image"] = _cosine(emb, image)
        figures[f"{condition}_text"] = _cosine(emb, text)
    return figures


def check_ablation(context: Context, num: int) -> None:
    """Raises UserError unless the decoder reads image embeddings, and there is a prior."""
    if "image_emb" not in context.stage("decoder").stage.inputs:
        raise UserError(
            "the ablation needs a decoder that reads image embeddings, and this system's reads captions only"
        )
    check_prior(context, num)
