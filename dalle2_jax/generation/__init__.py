"""From captions to pictures with the loaded stages of a system."""

from dalle2_jax.generation.cascade import PRIORS, Cascade, Request, Settings, picture_side
from dalle2_jax.generation.embedder import ClipEmbedder
from dalle2_jax.generation.preview import make_preview
from dalle2_jax.generation.system import Member, check_agreement

__all__ = [
    "PRIORS",
    "Cascade",
    "ClipEmbedder",
    "Member",
    "Request",
    "Settings",
    "check_agreement",
    "make_preview",
    "picture_side",
]
