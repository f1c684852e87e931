"""Sampling: from noise to a picture in one ``lax.scan`` over the steps of a respaced schedule.

A sampler is a stepper (``steppers``, ``solvers``) in this loop. Before the first step x_T ~ N(0, I), and at each
step the network's prediction becomes (x_0, eps) (``process`` eq. 3-5). Where x_0 is mended (clipped,
thresholded, by a caller's hook), the noise is taken to be what the mended picture leaves of x_t,

    x_0 <- hook(x_0),        eps <- (x_t - a_t x_0) / s_t                                     (1)

which keeps x_t = a_t x_0 + s_t eps true, the pair of which DDIM depends on.

Randomness: image b has its own key. Its x_T comes from the stream "x_T" of it and its noise at
the i-th turn of the loop from ``fold_in(stream "noise", i)``, so that a picture does not depend on its batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process, variance
from dalle2_jax.diffusion.inpainting import Inpainting, Itinerary, one_way, resampling
from dalle2_jax.diffusion.respacing import respace
from dalle2_jax.diffusion.schedule import Schedule, first_steps
from dalle2_jax.diffusion.solvers import DpmSolver, Heun, UniPc
from dalle2_jax.diffusion.steppers import Ddim, Ddpm, InverseDdim, Predict, Stepper
from dalle2_jax.diffusion.thresholding import thresholding
from dalle2_jax.diffusion.variance import NoiseMoments
from dalle2_jax.types import Denoiser, UserError, choose

Hook = Callable[[jax.Array], jax.Array]
"""A predicted x_0 [B, ...] -> a better one."""

SOLVERS = {
    "euler": Heun(order=1),
    "heun": Heun(order=2),
    "dpmpp_2m": DpmSolver(order=2),
    "dpmpp_3m": DpmSolver(order=3),
    "dpmpp_2m_sde": DpmSolver(order=2, stochastic=True),
    "unipc": UniPc(),
}
SAMPLERS = ("ddim", "ddpm", *SOLVERS)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    Attributes:
        name: one of `SAMPLERS`.
        steps: a respacing, see ``respacing.respace``.
        eta: DDIM's noise, 0 (none) to 1 (as much as DDPM).
        variance: DDPM's: "auto" (the network's own, else "fixed_small"), "fixed_small", "fixed_large", "analytic".
        clip: bound on |x_0| at each step: 1 for pixels, larger or None for embeddings.
        threshold: how x_0 is brought within it: "static" or "dynamic".
        quantile: of "dynamic". ``temperature``: deviation of x_T; GLIDE's upsampler takes 0.997.

    Raises:
        UserError: an unknown name, a number out of range, or eta or a variance for a sampler without it.
    """

    name: str = "ddim"
    steps: int | str = 50
    eta: float = 0.0
    variance: str = "auto"
    clip: float | None = 1.0
    threshold: str = "static"
    quantile: float = 0.995
    temperature: float = 1.0

    def __post_init__(self) -> None:
        choose("sampler", self.name, dict.fromkeys(SAMPLERS))
        choose("variance", self.variance, dict.fromkeys(("auto", "fixed_small", "fixed_large", "analytic")))
        thresholding(self.threshold, self.clip, self.quantile)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is the share of DDPM's noise, from 0 to 1, not {self.eta}")
        _check_eta(self.name, self.eta)
        if self.variance != "auto" and self.name != "ddpm":
            raise UserError(f"sampler {self.name!r} has no variance: leave it out, or use sampler 'ddpm'")


def _check_eta(name: str, eta: float | jax.Array | None) -> None:
    """Raises UserError for an eta, even a traced one, of another sampler than "ddim"."""
    if name != "ddim" and eta is not None and not (isinstance(eta, int | float) and eta == 0):
        raise UserError(f"sampler {name!r} has no eta: leave it out, or use sampler 'ddim'")


def make_stepper(
    config: SamplerConfig,
    eta: float | Float[Array, ""] | None = None,
    variance_type: str = "fixed_small",
    moments: NoiseMoments | None = None,
) -> Stepper:
    """Returns the stepper of a configuration.

    Args:
        eta: takes the place of DDIM's own; may be traced.
        variance_type: the network's, for "ddpm" with variance "auto".
        moments: the network's, for variance "analytic".

    Raises:
        UserError: eta, even traced, for another sampler than "ddim"; "analytic" without moments.
    """
    _check_eta(config.name, eta)
    if config.name == "ddim":
        return Ddim(config.eta if eta is None else eta)
    if config.name == "ddpm":
        return Ddpm(variance_type if config.variance == "auto" else config.variance, moments)
    return SOLVERS[config.name]


def predictor(
    prediction_type: str, denoiser: Denoiser, hook: Hook | None = None, variance_type: str = "fixed_small"
) -> Predict:
    """Returns what a stepper asks: (x_t, level) -> (x_0, eps), and the raw variance where the network learned one.

    ``hook`` maps the predicted x_0 to a better one (clipping, thresholding, pasting known pixels); eps then
    follows by eq. (1).
    """

    def predict(x_t, level):
        t = jnp.broadcast_to(level.timestep, x_t.shape[:1])
        prediction, raw = variance.split(variance_type, denoiser(x_t, t).astype(jnp.float32))
        pair = process.denoised(prediction_type, prediction, x_t, level.signal_rate, level.noise_rate)
        pair = pair._replace(variance=raw)
        return pair if hook is None else process.with_x_0(pair, hook(pair.x_0), x_t, level)

    return predict


def integrate(
    stepper: Stepper,
    schedule: Schedule,
    predict: Predict,
    keys: Key[Array, "B"],
    x_T: Float[Array, "B *shape"],
    *,
    itinerary: Itinerary | None = None,
    inpainting: Inpainting | None = None,
    ascending: bool = False,
    trajectory: bool = False,
) -> Float[Array, "..."]:
    """Goes from x_T through the steps of the schedule, the noisiest first: the one sampling loop.

    The network is traced as often as the stepper asks for it in a step; x_t is carried with what the stepper carries.

    Args:
        stepper: takes a step.
        schedule: the steps to take, already respaced.
        predict: the network, see ``predictor``.
        keys: one an image; turn i of the loop draws from ``fold_in(keys[b], i)``.
        x_T: where to start.
        itinerary: which step each turn takes, where that is not simply one after the other.
        inpainting: what is known of the picture, put in after every turn.
        ascending: whether the steps run from the cleanest up (``InverseDdim``).
        trajectory: whether to return x after every turn.

    Returns:
        The last x float32[B, *shape]; or, as a trajectory, float32[turns, B, *shape], whose last is that.
    """
    rows = stepper.rows(schedule)
    x_T = x_T.astype(jnp.float32)
    fresh = stepper.init(x_T)
    itinerary = itinerary or one_way(len(jax.tree.leaves(rows)[0]), ascending)

    def turn(state, xs):
        x_t, carry = state
        number, index, row, climbs, jump = xs
        turn_keys = jax.vmap(rng.at_step, in_axes=(0, None))(keys, number)

        def noise():
            return rng.normal(turn_keys, x_t.shape[1:])

        def down():
            x_prev, after = stepper.step(predict, x_t, row, noise, carry)
            return (x_prev if inpainting is None else inpainting.put(schedule, x_prev, index, turn_keys)), after

        def up():
            # What a multistep solver remembers belongs to the way down before.
            return jump.signal * x_t + jump.noise * noise(), fresh

        x_t, carry = jax.lax.cond(climbs, up, down) if itinerary.climbs.any() else down()
        return (x_t, carry), x_t if trajectory else None

    # Turns are numbered from the last, so that a step of the plain way down has its own number.
    numbers = np.arange(len(itinerary.indices), dtype=np.int32)[::-1]
    taken = _rows_taken(stepper, schedule, itinerary, rows)
    xs = numbers, itinerary.indices, taken, itinerary.climbs, itinerary.jumps(schedule)
    (x_0, _), states = jax.lax.scan(turn, (x_T, fresh), xs)
    return states if trajectory else x_0


def _chosen(rows: Any, indices: np.ndarray) -> Any:
    return jax.tree.map(lambda table: np.asarray(table)[indices], rows)


def _rows_taken(stepper: Stepper, schedule: Schedule, itinerary: Itinerary, rows: Any) -> Any:
    """Returns the row of each turn; those that climb need none.

    After a climb the way down begins anew: its rows are those of a schedule that ends where it begins, at which a
    multistep solver has no memory to ask.
    """
    if not itinerary.climbs.any():
        return _chosen(rows, itinerary.indices)
    starts, indices = itinerary.starts, np.where(itinerary.climbs, 0, itinerary.indices)
    ways = {start: stepper.rows(first_steps(schedule, start + 1)) for start in np.unique(starts)}
    taken = [_chosen(ways[start], index) for start, index in zip(starts, indices, strict=True)]
    return jax.tree.map(lambda *rows: np.stack(rows), *taken)


def sample(
    schedule: Schedule,
    config: SamplerConfig,
    prediction_type: str,
    denoiser: Denoiser,
    keys: Key[Array, "B"],
    shape: tuple[int, ...],
    *,
    variance_type: str = "fixed_small",
    x_T: Float[Array, "B *shape"] | None = None,
    eta: float | Float[Array, ""] | None = None,
    moments: NoiseMoments | None = None,
    hook: Hook | None = None,
    inpainting: Inpainting | None = None,
    resample: tuple[int, int] | None = None,
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
        variance_type: the variance that the denoiser predicts, or "fixed_small".
        x_T: where to start instead of fresh noise.
        eta: takes the place of ``config.eta``; may be traced, so that changing it compiles nothing.
        moments: the network's, for variance "analytic".
        hook: maps each predicted x_0, after its threshold, to a better one.
        inpainting: the pixels that are known.
        resample: (jump, times) for inpainting: every stretch of so many steps is taken so many times.
        trajectory: whether to return what x passes through instead of its end alone.

    Returns:
        x_0 float32[B, *shape]; or, as a trajectory, x after each turn float32[turns, B, *shape],
        the noisiest first and x_0 last.

    Raises:
        UserError: more steps than the schedule has, eta with another sampler than "ddim", an unknown prediction
            type, "analytic" without moments.
    """
    x_T_keys = jax.vmap(lambda key: rng.stream(key, "x_T"))(keys)
    noise_keys = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    steps = respace(schedule, config.steps)
    hooks = [mend for mend in (thresholding(config.threshold, config.clip, config.quantile), hook) if mend]
    mend = None if not hooks else lambda x_0: functools.reduce(lambda x, mend: mend(x), hooks, x_0)
    return integrate(
        make_stepper(config, eta, variance_type, moments),
        steps,
        predictor(prediction_type, denoiser, mend, variance_type),
        noise_keys,
        config.temperature * rng.normal(x_T_keys, tuple(shape)) if x_T is None else x_T,
        itinerary=resampling(steps.num_steps, *resample) if resample else None,
        inpainting=inpainting,
        trajectory=trajectory,
    )


def invert(
    schedule: Schedule,
    steps: int | str,
    prediction_type: str,
    denoiser: Denoiser,
    x_0: Float[Array, "B *shape"],
    *,
    variance_type: str = "fixed_small",
    skip_last: bool = True,
) -> Float[Array, "B *shape"]:
    """Returns the x_T from which DDIM with eta = 0 and the same steps draws x_0 again, up to its step size.

    Args:
        schedule: the schedule of training; ``steps`` respaces it.
        steps: a respacing, see ``respacing.respace``.
        prediction_type: what the denoiser predicts.
        denoiser: as in ``sample``, without guidance: with it, no x_T draws the same picture.
        x_0: the pictures.
        variance_type: as in ``sample``.
        skip_last: see ``steppers.InverseDdim``.
    """
    kept = respace(schedule, steps)
    predict = predictor(prediction_type, denoiser, None, variance_type)
    keys = jax.vmap(jax.random.key)(jnp.zeros(x_0.shape[0], jnp.int32))  # asked of the loop, never drawn from
    return integrate(InverseDdim(skip_last), kept, predict, keys, x_0, ascending=True)
