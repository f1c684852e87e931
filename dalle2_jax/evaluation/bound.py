"""What a trained network is worth as a model of its data, and what Analytic-DPM has to know of it.

Both go over every step of the schedule with held examples: bits per dimension (``diffusion.likelihood``) and the
mean power of the predicted noise (``diffusion.variance``, eq. 6).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dalle2_jax import data, rng
from dalle2_jax.generation import Member
from dalle2_jax.stages import DiffusionStage, PriorStage, UpsamplerStage
from dalle2_jax.types import UserError


def examples(
    members: Mapping[str, Member], name: str, source: data.Source, indices: Sequence[int], seed: int
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Returns x_0 of examples as stage ``name`` diffuses it, and what it is told of them."""
    member = members[name]
    degrading = member.stage.degrading if isinstance(member.stage, UpsamplerStage) else None
    batch, _ = data.fixed_batch(source, member.tokenizer, member.context_length or 2, indices, degrading)
    frozen = {borrowed: members[borrowed].variables for borrowed in member.stage.borrows}
    return member.stage.example(member.variables.stats, rng.root(seed), member.stage.prepare(frozen, batch))


def bits_per_dim(
    members: Mapping[str, Member], name: str, source: data.Source, num: int, batch_size: int, seed: int
) -> dict[str, float]:
    """Returns the mean bound over ``num`` pictures, and its parts: "total", "prior", "vlb"; bits per dimension.

    Raises:
        UserError: a stage that does not draw pictures.
    """
    stage, params = members[name].stage, members[name].variables.params
    if not isinstance(stage, DiffusionStage) or isinstance(stage, PriorStage):
        raise UserError(f"bits per dimension are of pictures, and stage {name} draws none")
    measure = jax.jit(stage.bits_per_dim)
    totals, priors = [], []
    for start in tqdm.tqdm(range(0, num, batch_size), desc="measuring", unit="batch"):
        indices = [min(start + i, num - 1) for i in range(batch_size)]  # the last batch is filled up
        x_0, condition = examples(members, name, source, indices, seed)
        keys = rng.per_image(rng.root(seed), jnp.asarray(indices, jnp.int32))
        bits = measure(params, keys, x_0, condition)
        kept = min(batch_size, num - start)
        totals.extend(np.asarray(bits["total"])[:kept])
        priors.extend(np.asarray(bits["prior"])[:kept])
    total, prior = float(np.mean(totals)), float(np.mean(priors))
    return {"total": total, "prior": prior, "vlb": total - prior}


def noise_moments(
    members: Mapping[str, Member], name: str, source: data.Source, num: int, seed: int, batch_size: int = 16
) -> dict[str, object]:
    """Returns what ``moments.json`` of a stage holds: "step", "eps" (a number a timestep) and "x_0".

    Raises:
        UserError: a stage without diffusion.
    """
    stage, variables = members[name].stage, members[name].variables
    if not isinstance(stage, DiffusionStage):
        raise UserError(f"noise moments are of a diffusion, and stage {name} is none")
    steps = jnp.arange(stage.schedule.num_steps)

    @jax.jit
    def power(params, key, x_0, condition):
        return jax.lax.map(lambda t: stage.noise_power(params, rng.at_step(key, t), x_0, condition, t), steps)

    key = rng.stream(rng.root(seed), "moments")
    eps, second = np.zeros(len(steps)), 0.0
    for start in tqdm.tqdm(range(0, num, batch_size), desc="measuring", unit="batch"):
        indices = range(start, min(start + batch_size, num))
        x_0, condition = examples(members, name, source, indices, seed)
        share = len(indices) / num
        eps += share * np.asarray(power(variables.params, rng.at_step(key, start), x_0, condition))
        second += share * float(jnp.mean(x_0**2))
    return {"step": members[name].step, "eps": eps.tolist(), "x_0": second}
