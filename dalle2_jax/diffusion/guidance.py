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


def classifier_free(double_denoiser: Denoiser, scale: float | Float[Array, ""]) -> Denoiser:
    """Returns the Denoiser guided by eq. (1), which evaluates both branches in one batched call.

    Args:
        double_denoiser: a Denoiser over the doubled batch [2B, ...], bound to the conditions
            [conditional; unconditional] in this order.
        scale: w; may be traced, so that changing it compiles nothing. A caller who knows that it is
            1 spares half the work with a Denoiser of the condition alone instead of this function.
    """

    def denoiser(x_t, t):
        both = double_denoiser(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])).astype(jnp.float32)
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + jnp.asarray(scale, jnp.float32) * (conditional - unconditional)

    return denoiser
