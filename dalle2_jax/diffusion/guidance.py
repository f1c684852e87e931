"""Guidance: functions from Denoisers to a Denoiser, known neither to networks nor to samplers.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, in the form of GLIDE,
arXiv 2112.10741, eq. 8) moves the prediction away from the unconditional one by a scale w:

    f_w(x_t, t) = f(x_t, t | none) + w (f(x_t, t | c) - f(x_t, t | none))                     (1)

w = 0 is unconditional, w = 1 conditional, w > 1 guided. The paper states it for eps. x_0 and v are
affine in eps at a given x_t, and the weights of (1) sum to one, so that the same w means the same
guidance whatever f predicts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.types import Denoiser


def is_guided(scale: float | Float[Array, ""]) -> bool:
    """Returns whether eq. (1) needs the unconditional branch: not for the Python number 1.

    A traced scale always needs it, for a compiled program has to serve every value.
    """
    return not (isinstance(scale, int | float) and scale == 1)


def classifier_free(double_denoiser: Denoiser, scale: float | Float[Array, ""]) -> Denoiser:
    """Returns the Denoiser guided by eq. (1), which evaluates both branches in one batched call.

    Args:
        double_denoiser: a Denoiser over the doubled batch [2B, ...], bound to the conditions
            [conditional; unconditional] in this order. Where ``is_guided(scale)`` is false, use a
            Denoiser of the condition alone instead of this function.
        scale: w; may be traced, so that changing it compiles nothing.
    """

    def denoiser(x_t, t):
        both = double_denoiser(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])).astype(jnp.float32)
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + jnp.asarray(scale, jnp.float32) * (conditional - unconditional)

    return denoiser
