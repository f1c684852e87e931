"""Clipping and thresholding of a predicted x_0 outside the range of the data, which guidance often produces.

    static     clip(x_0, -c, c)                                          (Ho et al. 2020)        (1)
    dynamic    clip(x_0, -s, s) c / s,    s = max(c, the p-quantile of |x_0| of each image)
               (Saharia et al. 2022, Imagen, arXiv 2205.11487, section 2.3)                     (2)

Where less than a share 1 - p of an image's values is out of range, both clip alike.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.errors import UserError, choose

THRESHOLDS = ("static", "dynamic")


def thresholding(kind: str, bound: float | None, quantile: float) -> Callable | None:
    """Returns a function of x_0 [B, ...], eq. (1) or (2); None where there is no bound.

    Args:
        kind: one of `THRESHOLDS`.
        bound: c, ``SamplerConfig.clip_sample``.
        quantile: p of "dynamic".

    Raises:
        UserError: an unknown kind, a bound or quantile out of range, or a dynamic threshold without a bound.
    """
    choose("threshold", kind, dict.fromkeys(THRESHOLDS))
    if bound is None:
        if kind == "dynamic":
            raise UserError("threshold 'dynamic' needs the range of the data: set clip_sample, for images to 1.0")
        return None
    if not 0 < bound < float("inf"):
        raise UserError(f"clip_sample must be positive, not {bound}; use None for no bound")
    if not 0 < quantile <= 1:
        raise UserError(f"quantile must be above 0 and at most 1, not {quantile}")
    if kind == "static":
        return lambda x_0: jnp.clip(x_0, -bound, bound)
    return lambda x_0: _dynamic(x_0, bound, quantile)


def _dynamic(x_0: Float[Array, "B *shape"], bound: float, quantile: float) -> Float[Array, "B *shape"]:
    """Eq. (2)."""
    reach = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    reach = jnp.maximum(reach, bound).reshape((-1,) + (1,) * (x_0.ndim - 1))
    return jnp.clip(x_0, -reach, reach) * (bound / reach)
