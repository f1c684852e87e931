"""Recorded runs of Karlo-tiny: the imported stages, and a sampling loop that uses the recorded noises."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.diffusion import make_stepper, predictor, respace, thresholding
from dalle2_jax.stages import Stage, Variables
from dalle2_jax.stages.upsampler import Networks
from dalle2_jax.weights.clip import transformers
from dalle2_jax.weights.component import Component, Source, merge_parts
from dalle2_jax.weights.karlo.diffusers import detect
from dalle2_jax.weights.stage_writer import Trees, read_component

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDER, VARIATIONS = FIXTURES / "karlo_tiny", FIXTURES / "karlo_tiny_iv"


class Imported(NamedTuple):
    """An imported stage: stage, variables and tokenizer."""

    stage: Stage
    variables: Variables
    component: Component


def stage_of(component, clip=None):
    """Returns the stage that a component's config describes; ``clip`` is the CLIP stage of the same system."""
    sections = {"stage": component.stage, **component.config}
    vocabulary = component.config["text"]["vocab_size"] if "text" in component.config else None
    return Experiment.from_config(sections).build(vocabulary, clip)


def imported(components):
    """Returns the stages of components by name, their weights read."""
    system, clip = {}, None
    for name, component in sorted(merge_parts(components).items()):  # clip is the first
        stage = stage_of(component, clip)
        clip = stage if name == "clip" else clip
        abstract = Trees(*jax.eval_shape(stage.init, jax.random.key(0)))
        trees = jax.tree.map(jnp.asarray, dataclasses.asdict(read_component(component, abstract)))
        system[name] = Imported(stage, Variables(**trees), component)
    return system


@functools.cache
def karlo():
    """Returns Karlo-tiny's stages, with the image tower of the folder of the variations pipeline."""
    (image_tower,) = transformers.detect(Source.open(VARIATIONS / "image_encoder"))
    return imported([*detect(Source.open(FOLDER)), image_tower])


@functools.cache
def recorded(path):
    """Returns the arrays of an npz file: integers as int32, images as [B, H, W, C]."""
    arrays = {key: np.asarray(value) for key, value in np.load(path).items()}
    images = {key: np.moveaxis(value, -3, -1) if is_image(key, value) else value for key, value in arrays.items()}
    return {
        key: jnp.asarray(value.astype(np.int32) if value.dtype == np.int64 else value)
        for key, value in images.items()
        if value.dtype != np.float64
    }


def is_image(key, value):
    """Returns whether an array holds images in torch's layout, [..., C, H, W]."""
    return value.ndim >= 4 and value.shape[-1] == value.shape[-2] and value.shape[-3] in (3, 6)


# --- stepping -------------------------------------------------------------------------------


def exact_rows(stage, steps):
    """Returns the coefficients of a stage's steps as used by its sampling (computed in float64)."""
    stepper = make_stepper(stage.sampling, None, stage.diffusion.variance)
    return stepper.rows(respace(stage.schedule, steps))


def in_float32(stage):
    """Returns the stage with tables in float32, as in diffusers' UnCLIPScheduler.

    They differ from the exact ones where 1 - alpha_bar is small: at t = 0 the weight of x_0 comes out as 0.99947.
    """
    return dataclasses.replace(stage, diffusion=dataclasses.replace(stage.diffusion, table_dtype="float32"))


def float32_rows(stage, steps):
    """Returns the coefficients of a stage's steps with tables in float32."""
    return exact_rows(in_float32(stage), steps)


class Run:
    """Sampling runs of one stage with recorded noises; compiled once for all step counts.

    Args:
        loaded: The imported stage.
        guidance: The guidance scale.
    """

    def __init__(self, loaded, guidance):
        stage, (params, stats) = loaded.stage, loaded.variables
        config = dataclasses.replace(stage.sampling, guidance=guidance)
        stepper = make_stepper(config, None, stage.diffusion.variance)
        bound = thresholding(config.threshold, config.clip_sample, config.quantile)
        self._stage = stage
        self._params = Networks(params, stats["last"]) if "last" in stats else params

        # The networks are tiny: optimised compilation takes longer than the runs.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def step(params, condition, x_t, row, noise):
            denoiser = stage._guided(params, condition, stage.plan(config))
            predict = predictor(stage.diffusion.prediction, denoiser, bound, stage.diffusion.variance)
            return stepper.step(predict, x_t, row, lambda: noise, ())[0]

        self._step = step

    def teacher_forced(self, condition, steps, x_T, noises, latents, rows=float32_rows):
        """Returns x after each step, each computed from the recorded x before the step."""
        steps = self._rows(steps, rows)
        before = [x_T, *latents[:-1]]
        return jnp.stack([self._take(condition, steps, i, x_t, noises) for i, x_t in enumerate(before)])

    def free_running(self, condition, steps, x_T, noises, rows=float32_rows):
        """Returns the last x of a run in which each step starts from the result of the step before."""
        steps, x = self._rows(steps, rows), x_T
        for i in range(len(steps)):
            x = self._take(condition, steps, i, x, noises)
        return x

    def _rows(self, steps, rows):
        """Returns the coefficients of each step, starting at the highest noise level."""
        tables = rows(self._stage, steps)
        return [jax.tree.map(lambda table, i=i: table[i], tables) for i in reversed(range(len(tables.std)))]

    def _take(self, condition, steps, i, x_t, noises):
        noise = noises[i] if i < len(noises) else jnp.zeros_like(x_t)  # the last step has none
        return self._step(self._params, condition, x_t, steps[i], noise)


@functools.cache
def run(name, guidance):
    """Returns the `Run` of a stage of `karlo`."""
    return Run(karlo()[name], guidance)


def error(ours, theirs):
    """Returns the maximum difference relative to the maximum value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


def max_and_mean_difference(ours, theirs):
    """Returns the maximum and the mean absolute difference."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return float(difference.max()), float(difference.mean())
