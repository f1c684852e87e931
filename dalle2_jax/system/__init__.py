"""Loaded systems: from captions and images to images and embeddings."""

from dalle2_jax.system.cascade import PRIORS, Cascade, Request, Settings
from dalle2_jax.system.embedder import ClipEmbedder
from dalle2_jax.system.loaded_stage import LoadedStage, check_agreement
from dalle2_jax.system.preview import make_preview

__all__ = [
    "PRIORS",
    "Cascade",
    "ClipEmbedder",
    "LoadedStage",
    "Request",
    "Settings",
    "check_agreement",
    "make_preview",
]
