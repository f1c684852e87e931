"""Sampling: from noise to x_0 by one of several samplers, over the steps of a respaced schedule.

A sampler is a stepper (``steppers``, ``solvers``) in the loop of ``loop.integrate``. It starts from x_T ~ N(0, I); at
each step the network's prediction becomes (x_0, eps) (``process`` eq. 3-5). Where x_0 is corrected (clipped,
thresholded, by the caller's ``x0_transform``), eps is computed again from x_t,

    x_0 <- x0_transform(x_0),        eps <- (x_t - a_t x_0) / s_t                             (1)

which keeps x_t = a_t x_0 + s_t eps true: DDIM depends on it.

Randomness: example b has its own key. Its x_T comes from the key's stream "x_T", and the noise of its steps from the
stream "noise" (``loop``). Both may be given instead, to compare with another implementation: `SamplingOptions`.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion.inpainting import resampling
from dalle2_jax.diffusion.loop import SamplingOptions, X0Transform, integrate, predictor
from dalle2_jax.diffusion.process import thresholding
from dalle2_jax.diffusion.respacing import respace
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.diffusion.solvers import DpmSolver, Heun, UniPc
from dalle2_jax.diffusion.steppers import Ddim, Ddpm, InverseDdim, Stepper
from dalle2_jax.diffusion.variance import NoiseStatistics
from dalle2_jax.errors import UserError, choose
from dalle2_jax.ranges import DiffusionSteps, Fraction, Range
from dalle2_jax.types import Denoiser, PerExample

SOLVERS = {
    "euler": Heun(order=1),
    "heun": Heun(order=2),
    "dpmpp_2m": DpmSolver(order=2),
    "dpmpp_3m": DpmSolver(order=3),
    "dpmpp_2m_sde": DpmSolver(order=2, stochastic=True),
    "unipc": UniPc(),
}
SAMPLERS = ("ddim", "ddpm", *SOLVERS)

MAX_GROWTH = 4.0
"""Steps for which ``Heun.growth`` is larger are rejected for "heun"."""


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    Attributes:
        name: one of `SAMPLERS`.
        steps: a respacing, see ``respacing.respace``.
        eta: DDIM's noise, from 0 (none) to 1 (as much as DDPM).
        variance: DDPM's: "auto" (the network's own, else "fixed_small"), "fixed_small", "fixed_large", "analytic".
        clip_sample: bound on |x_0| at each step: 1 for images in [-1, 1]; None for data without a bound.
        threshold: how x_0 is brought within ``clip_sample``: "static" or "dynamic" (``process.thresholding``).
        quantile: of "dynamic".
        temperature: standard deviation of x_T; GLIDE's upsampler uses 0.997.

    Raises:
        UserError: an unknown name, a number out of range, or eta or a variance for a sampler without it.
    """

    name: str = "ddim"
    steps: DiffusionSteps | str = 50
    eta: Fraction = 0.0
    variance: str = "auto"
    clip_sample: Annotated[float, Range(0, 1_000_000, exclusive_min=True)] | None = None
    threshold: str = "static"
    quantile: Annotated[float, Range(0, 1, exclusive_min=True)] = 0.995
    temperature: Annotated[float, Range(0, 1_000)] = 1.0

    def __post_init__(self) -> None:
        choose("sampler", self.name, dict.fromkeys(SAMPLERS))
        choose("variance", self.variance, dict.fromkeys(("auto", "fixed_small", "fixed_large", "analytic")))
        thresholding(self.threshold, self.clip_sample, self.quantile)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is the share of DDPM's noise, from 0 to 1, not {self.eta}")
        _check_eta(self.name, self.eta)
        if self.variance != "auto" and self.name != "ddpm":
            raise UserError(f"sampler {self.name!r} has no variance: remove it, or use sampler 'ddpm'")


def _check_eta(name: str, eta: float | jax.Array | None) -> None:
    """Raises UserError for an eta, even a traced one, of another sampler than "ddim"."""
    if name != "ddim" and eta is not None and not (isinstance(eta, int | float) and eta == 0):
        raise UserError(f"sampler {name!r} has no eta: remove it, or use sampler 'ddim'")


def make_stepper(
    config: SamplerConfig,
    eta: PerExample | None = None,
    variance_type: str = "fixed_small",
    noise_statistics: NoiseStatistics | None = None,
) -> Stepper:
    """Returns the stepper of a configuration.

    Args:
        config: the sampler.
        eta: replaces ``config.eta``; one number or one for each example, may be traced.
        variance_type: the network's, for "ddpm" with variance "auto".
        noise_statistics: the network's, for variance "analytic".

    Raises:
        UserError: eta, even traced, for another sampler than "ddim"; "analytic" without statistics.
    """
    _check_eta(config.name, eta)
    if config.name == "ddim":
        return Ddim(config.eta if eta is None else eta)
    if config.name == "ddpm":
        return Ddpm(variance_type if config.variance == "auto" else config.variance, noise_statistics)
    return SOLVERS[config.name]


def steps_of(schedule: Schedule, config: SamplerConfig) -> Schedule:
    """Returns the schedule of the steps that a sampler takes.

    ``config.steps`` is parsed by ``respacing.respace``. A plain number n means n steps even in t, but for "heun", whose
    second slopes need levels that are not too far apart, "logsnr{n}": even in log SNR, from sigma = 80 at most.

    Args:
        schedule: the schedule of training.
        config: the sampler.

    Raises:
        UserError: a respacing that does not fit the schedule, or one with which "heun" overshoots (``Heun.growth``).
    """
    spec, solver = str(config.steps).replace(" ", ""), SOLVERS.get(config.name)
    if not isinstance(solver, Heun) or solver.order == 1:
        return respace(schedule, spec)
    steps = respace(schedule, f"logsnr{spec}" if spec.isdecimal() else spec)
    growth = solver.growth(steps)
    if growth > MAX_GROWTH:
        raise UserError(
            f"steps {spec!r} are too far apart for sampler {config.name!r}, which would spread samples {growth:.3g} "
            "times too wide: use steps 'logsnr10' or more, or sampler 'dpmpp_2m'"
        )
    return steps


def sample(
    schedule: Schedule,
    config: SamplerConfig,
    prediction_type: str,
    denoiser: Denoiser,
    keys: Key[Array, "B"],
    shape: tuple[int, ...],
    *,
    variance_type: str = "fixed_small",
    options: SamplingOptions = SamplingOptions(),
) -> Float[Array, "..."]:
    """Samples x_0 ~ p_theta, one example a key. Call it under ``jax.jit``, or each call compiles again.

    Args:
        schedule: the schedule of training; ``config.steps`` respaces it.
        config: the sampler. Static.
        prediction_type: what the denoiser predicts: "eps", "x0" or "v".
        denoiser: the network (x_t, t) -> prediction, with parameters, conditioning and guidance bound.
        keys: one an example, see ``rng.per_image``.
        shape: of one example.
        variance_type: the variance that the denoiser predicts, or "fixed_small".
        options: starting point, noise, known pixels and callbacks, where they are not the defaults.

    Returns:
        x_0 float32[B, *shape]; or, as a trajectory, x after each step float32[steps, B, *shape], x_0 last.

    Raises:
        UserError: more steps than the schedule has, or too few for "heun"; eta with another sampler than "ddim", an
            unknown prediction type, "analytic" without statistics, noise of another shape.
    """
    x_T_keys = jax.vmap(lambda key: rng.stream(key, "x_T"))(keys)
    noise_keys = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    steps = steps_of(schedule, config)
    x_T = config.temperature * rng.normal(x_T_keys, tuple(shape)) if options.x_T is None else options.x_T
    return integrate(
        make_stepper(config, options.eta, variance_type, options.noise_statistics),
        steps,
        predictor(prediction_type, denoiser, _x0_transform(config, options.x0_transform), variance_type),
        noise_keys,
        x_T,
        options=options,
        step_plan=resampling(steps.num_steps, *options.resample) if options.resample else None,
    )


def _x0_transform(config: SamplerConfig, after: X0Transform | None) -> X0Transform | None:
    """Returns the configuration's clipping or thresholding, followed by ``after``; None where there is neither."""
    clip = thresholding(config.threshold, config.clip_sample, config.quantile)
    transforms = [transform for transform in (clip, after) if transform is not None]
    if not transforms:
        return None
    return lambda x_0: functools.reduce(lambda x, transform: transform(x), transforms, x_0)


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
    """Returns the x_T from which DDIM with eta = 0 and the same steps samples x_0 again, up to its step size.

    Args:
        schedule: the schedule of training; ``steps`` respaces it.
        steps: a respacing, see ``respacing.respace``.
        prediction_type: what the denoiser predicts.
        denoiser: as in `sample`, without guidance: with guidance, no x_T reproduces x_0.
        x_0: the examples.
        variance_type: as in `sample`.
        skip_last: see ``steppers.InverseDdim``.
    """
    respaced = respace(schedule, steps)
    predict = predictor(prediction_type, denoiser, None, variance_type)
    keys = jax.vmap(jax.random.key)(jnp.zeros(x_0.shape[0], jnp.int32))  # required by the loop, not used
    return integrate(InverseDdim(skip_last), respaced, predict, keys, x_0, ascending=True)
