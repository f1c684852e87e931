"""Karlo-tiny's recorded runs: the imported stages, and the loop that feeds them with the recorded noises."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import build
from dalle2_jax.diffusion import Level, make_schedule, make_stepper, predictor, respace
from dalle2_jax.diffusion.steppers import DdpmRow
from dalle2_jax.diffusion.thresholding import thresholding
from dalle2_jax.stages import Stage, Variables
from dalle2_jax.stages.upsampler import Networks
from dalle2_jax.weights import clip_hf, merged
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.karlo import recognise
from dalle2_jax.weights.landing import Trees, read

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER, VARIATIONS = FIXTURES / "karlo_tiny", FIXTURES / "karlo_tiny_iv"


class Imported(NamedTuple):
    """A stage as imported."""

    stage: Stage
    variables: Variables
    component: Component


def stage_of(component, clip=None):
    """The stage that a component's config describes; ``clip`` is the stage beside it."""
    sections = {"data": {}, "optim": {}, "mesh": {}, "stage": component.stage, **component.config}
    vocabulary = component.config["text"]["vocab_size"] if "text" in component.config else None
    return build.build_stage(sections, vocabulary, clip)


def imported(components):
    """Returns the stages of components by name, their weights read."""
    system, clip = {}, None
    for name, component in sorted(merged(components).items()):  # clip is the first
        stage = stage_of(component, clip)
        clip = stage if name == "clip" else clip
        abstract = Trees(*jax.eval_shape(stage.init, jax.random.key(0)))
        trees = jax.tree.map(jnp.asarray, dataclasses.asdict(read(component, abstract)))
        system[name] = Imported(stage, Variables(**trees), component)
    return system


@functools.cache
def karlo():
    """Karlo-tiny, with the image tower of the variations' folder, which holds nothing else of its own."""
    (image_tower,) = clip_hf.recognise(Source.open(VARIATIONS / "image_encoder"))
    return imported([*recognise(Source.open(FOLDER)), image_tower])


@functools.cache
def recorded(path):
    """An npz file's arrays: integers as int32, pictures [B, H, W, C]."""
    arrays = {key: np.asarray(value) for key, value in np.load(path).items()}
    pictures = {key: np.moveaxis(value, -3, -1) if is_picture(key, value) else value for key, value in arrays.items()}
    return {
        key: jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)
        for key, value in pictures.items()
        if value.dtype != np.float64
    }


def is_picture(key, value):
    """Whether an array is of torch's pictures, [..., C, H, W]."""
    return value.ndim >= 4 and value.shape[-1] == value.shape[-2] and value.shape[-3] in (3, 6)


# --- stepping -------------------------------------------------------------------------------


def exact_rows(stage, steps):
    """The coefficients that the product samples with."""
    stepper = make_stepper(stage.sampling, None, stage.diffusion.variance)
    return stepper.rows(respace(stage.schedule, steps))


def float32_rows(stage, steps):
    """Those of diffusers' UnCLIPScheduler, which computes them in float32, in its own order (README of the fixtures).

    They differ from the exact ones where 1 - alpha_bar is small: at t = 0 the weight of x_0 comes out as 0.99947.
    """
    one = np.float32(1)
    betas = make_schedule("cosine", stage.diffusion.num_steps).betas.astype(np.float32)
    alpha_bar = np.cumprod(one - betas, dtype=np.float32)
    timesteps = respace(stage.schedule, steps).timesteps
    kept = alpha_bar[timesteps]
    before = np.append(one, kept[:-1]).astype(np.float32)
    noise, noise_before = one - kept, one - before
    consecutive = np.append(timesteps[0] == 0, np.diff(timesteps) == 1)
    beta = np.where(consecutive, betas[timesteps], one - kept / before)
    alpha = np.where(consecutive, (one - betas)[timesteps], one - beta)
    x_0_weight = np.sqrt(before) * beta / noise
    x_t_weight = np.sqrt(alpha) * noise_before / noise
    log_small = np.log(np.maximum(noise_before / noise * beta, np.float32(1e-20)))
    std = np.exp(np.float32(0.5) * log_small) if stage.diffusion.variance == "fixed_small" else np.ones_like(beta)
    std[0] = 0
    level = Level(timesteps.astype(np.int32), np.sqrt(kept), np.sqrt(noise))
    return DdpmRow(level, x_0_weight, x_t_weight, std, log_small, np.log(beta))


class Run:
    """One stage's runs, fed with recorded noises; compiled once for all numbers of steps.

    Args:
        member: the imported stage.
        guidance: its scale.
    """

    def __init__(self, member, guidance):
        stage, (params, stats) = member.stage, member.variables
        config = dataclasses.replace(stage.sampling, guidance=guidance)
        stepper = make_stepper(config, None, stage.diffusion.variance)
        bound = thresholding(config.threshold, config.clip, config.quantile)
        self._stage = stage
        self._params = Networks(params, stats["last"]) if getattr(stage, "last_network", False) else params

        # The networks are tiny: it takes longer to compile them well than to run them.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def step(params, condition, x_t, row, noise):
            denoiser = stage._guided(params, condition, config, None, {})
            predict = predictor(stage.diffusion.prediction, denoiser, bound, stage.diffusion.variance)
            return stepper.step(predict, x_t, row, lambda: noise, ())[0]

        self._step = step

    def forced(self, condition, steps, x_T, noises, latents, rows=float32_rows):
        """x after each step, each from the recorded x before it."""
        steps = self._rows(steps, rows)
        before = [x_T, *latents[:-1]]
        return jnp.stack([self._take(condition, steps, i, x_t, noises) for i, x_t in enumerate(before)])

    def whole(self, condition, steps, x_T, noises, rows=float32_rows):
        """The last x of a run on its own."""
        steps, x = self._rows(steps, rows), x_T
        for i in range(len(steps)):
            x = self._take(condition, steps, i, x, noises)
        return x

    def _rows(self, steps, rows):
        """The rows of all steps, the noisiest first."""
        tables = rows(self._stage, steps)
        return [jax.tree.map(lambda table: table[i], tables) for i in reversed(range(len(tables.std)))]

    def _take(self, condition, steps, i, x_t, noises):
        noise = noises[i] if i < len(noises) else jnp.zeros_like(x_t)  # the last step draws none
        return self._step(self._params, condition, x_t, steps[i], noise)


@functools.cache
def run(name, guidance):
    """The runs of a stage of `karlo`."""
    return Run(karlo()[name], guidance)


def error(ours, theirs):
    """The largest difference, as a part of the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


def apart(ours, theirs):
    """The largest and the mean difference."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return float(difference.max()), float(difference.mean())
