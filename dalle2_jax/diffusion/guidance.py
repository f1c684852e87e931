"""Classifier-free guidance: functions from Denoisers to a Denoiser, independent of networks and samplers.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, in the form of GLIDE,
arXiv 2112.10741, eq. 8) moves the prediction away from the unconditional one by a scale w:

    f_w(x_t, t) = f(x_t, t | none) + w (f(x_t, t | c) - f(x_t, t | none))                     (1)

w = 0 is unconditional, w = 1 conditional, w > 1 guided. The paper states it for eps. x_0 and v are
affine in eps at a given x_t, and the weights of (1) sum to one, so the same w means the same
guidance whatever f predicts.

A network whose conditions c_1 .. c_n are dropped independently has a scale for each (in the manner of Brooks et al.
2023, arXiv 2211.09800, eq. 3, for an image and a caption): with f_k the prediction given c_1 .. c_k only,

    f_w = f_0 + sum_k w_k (f_k - f_{k-1}) = sum_k (w_k - w_{k+1}) f_k,    w_0 = 1, w_{n+1} = 0 (2)

A branch whose weight in the second sum is 0 is never computed: f_0 where w_1 = 1, f_k where two neighbours
are equal, f_n where w_n = 0. Equal scales are (1).

Scales may change with u = t / (T - 1), from 0 (clean) to 1 (noise), around their mean (Wang et al. 2024,
arXiv 2404.13040, section 4), and apply in an interval of u only (Kynkaanniemi et al. 2024, arXiv 2404.07724):

    w(u) = 1 + (w - 1) k(u),   k = 1,   2 (1 - u)   or   1 + cos(pi u);   w(u) = 1 outside     (3)

Guidance increases contrast. Rescaling (Lin et al. 2023, arXiv 2305.08891, eq. 15-16) undoes a share phi of it:

    f <- phi f_w std(f_n) / std(f_w) + (1 - phi) f_w                                           (4)

with the standard deviation of each example.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError, choose
from dalle2_jax.types import Denoiser, PerExample

_SHAPES = {
    "constant": jnp.ones_like,
    "linear": lambda u: 2.0 * (1.0 - u),
    "cosine": lambda u: 1.0 + jnp.cos(math.pi * u),
}


@dataclasses.dataclass(frozen=True)
class GuidanceSchedule:
    """How guidance scales change over the steps, eq. (3), and how far the contrast is rescaled, eq. (4).

    Attributes:
        kind: "constant", "linear" or "cosine".
        interval: the (lowest, highest) u at which guidance applies.
        rescale: phi, from 0 to 1.

    Raises:
        UserError: an unknown kind, or a number out of range.
    """

    kind: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        choose("guidance schedule", self.kind, _SHAPES)
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(
                f"guidance_interval must be two ascending numbers from 0 to 1, as 0.2,0.8, not {self.interval}"
            )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale must be from 0 to 1, not {self.rescale}")

    @property
    def varies(self) -> bool:
        """Whether a scale is not the same at every step."""
        return self.kind != "constant" or self.interval != (0.0, 1.0)

    def at(self, scale: PerExample, u: Float[Array, "B"]) -> Float[Array, "B"]:
        """Returns w(u), eq. (3)."""
        inside = (u >= self.interval[0]) & (u <= self.interval[1])
        return 1.0 + jnp.where(inside, (jnp.asarray(scale, jnp.float32) - 1.0) * _SHAPES[self.kind](u), 0.0)


def branches(scales: Sequence[float], schedule: GuidanceSchedule = GuidanceSchedule()) -> tuple[int, ...]:
    """Returns the k of the f_k in eq. (2) that have to be computed; ``scales`` are w_1 .. w_n.

    A schedule changes scales from step to step, but equal scales stay equal and 1 stays 1.
    """
    chain = [1.0, *scales]
    needed = [k for k in range(len(scales)) if chain[k] != chain[k + 1]]
    last = len(scales)
    return (*needed, last) if chain[last] != 0 or schedule.varies else tuple(needed)


def guided(
    stacked: Denoiser,
    scales: Sequence[PerExample],
    computed: Sequence[int],
    num_steps: int,
    schedule: GuidanceSchedule = GuidanceSchedule(),
    learned_variance: bool = False,
) -> Denoiser:
    """Returns the Denoiser of eq. (2), which evaluates its branches in one batched call.

    Args:
        stacked: a Denoiser over the batch repeated for each branch, bound to their conditions in this order.
        scales: w_1 .. w_n, each one number or one for each example; may be traced, so that changing them compiles
            nothing.
        computed: the branches of ``stacked``, from `branches`.
        num_steps: T of training; t is a timestep of training.
        schedule: of the scales.
        learned_variance: whether the second half of the channels is a variance: the result has that of the last
            branch, without guidance.
    """

    def denoiser(x_t, t):
        count = len(computed)
        outputs = stacked(jnp.concatenate([x_t] * count), jnp.concatenate([t] * count)).astype(jnp.float32)
        parts = jnp.split(outputs, count)
        means, raw = parts, None
        if learned_variance:
            means, raw = zip(*(jnp.split(part, 2, axis=-1) for part in parts), strict=True)
        weights = _weights(scales, computed, schedule, t, num_steps, means[0].ndim)
        mixed = jnp.asarray(sum(weight * mean for weight, mean in zip(weights, means, strict=True)))
        if schedule.rescale:
            mixed = _rescaled(mixed, means[-1], schedule.rescale)
        return mixed if raw is None else jnp.concatenate([mixed, raw[-1]], axis=-1)

    return denoiser


def _weights(
    scales: Sequence[PerExample],
    computed: Sequence[int],
    schedule: GuidanceSchedule,
    t: Int[Array, "B"],
    num_steps: int,
    ndim: int,
) -> list[Float[Array, "B ..."]]:
    """Returns the weight of each computed branch in eq. (2), ready to scale a batch."""
    u = t.astype(jnp.float32) / max(num_steps - 1, 1)
    chain = [jnp.ones_like(u), *(schedule.at(scale, u) for scale in scales), jnp.zeros_like(u)]
    return [(chain[k] - chain[k + 1]).reshape(t.shape + (1,) * (ndim - 1)) for k in computed]


def _rescaled(mixed: jax.Array, conditional: jax.Array, share: float) -> jax.Array:
    """Eq. (4)."""
    axes = tuple(range(1, mixed.ndim))
    target, actual = (jnp.std(f, axis=axes, keepdims=True) for f in (conditional, mixed))
    return share * mixed * (target / jnp.maximum(actual, 1e-8)) + (1 - share) * mixed
