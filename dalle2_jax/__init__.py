"""dalle2_jax: the complete DALL-E 2 (unCLIP) text-to-image system in JAX.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents",
arXiv 2204.06125. The README's architecture page is the map of this package.
"""

__version__ = "0.1.0"
