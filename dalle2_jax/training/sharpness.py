"""Sharpness-aware minimisation, SAM (Foret et al. 2021, arXiv 2010.01412).

With g the gradient at the parameters w, a step descends along the gradient at w + rho g / ||g|| (eq. 2 and 3).

Where the batch is divided into replicas, each has a perturbation of its own, from the gradient of its own examples
(ibid., section 4.1, m-sharpness). The paper's CLIP has replicas of 64 (Ramesh et al. 2022, appendix C). The logits are
still those of the whole batch: with z_j the embeddings of replica j's examples, and s what the loss reads besides,
CLIP's temperature,

    g_j = (dL/dz_j) (dz_j/dw) + (dL/ds) (ds/dw) / replicas                                    (1)

and at w_j = w + rho g_j / ||g_j|| the gradient is

    sum_j (dL/dz_j)(z_1(w_1), z_2(w_2), .., s) (dz_j/dw)(w_j) + (dL/ds) (ds/dw)               (2)

where s has the mean of its perturbations. With one replica this is SAM of the whole batch. No replica is divided over
devices, so that a device finds the perturbations of its own ones without the others; parameters that are sharded are
gathered for it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from dalle2_jax.errors import ConfigError
from dalle2_jax.stages.base import Embeddings, Stage, Variables, dividing_axes
from dalle2_jax.training.accumulation import Gradients, nearest_divisor
from dalle2_jax.training.configs import OptimConfig
from dalle2_jax.training.sharding import batch_shards
from dalle2_jax.types import Batch, Params

_FIELD = "optim.sam_batch"

_SMALLEST = 1e-12
"""Norm below which a gradient counts as zero."""


class _Fixed(NamedTuple):
    """What all replicas share besides their parameters.

    Attributes:
      stats: of the stage.
      frozen: the variables of the stages that it requires.
      of_loss: a replica's share of the gradient of what only the loss reads.
    """

    stats: Params
    frozen: Mapping[str, Variables]
    of_loss: Params


def check_replicas(stage: Stage, optim: OptimConfig, batch_size: int, mesh: Mesh) -> None:
    """Checks that a stage's batch can be divided into replicas.

    Raises:
      ConfigError: ``optim.sam_batch`` is without SAM, with accumulation, for a stage whose examples are not embedded
        one by one, or does not divide a device's part of the batch.
    """
    size = optim.sam_batch
    if not size:
        return
    reason = stage.training_rules.whole_batch
    if not optim.sam_rho:
        reason = "there is no perturbation without optim.sam_rho"
    elif optim.accumulate > 1:
        reason = "its gradients are computed replica by replica already: set optim.accumulate to 1"
    elif not stage.contrastive:
        reason = "only CLIP's batch is divided into replicas"
    if reason:
        raise ConfigError(f"config.optim.sam_batch {size} is not possible for stage {stage.name}: {reason}", _FIELD)
    shards = batch_shards(mesh)
    per_device = batch_size // shards
    if per_device % size:
        raise ConfigError(
            f"config.optim.sam_batch {size} does not divide the {per_device} examples of each of {shards} device(s): "
            f"the nearest that does is {nearest_divisor(per_device, size)}",
            _FIELD,
        )


def sharpness_aware(gradients: Callable[[Params, jax.Array], Any], rho: float) -> Callable[[Params, jax.Array], Any]:
    """Returns the function of gradients for SAM with one perturbation of the whole batch.

    The result has the gradient at w + rho g / ||g||, and the value and outputs at w. Both have the same randomness.

    Args:
      gradients: (parameters, random key) -> ((value, outputs), gradients).
      rho: norm of the perturbation; 0 returns ``gradients``.
    """
    if not rho:
        return gradients

    def perturbed(params: Params, key: jax.Array) -> Any:
        value, grads = gradients(params, key)
        sharp = optax.tree.add_scale(params, _step(grads, rho), grads)
        return value, gradients(sharp, jax.random.clone(key))[1]

    return perturbed


def replica_gradients(
    stage: Stage, rho: float, size: int, variables: Variables, frozen: Mapping[str, Variables], batch: Batch
) -> Gradients:
    """Returns the loss of a batch with its outputs, and the gradients of eq. (2).

    Args:
      stage: one with a contrastive loss.
      rho: norm of each perturbation.
      size: examples of a replica; see `check_replicas`.
      variables: parameters and statistics.
      frozen: the variables of the stages that ``stage.requires`` names.
      batch: a global batch, as the stream yields it.
    """
    (params, stats), prepared = variables, stage.prepare(frozen, batch)
    contrast = jax.value_and_grad(stage.contrast, argnums=(0, 3), has_aux=True)

    def embed(params: Params, fixed: _Fixed, rows: Batch) -> Embeddings:
        return stage.embed(params, fixed.stats, fixed.frozen, rows)

    def pulled(params: Params, fixed: _Fixed, rows: Batch, cotangents: Embeddings) -> Params:
        return jax.vjp(functools.partial(embed, fixed=fixed, rows=rows), params)[1](cotangents)[0]

    def moved(params: Params, fixed: _Fixed, rows: Batch, cotangents: Embeddings) -> tuple[Params, jax.Array]:
        """Returns a replica's parameters, and its step, rho / ||g_j||."""
        grads = optax.tree.add(pulled(params, fixed, rows, cotangents), fixed.of_loss)
        step = _step(grads, rho)
        return optax.tree.add_scale(params, step, grads), step

    def embedded(params: Params, fixed: _Fixed, *columns: Any) -> tuple[Embeddings, jax.Array]:
        """Embeds each replica's rows at its own parameters; with the step of each."""

        def of_part(part: tuple[Batch, Embeddings]) -> tuple[Embeddings, jax.Array]:
            own, step = moved(params, fixed, *part)
            return embed(own, fixed, part[0]), step

        parts, steps = jax.lax.map(of_part, _parts(columns, size))
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), parts), steps

    def summed(params: Params, fixed: _Fixed, *columns: Any) -> Params:
        """Sums the gradients of all replicas, each at its own parameters, which are found again: one is in memory."""

        def add(total: Params, part: Any) -> tuple[Params, None]:
            rows, first, second = part
            own, _ = moved(params, fixed, rows, first)
            return optax.tree.add(total, pulled(own, fixed, rows, second)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), _parts(columns, size))
        return total

    (loss, outputs), (of_loss, first) = contrast(params, stats, frozen, stage.embed(params, stats, frozen, prepared))
    replicas = len(jax.tree.leaves(first)[0]) // size
    share = jax.tree.map(lambda grad: grad / replicas, of_loss)
    fixed = _Fixed(stats, frozen, share)
    apart, steps = _on_each_device(embedded, summed=False)(params, fixed, prepared, first)
    _, (of_loss, second) = contrast(optax.tree.add_scale(params, steps.mean(), share), stats, frozen, apart)
    grads = _on_each_device(summed, summed=True)(params, fixed, prepared, first, second)
    return (loss, outputs), optax.tree.add(of_loss, grads)


def _step(grads: Params, rho: float) -> jax.Array:
    """Returns rho / ||g||."""
    return rho / jnp.maximum(optax.tree.norm(grads), _SMALLEST)


def _parts(columns: Any, size: int) -> Any:
    """Returns columns [B, ...] as replicas [B / size, size, ...]."""
    return jax.tree.map(lambda column: column.reshape(-1, size, *column.shape[1:]), columns)


def _on_each_device(function: Callable[..., Any], summed: bool) -> Callable[..., Any]:
    """Returns a function that runs on each device's rows of its columns, with whole parameters.

    Args:
      function: (params, fixed, *columns) -> rows, or with ``summed`` what is summed over the devices.
      summed: which.
    """
    axes = dividing_axes()
    rows, whole = PartitionSpec(axes), PartitionSpec()

    def local(params: Params, fixed: Any, *columns: Any) -> Any:
        with nn.logical_axis_rules(()):  # the constraints of networks are about arrays of all devices
            result = function(params, fixed, *columns)
        return jax.lax.psum(result, axes) if summed and axes else result

    def call(params: Params, fixed: Any, *columns: Any) -> Any:
        if not axes:
            return local(params, fixed, *columns)
        specs = (whole, whole, *(rows for _ in columns))
        mapped = jax.shard_map(
            local, in_specs=specs, out_specs=whole if summed else rows, axis_names=set(axes), check_vma=False
        )
        return mapped(params, fixed, *columns)

    return call
