"""The sampling loop: one ``lax.scan`` over the steps of a respaced schedule, for every stepper.

Randomness: example b has its own key, and step i of the loop (numbered from the last) uses ``fold_in(keys[b], i)``,
so that a sample does not depend on the batch it is in.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process, variance
from dalle2_jax.diffusion.inpainting import Inpainting, StepPlan, one_way
from dalle2_jax.diffusion.schedule import Level, Schedule, first_steps
from dalle2_jax.diffusion.steppers import Predict, Stepper
from dalle2_jax.diffusion.variance import NoiseStatistics
from dalle2_jax.errors import UserError
from dalle2_jax.types import Denoiser, PerExample

X0Transform = Callable[[jax.Array], jax.Array]
"""Maps a predicted x_0 [B, ...] to a corrected one of the same shape."""

Noise = Float[Array, "steps B *shape"] | Callable[[Int[Array, ""]], Float[Array, "B *shape"]]
"""The normals z of each step: float32[steps, B, *shape], first the noisiest step. The last step uses none, so
steps - 1 are enough. Or a function from the number of the step, int32[], to float32[B, *shape]. The noise of
`Inpainting` still comes from the keys."""

OnStep = Callable[[jax.Array, jax.Array], None]
"""Called at each step while it is traced, with the number of steps done, int32[], and the predicted x_0 [B, ...].
``jax.debug.callback`` in it passes them to Python."""


def _static(default):
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Optional inputs of `sampler.sample`. A pytree: new values of its arrays compile nothing.

    Attributes:
        eta: replaces ``SamplerConfig.eta``; only for "ddim". One number, or one for each example.
        x_T: the starting point float32[B, *shape], in place of the keys' noise.
        noise: the noise of each step, in place of the keys' noise; see `Noise`. A function cannot cross ``jax.jit``.
        inpainting: the known pixels.
        resample: (jump, times) of RePaint: every ``jump`` steps are repeated ``times`` times. Static.
        x0_transform: applied to each predicted x_0, after clipping or thresholding. Static.
        on_step: called at each step, see `OnStep`. Static.
        trajectory: whether to return x after every step. Static.
        noise_statistics: the network's, for variance "analytic". Static.
    """

    eta: PerExample | None = None
    x_T: Float[Array, "B *shape"] | None = None
    noise: Noise | None = None
    inpainting: Inpainting | None = None
    resample: tuple[int, int] | None = _static(None)
    x0_transform: X0Transform | None = _static(None)
    on_step: OnStep | None = _static(None)
    trajectory: bool = _static(False)
    noise_statistics: NoiseStatistics | None = _static(None)


def predictor(
    prediction_type: str,
    denoiser: Denoiser,
    x0_transform: X0Transform | None = None,
    variance_type: str = "fixed_small",
) -> Predict:
    """Returns the function that a stepper evaluates: (x_t, level) -> (x_0, eps, raw variance).

    Args:
        prediction_type: what the denoiser predicts: "eps", "x0" or "v".
        denoiser: the network, with parameters and conditioning bound.
        x0_transform: corrects the predicted x_0 (clipping, thresholding, pasting known pixels); eps then follows from
            x_t and the corrected x_0 (``process`` eq. 4).
        variance_type: one of ``variance.VARIANCES``; with a learned one the denoiser's channels are halved.
    """

    def predict(x_t: jax.Array, level: Level) -> process.Denoised:
        t = jnp.broadcast_to(level.timestep, x_t.shape[:1])
        prediction, raw = variance.split(variance_type, denoiser(x_t, t).astype(jnp.float32))
        pair = process.denoised(prediction_type, prediction, x_t, level.signal_rate, level.noise_rate)
        pair = pair._replace(variance=raw)
        return pair if x0_transform is None else process.with_x_0(pair, x0_transform(pair.x_0), x_t, level)

    return predict


def integrate(
    stepper: Stepper,
    schedule: Schedule,
    predict: Predict,
    keys: Key[Array, "B"],
    x_T: Float[Array, "B *shape"],
    *,
    options: SamplingOptions = SamplingOptions(),
    step_plan: StepPlan | None = None,
    ascending: bool = False,
) -> Float[Array, "..."]:
    """Integrates from x_T through the steps of a schedule, the noisiest first.

    The network is traced as often as the stepper evaluates it in a step.

    Args:
        stepper: takes a step.
        schedule: the steps to take, already respaced.
        predict: the network, see `predictor`.
        keys: one an example; step i of the loop uses ``fold_in(keys[b], i)``.
        x_T: the starting point.
        options: of these ``noise``, ``inpainting``, ``on_step`` and ``trajectory``.
        step_plan: the order of the steps; by default each once, the noisiest first.
        ascending: whether the default order is from the cleanest step up (``InverseDdim``).

    Returns:
        The last x float32[B, *shape]; or, as a trajectory, float32[steps, B, *shape], whose last is that.
    """
    rows, x_T = stepper.rows(schedule), x_T.astype(jnp.float32)
    initial = stepper.init(x_T)
    step_plan = step_plan or one_way(len(jax.tree.leaves(rows)[0]), ascending)
    noise, inpainting, count = options.noise, options.inpainting, len(step_plan.indices)

    def body(state, xs):
        x_t, carry = state
        number, index, row, renoise, jump, given = xs
        step_keys = jax.vmap(rng.at_step, in_axes=(0, None))(keys, number)
        normals = functools.partial(_normals, noise, given, step_keys, x_t.shape[1:])

        def denoise():
            observed = _observed(predict, options.on_step, count - number)
            x_prev, after = stepper.step(observed, x_t, row, normals, carry)
            return (x_prev if inpainting is None else inpainting.put(schedule, x_prev, index, step_keys)), after

        def add_noise():
            # The history of a multistep solver is reset after re-noising.
            return jump.signal * x_t + jump.noise * normals(), initial

        x_t, carry = jax.lax.cond(renoise, add_noise, denoise) if step_plan.renoise.any() else denoise()
        return (x_t, carry), x_t if options.trajectory else None

    # Numbered from the last, so that the number of a step does not depend on how many come before it.
    numbers = np.arange(count, dtype=np.int32)[::-1]
    taken = _rows_taken(stepper, schedule, step_plan, rows)
    given = _given_noise(noise, x_T.shape, count)
    xs = numbers, step_plan.indices, taken, step_plan.renoise, step_plan.jumps(schedule), given
    (x_0, _), states = jax.lax.scan(body, (x_T, initial), xs)
    return x_0 if states is None else states


def _observed(predict: Predict, on_step: OnStep | None, done: jax.Array) -> Predict:
    """Returns ``predict``, which passes the x_0 of its first evaluation in this step to ``on_step``."""
    if on_step is None:
        return predict
    evaluations = []

    def observed(x_t: jax.Array, level: Level) -> process.Denoised:
        pair = predict(x_t, level)
        if not evaluations:
            on_step(done, pair.x_0)
        evaluations.append(level)
        return pair

    return observed


def _normals(noise: Noise | None, given: Any, keys: Key[Array, "B"], shape: tuple[int, ...]) -> jax.Array:
    """Returns the normals of a step; ``given`` is the step's part of `_given_noise`."""
    if noise is None:
        return rng.normal(keys, shape)
    return noise(given) if callable(noise) else given


def _given_noise(noise: Noise | None, shape: tuple[int, ...], steps: int) -> jax.Array | np.ndarray | None:
    """Returns the part of given noise for each step: its normals, or its number if ``noise`` is a function.

    Raises:
        UserError: normals for another number of steps, or of another shape.
    """
    if noise is None:
        return None
    if callable(noise):
        return np.arange(steps, dtype=np.int32)
    if noise.ndim == 0 or noise.shape[0] not in (steps - 1, steps) or noise.shape[1:] != shape:
        raise UserError(f"noise must be of shape {(steps, *shape)}, its first axis the steps, not {noise.shape}")
    last = jnp.zeros((steps - noise.shape[0], *shape), jnp.float32)
    return jnp.concatenate([jnp.asarray(noise, jnp.float32), last])


def _select(rows: Any, indices: np.ndarray) -> Any:
    return jax.tree.map(lambda table: np.asarray(table)[indices], rows)


def _rows_taken(stepper: Stepper, schedule: Schedule, step_plan: StepPlan, rows: Any) -> Any:
    """Returns the row of each step; those of re-noising steps are not used.

    After re-noising, a multistep solver starts again: its rows are those of a schedule that ends at the level it
    starts from, which use no history at the first step.
    """
    if not step_plan.renoise.any():
        return _select(rows, step_plan.indices)
    starts, indices = step_plan.starts, np.where(step_plan.renoise, 0, step_plan.indices)
    by_start = {start: stepper.rows(first_steps(schedule, start + 1)) for start in np.unique(starts)}
    taken = [_select(by_start[start], index) for start, index in zip(starts, indices, strict=True)]
    return jax.tree.map(lambda *rows: np.stack(rows), *taken)
