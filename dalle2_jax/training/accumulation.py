"""Gradient accumulation: the gradients of a batch, computed in micro-batches, in the memory of one.

The loss of most stages is a mean over examples. With count micro-batches of equal size,

    grad L(B) = 1 / count sum_j grad L(B_j)                                                   (1)

A contrastive loss is no such mean. Its gradients are computed in three passes (Gao et al. 2021, arXiv 2101.06983,
section 3.2, GradCache): the embeddings z of all micro-batches without gradients; dL/dz of the whole batch, and the
gradients of what only the loss reads (CLIP's temperature); and, micro-batch by micro-batch, the embeddings again with

    dL/dw = sum_j (dL/dz_j) (dz_j/dw)                                                         (2)

Both equal the gradients of the whole batch, except for the order of summation: what is random is sampled for the whole
batch (``rng.per_row``). Statistics that a step changes, such as a loss history, change after every micro-batch.

Micro-batch j is the rows j, j + count, j + 2 count, ..: a batch that is sharded over devices stays where it is.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback, with_logical_constraint
from jax.sharding import Mesh, PartitionSpec

from dalle2_jax import rng
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages.base import Embeddings, Outputs, Stage, Variables
from dalle2_jax.training.sharding import batch_shards
from dalle2_jax.types import Batch, Metrics, Params, WeightedMean

Gradients = tuple[tuple[jax.Array, Outputs], Params]
"""((loss, outputs), gradients of the parameters), as of ``jax.value_and_grad``."""


def check_accumulation(stage: Stage, count: int, batch_size: int, mesh: Mesh) -> None:
    """Checks that a stage's batch can be computed in micro-batches.

    Raises:
      ConfigError: the stage's loss needs the whole batch, or the micro-batches do not divide over the devices.
    """
    reason = stage.training_rules.whole_batch
    if count > 1 and reason:
        raise ConfigError(
            f"config.optim.accumulate {count} is not possible for stage {stage.name}: {reason}. Use accumulate 1",
            "optim.accumulate",
        )
    shards = batch_shards(mesh)
    if batch_size % (count * shards):
        nearest = nearest_divisor(batch_size // shards, count)
        raise ConfigError(
            f"config.optim.accumulate {count} does not divide batch_size {batch_size} over {shards} device(s): "
            f"the nearest that does is {nearest}",
            "optim.accumulate",
        )


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of a number that is nearest to the one wanted."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))


def loss_and_gradients(
    stage: Stage, count: int, variables: Variables, frozen: Mapping[str, Variables], key: jax.Array, batch: Batch
) -> Gradients:
    """Returns the loss of a batch with its outputs, and the gradients of the parameters.

    Args:
      stage: what is trained.
      count: number of micro-batches; 1 computes the batch at once.
      variables: parameters and statistics.
      frozen: the variables of the stages that ``stage.requires`` names.
      key: of the step.
      batch: a global batch, as the stream yields it.
    """
    params, stats = variables
    if count == 1:
        prepared = stage.prepare(frozen, batch)
        return jax.value_and_grad(stage.loss, has_aux=True)(params, stats, frozen, key, prepared)
    gradients = _cached if stage.contrastive else _averaged
    return gradients(stage, count, variables, frozen, key, batch)


def _averaged(
    stage: Stage, count: int, variables: Variables, frozen: Mapping[str, Variables], key: jax.Array, batch: Batch
) -> Gradients:
    """Eq. (1)."""
    params, stats = variables

    def add(carry: tuple[Params, Params], micro: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        (total, stats), (index, rows) = carry, micro
        with rng.micro_batch(index, count):
            prepared = stage.prepare(frozen, rows)
            grad_fn = jax.value_and_grad(stage.loss, has_aux=True)
            (loss, outputs), grads = grad_fn(params, stats, frozen, key, prepared)
        return (jax.tree.map(jnp.add, total, grads), outputs.stats), (loss, outputs.metrics)

    start = jax.tree.map(jnp.zeros_like, params), stats
    indices = jnp.arange(count, dtype=jnp.int32)
    (total, stats), (losses, metrics) = jax.lax.scan(add, start, (indices, _split(batch, count)))
    grads = jax.tree.map(lambda leaf: leaf / count, total)
    return (losses.mean(), Outputs(_means(metrics), stats)), grads


def _cached(
    stage: Stage, count: int, variables: Variables, frozen: Mapping[str, Variables], key: jax.Array, batch: Batch
) -> Gradients:
    """Eq. (2). A contrastive loss has no randomness, so ``key`` is not used."""
    params, stats = variables
    micro_batches = _split(batch, count)

    def embed(params: Params, rows: Batch) -> Embeddings:
        return stage.embed(params, stats, frozen, stage.prepare(frozen, rows))

    embeddings = _join(jax.lax.map(lambda rows: embed(params, rows), micro_batches))
    grad_fn = jax.value_and_grad(stage.contrast, argnums=(0, 3), has_aux=True)
    result, (of_loss, cotangents) = grad_fn(params, stats, frozen, embeddings)

    def add(total: Params, micro: tuple[Batch, Embeddings]) -> tuple[Params, None]:
        rows, cotangent = micro
        _, pull_back = jax.vjp(lambda params: embed(params, rows), params)
        return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

    grads, _ = jax.lax.scan(add, of_loss, (micro_batches, _split(cotangents, count)))
    return result, grads


def _split(batch: Any, count: int) -> Any:
    """Returns columns [B, ...] as micro-batches [count, B / count, ...]."""

    def split(column: jax.Array) -> jax.Array:
        rows = column.reshape(column.shape[0] // count, count, *column.shape[1:]).swapaxes(0, 1)
        axes = (None, "batch", *(PartitionSpec.UNCONSTRAINED,) * (rows.ndim - 2))
        return with_logical_constraint(rows, axes, fallback=RulesFallback.NO_CONSTRAINT)

    return jax.tree.map(split, batch)


def _join(micro_batches: Any) -> Any:
    """Inverse of `_split`."""
    return jax.tree.map(lambda rows: rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:]), micro_batches)


def _means(metrics: Metrics) -> Metrics:
    """Returns the metrics of a batch from those of its micro-batches, [count]."""

    def mean(value: jax.Array | WeightedMean) -> jax.Array | WeightedMean:
        if isinstance(value, WeightedMean):
            return WeightedMean(value.total.sum(), value.weight.sum())
        return value.mean()

    return {name: mean(value) for name, value in metrics.items()}
