"""Bits per dimension of a trained network, and its noise statistics for Analytic-DPM.

Both evaluate every step of the schedule on given examples: bits per dimension by ``diffusion.likelihood``, the mean
power of the predicted noise by ``diffusion.variance``, eq. 6.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dalle2_jax import data, rng
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation import intervals
from dalle2_jax.stages import DiffusionStage
from dalle2_jax.system import LoadedStage


def examples(
    stages: Mapping[str, LoadedStage], name: str, source: data.Source, indices: Sequence[int], seed: int
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Returns x_0 and the condition of examples of stage ``name``."""
    loaded = stages[name]
    stage = cast(DiffusionStage, loaded.stage)
    prepared = data.prepare(source, loaded.tokenizer, loaded.context_length or 0, stage.degrading)
    batch, _ = data.fixed_batch(prepared, indices)
    frozen = {required: stages[required].variables for required in stage.requires}
    return stage.example(loaded.variables.stats, rng.root(seed), stage.prepare(frozen, batch))


def bits_per_dim(
    stages: Mapping[str, LoadedStage],
    name: str,
    source: data.Source,
    num: int,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Returns the mean bound over ``num`` images, and its parts; ``progress`` shows a progress bar.

    Returns:
        "total", "prior" and "vlb" in bits per dimension; "n", which is ``num``; and "interval", the 95 % interval of
        each mean (``intervals.of_mean``), None for one image.

    Raises:
        UserError: a stage that does not generate images.
    """
    if stages[name].stage.image_size is None:
        raise UserError(f"bits per dimension are measured on images, and stage {name} generates none")
    stage, params = cast(DiffusionStage, stages[name].stage), stages[name].variables.params
    measure = jax.jit(stage.bits_per_dim)
    totals, priors = [], []
    for start in tqdm.tqdm(range(0, num, batch_size), desc="measuring", unit="batch", disable=not progress):
        indices = [min(start + i, num - 1) for i in range(batch_size)]  # the last batch is padded
        x_0, condition = examples(stages, name, source, indices, seed)
        keys = rng.per_image(rng.root(seed), jnp.asarray(indices, jnp.int32))
        bits = measure(params, keys, x_0, condition)
        count = min(batch_size, num - start)
        totals.extend(np.asarray(bits["total"])[:count])
        priors.extend(np.asarray(bits["prior"])[:count])
    values = {"total": np.asarray(totals, np.float64), "prior": np.asarray(priors, np.float64)}
    values["vlb"] = values["total"] - values["prior"]
    means = {name: float(value.mean()) for name, value in values.items()}
    return {**means, "n": num, "interval": {name: intervals.of_mean(value) for name, value in values.items()}}


def noise_statistics(
    stages: Mapping[str, LoadedStage],
    name: str,
    source: data.Source,
    num: int,
    seed: int,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Returns the content of a stage's ``noise_statistics.json``; ``progress`` shows a progress bar.

    Returns:
        "step", of the checkpoint; "eps", the mean power of the predicted noise at each timestep; and "x_0", that of the
        data (``diffusion.NoiseStatistics``).

    Raises:
        UserError: a stage without diffusion.
    """
    if stages[name].stage.diffusion_steps is None:
        raise UserError(f"noise statistics are measured on a diffusion stage, and stage {name} is none")
    stage, variables = cast(DiffusionStage, stages[name].stage), stages[name].variables
    steps = jnp.arange(stage.schedule.num_steps)

    @jax.jit
    def power(params, key, x_0, condition):
        return jax.lax.map(lambda t: stage.noise_power(params, rng.at_step(key, t), x_0, condition, t), steps)

    key = rng.stream(rng.root(seed), "moments")  # the name of the stream is part of the results
    eps, second = np.zeros(len(steps)), 0.0
    for start in tqdm.tqdm(range(0, num, batch_size), desc="measuring", unit="batch", disable=not progress):
        indices = range(start, min(start + batch_size, num))
        x_0, condition = examples(stages, name, source, indices, seed)
        share = len(indices) / num
        eps += share * np.asarray(power(variables.params, rng.at_step(key, start), x_0, condition))
        second += share * float(jnp.mean(x_0**2))
    return {"step": stages[name].step, "eps": eps.tolist(), "x_0": second}
