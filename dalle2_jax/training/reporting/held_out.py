"""The evaluation of a run on held-out examples: always the same ones, with the same noise."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax import rng
from dalle2_jax.stages.base import Stage, Variables
from dalle2_jax.training.reporting.metrics import mean_of_finite
from dalle2_jax.training.sharding import batch_shards, logical_axes, replicated, shard_batch
from dalle2_jax.types import Batch, Metrics

PREFIX = "val/"
"""Of the names of the metrics."""

EXAMPLES = 256
"""Number of held-out examples, rounded up to full batches; fewer if the split has fewer."""


def batch_rows(examples: int, batch_size: int, mesh: Mesh) -> list[range]:
    """Returns the indices of the held-out batches; [] if there are fewer examples than devices.

    Batches have the size of those of training, which decides CLIP's loss, or are smaller if the split is.

    Args:
      examples: number of examples of the split.
      batch_size: of training.
      mesh: of devices, over which each batch is sharded.
    """
    devices = batch_shards(mesh)
    size = min(batch_size, examples) // devices * devices
    count = min(-(-EXAMPLES // size), examples // size) if size else 0
    return [range(number * size, (number + 1) * size) for number in range(count)]


def make_evaluation(
    stage: Stage, frozen: Mapping[str, Variables], batches: Callable[[], Iterable[Batch]], mesh: Mesh
) -> Callable[[Variables, int], Mapping[str, float]]:
    """Returns the hook `Hooks.evaluate` that measures averaged variables.

    Args:
      stage: what is trained.
      frozen: the variables of the stages that ``stage.requires`` names.
      batches: returns this process's rows of the held-out batches.
      mesh: of devices.

    Returns:
      A function that returns ``val/loss``, and the other metrics of the loss and of ``stage.measure`` with the same
      prefix, means over the batches. It raises FloatingPointError for one that is not finite.
    """

    def measure(variables: Variables, frozen: Mapping[str, Variables], key: jax.Array, batch: Batch) -> Metrics:
        with logical_axes(mesh):
            prepared = stage.prepare(frozen, batch)
            loss, outputs = stage.loss(*variables, frozen, rng.stream(key, "loss"), prepared)
            measures = stage.measure(variables, frozen, rng.stream(key, "measure"), prepared)
            return {"loss": loss, **outputs.metrics, **measures}

    compiled = jax.jit(measure, out_shardings=replicated(mesh))
    key = rng.stream(rng.root(0), "held_out")

    def evaluate(variables: Variables, step: int) -> Mapping[str, float]:
        history: list[Any] = [
            (step, compiled(variables, frozen, rng.at_step(key, number), shard_batch(rows, mesh)))
            for number, rows in enumerate(batches())
        ]
        named: list[tuple[int, Metrics]] = [
            (step, {f"{PREFIX}{name}": value for name, value in metrics.items()})
            for step, metrics in jax.device_get(history)
        ]
        return mean_of_finite(named)

    return evaluate
