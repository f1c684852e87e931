"""Sampling: from noise to a picture in one ``lax.scan`` over the steps of a respaced schedule.

A sampler is a stepper (``steppers``) in this loop. Before the first step x_T ~ N(0, I), and at each
step the network's prediction becomes (x_0, eps) (``process`` eq. 3-5). Where x_0 is clipped, the
noise is taken to be what the clipped picture leaves of x_t (``process`` eq. 4),

    x_0 <- clip(x_0, -c, c),        eps <- (x_t - a_t x_0) / s_t                              (1)

which keeps x_t = a_t x_0 + s_t eps true, the pair of which DDIM depends on.

Randomness: image b has its own key. Its x_T comes from the stream "x_T" of it and its noise at
step i from ``fold_in(stream "noise", i)``, so that a picture does not depend on its batch.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process
from dalle2_jax.diffusion.schedule import Schedule, respace
from dalle2_jax.diffusion.steppers import VARIANCES, Ddim, Ddpm, Predict, Stepper
from dalle2_jax.types import Denoiser, UserError, choose


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    Attributes:
        name: "ddim" or "ddpm".
        steps: a respacing, see ``schedule.respace``.
        eta: DDIM's noise, 0 (none) to 1 (as much as DDPM).
        variance: DDPM's noise, "fixed_small" or "fixed_large".
        clip: bound on |x_0| at each step: 1 for pixels, larger or None for embeddings.

    Raises:
        UserError: an unknown name or variance, eta out of range, or eta for a sampler without it.
    """

    name: str = "ddim"
    steps: int | str = 50
    eta: float = 0.0
    variance: str = "fixed_small"
    clip: float | None = 1.0

    def __post_init__(self):
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise UserError(f"clip bounds |x_0| by a positive number, not {self.clip}; use None for no bound")
        choose("variance", self.variance, VARIANCES)
        make_stepper(self)


def _ddim(config, eta):
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise UserError(f"eta is the share of DDPM's noise, from 0 to 1, not {eta}")
    return Ddim(eta)


def _ddpm(config, eta):
    if not isinstance(eta, int | float) or eta != 0:
        raise UserError("sampler 'ddpm' has no eta: leave it out, or use sampler 'ddim'")
    return Ddpm(config.variance)


_STEPPERS = {"ddim": _ddim, "ddpm": _ddpm}


def make_stepper(config: SamplerConfig, eta: float | Float[Array, ""] | None = None) -> Stepper:
    """Returns the stepper of a configuration; eta, which may be traced, takes the place of its own.

    Raises UserError on an unknown name, an eta out of range, or one (even traced) for "ddpm".
    """
    return choose("sampler", config.name, _STEPPERS)(config, config.eta if eta is None else eta)


def predictor(
    prediction_type: str, denoiser: Denoiser, hook: Callable[[jax.Array], jax.Array] | None = None
) -> Predict:
    """Returns what a stepper asks: (x_t, level) -> (x_0, eps).

    ``hook`` maps the predicted x_0 [B, ...] to a better one (clipping, thresholding, pasting known
    pixels); eps then follows by eq. (1).
    """

    def predict(x_t, level):
        t = jnp.broadcast_to(level.timestep, x_t.shape[:1])
        prediction = denoiser(x_t, t).astype(jnp.float32)
        pair = process.denoised(prediction_type, prediction, x_t, level.signal_rate, level.noise_rate)
        return pair if hook is None else process.with_x_0(hook(pair.x_0), x_t, level)

    return predict


def integrate(
    stepper: Stepper,
    schedule: Schedule,
    predict: Predict,
    keys: Key[Array, "B"],
    x_T: Float[Array, "B *shape"],
    *,
    trajectory: bool = False,
) -> Float[Array, "..."]:
    """Steps from x_T through every step of the schedule, the noisiest first: the one sampling loop.

    The network is traced once (as often as the stepper asks for it in a step), and x_t is carried
    with whatever the stepper carries besides.

    Args:
        stepper: takes a step.
        schedule: the steps to take, already respaced.
        predict: the network, see ``predictor``.
        keys: one an image; step i draws from ``fold_in(keys[b], i)``.
        x_T: where to start.
        trajectory: whether to return x after every step.

    Returns:
        x_0 float32[B, *shape]; or, as a trajectory, float32[T, B, *shape], whose last is x_0.
    """

    def body(state, xs):
        x_t, carry = state
        index, row = xs

        def noise():
            return rng.normal(jax.vmap(rng.at_step, in_axes=(0, None))(keys, index), x_t.shape[1:])

        x_t, carry = stepper.step(predict, x_t, row, noise, carry)
        return (x_t, carry), x_t if trajectory else None

    x_T = x_T.astype(jnp.float32)
    xs = np.arange(schedule.num_steps, dtype=np.int32), stepper.rows(schedule)
    # Rows stand in the schedule's order, cleanest first, so the scan runs from their end.
    (x_0, _), states = jax.lax.scan(body, (x_T, stepper.init(x_T)), xs, reverse=True)
    return states[::-1] if trajectory else x_0


def sample(
    schedule: Schedule,
    config: SamplerConfig,
    prediction_type: str,
    denoiser: Denoiser,
    keys: Key[Array, "B"],
    shape: tuple[int, ...],
    *,
    x_T: Float[Array, "B *shape"] | None = None,
    eta: float | Float[Array, ""] | None = None,
    trajectory: bool = False,
) -> Float[Array, "..."]:
    """Draws x_0 ~ p_theta, one example a key. Call it under ``jax.jit``, or each call compiles again.

    Args:
        schedule: the schedule of training; ``config.steps`` respaces it.
        config: static.
        prediction_type: what the denoiser predicts: "eps", "x0" or "v".
        denoiser: parameters, conditions and guidance already bound.
        keys: one an image, see ``rng.per_image``.
        shape: of one example.
        x_T: where to start instead of fresh noise.
        eta: takes the place of ``config.eta``; may be traced, so that changing it compiles nothing.
        trajectory: whether to return what x passes through instead of its end alone.

    Returns:
        x_0 float32[B, *shape]; or, as a trajectory, x after each step float32[steps, B, *shape],
        the noisiest first and x_0 last.

    Raises:
        UserError: more steps than the schedule has, eta with "ddpm", an unknown prediction type.
    """
    x_T_keys = jax.vmap(lambda key: rng.stream(key, "x_T"))(keys)
    noise_keys = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    hook = None if config.clip is None else lambda x_0: jnp.clip(x_0, -config.clip, config.clip)
    return integrate(
        make_stepper(config, eta),
        respace(schedule, config.steps),
        predictor(prediction_type, denoiser, hook),
        noise_keys,
        rng.normal(x_T_keys, tuple(shape)) if x_T is None else x_T,
        trajectory=trajectory,
    )
