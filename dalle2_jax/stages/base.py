"""What training and sampling may assume of a stage."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Key

from dalle2_jax.models import linear
from dalle2_jax.stages.contract import EmbeddingContract
from dalle2_jax.types import Batch, Degrading, Metrics, Params

BATCH_AXES = ("data", "fsdp")
"""Axes of a mesh over which the batch is sharded."""


class Variables(NamedTuple):
    """A network's arrays: what is learned, and what is measured (BatchNorm's averages, a quantiser's edges)."""

    params: Params
    stats: Params


def unchanged(params: Params) -> Params:
    """Returns ``params``: the projection of a stage without constraints."""
    return params


def dividing_axes() -> tuple[str, ...]:
    """Returns the axes that divide the batch, of more than one device, of the mesh that a program is traced for."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in BATCH_AXES if sizes.get(name, 1) > 1)


@dataclasses.dataclass(frozen=True)
class TrainingRules:
    """What the train step does differently for one kind of stage.

    Attributes:
      decay: (regular expression on a parameter's path, whether it is decayed), which go before
        ``training.optim.DECAY_RULES``; the first match wins.
      averaged_stats: names of the statistics that are averaged as the weights are, because the averaged weights are
        used with them: running means and variances of batch norms.
      project: maps the parameters to the nearest allowed ones, after every update. It is traced.
      whole_batch: why the loss of a batch is not that of its micro-batches, for the error message of
        ``optim.accumulate``; empty if it is.
    """

    decay: tuple[tuple[str, bool], ...] = ()
    averaged_stats: tuple[str, ...] = ()
    project: Callable[[Params], Params] = unchanged
    whole_batch: str = ""


class Network(Protocol):
    """A Flax module: what `apply` needs of it."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


def apply(network: Network, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Applies a network without mutable collections; ``kwargs`` are those of ``flax.linen.Module.apply``."""
    with linear.shapes_only():
        return network.apply({"params": params}, *args, **kwargs)


class Outputs(NamedTuple):
    """What ``Stage.loss`` returns in addition to the scalar: metrics, and the statistics after the step."""

    metrics: Metrics
    stats: Params


Embeddings = Mapping[str, jax.Array]
"""What ``Stage.embed`` returns: float32[B, E] by name."""


class Stage(Protocol):
    """One trainable part of the system: a frozen, hashable value that holds no arrays.

    ``frozen`` maps the names in ``requires`` to the variables of those stages (CLIP for the prior, the base weights
    for a LoRA). They are constants of the training step: not differentiated, not optimised, not checkpointed again.
    `StageDefaults` has the members that most stages do not change.
    """

    @property
    def name(self) -> str:
        """The stage's name, which is also the name of its folder in a system."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the columns of a prepared batch that ``loss`` reads; see `select_columns` for those of the data."""
        ...

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the stages whose variables ``prepare`` and ``loss`` need."""
        ...

    @property
    def constant_stats(self) -> tuple[str, ...]:
        """Names of the statistics that training does not change."""
        ...

    @property
    def degrading(self) -> Degrading | None:
        """The degradation that makes "low_res" from "image" on the host; None where the data are not degraded."""
        ...

    @property
    def training_rules(self) -> TrainingRules:
        """What the train step does differently for this stage."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether ``calibrate`` has to be called before the first step."""
        ...

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images that the stage generates; None for a stage that generates no images."""
        ...

    @property
    def diffusion_steps(self) -> int | None:
        """T of the forward process; None for a stage without diffusion."""
        ...

    def init(self, key: Key[Array, ""]) -> Variables:
        """Returns initial variables; statistics that ``calibrate`` measures are zeros of the right shapes."""
        ...

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics, measured on as many training batches (on the devices) as it takes."""
        ...

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns the batch with the columns of ``inputs`` that it lacks; existing columns are not overwritten."""
        ...

    def loss(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> tuple[jax.Array, Outputs]:
        """Returns the float32 scalar to minimise over a prepared batch, with metrics and the new statistics."""
        ...

    @property
    def contrastive(self) -> bool:
        """Whether the loss compares the examples of a batch with each other: it is ``contrast`` of ``embed``."""
        ...

    def embed(self, params: Params, stats: Params, frozen: Mapping[str, Variables], batch: Batch) -> Embeddings:
        """Returns the embeddings of a prepared batch, each of which depends on its own example only."""
        ...

    def contrast(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], embeddings: Embeddings
    ) -> tuple[jax.Array, Outputs]:
        """Returns what ``loss`` does, from the embeddings of the whole batch."""
        ...

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns measures of a prepared batch of held-out examples, in addition to the metrics of ``loss``."""
        ...

    def contract(self, params: Params) -> EmbeddingContract | None:
        """Returns the embedding contract of these CLIP weights; None for a stage that is no CLIP."""
        ...

    def adapted(self, params: Params) -> Params:
        """Returns the weights of the stage that a run starts from, for this stage's network."""
        ...

    def merged(self, frozen: Mapping[str, Variables], variables: Variables) -> Variables:
        """Returns the variables to sample with: those given, or for a LoRA the base weights with the change added."""
        ...


@functools.lru_cache(maxsize=16)  # tracing a large network takes seconds, and a run needs its shapes several times
def abstract_variables(stage: Stage) -> Variables:
    """Returns the shapes of a stage's variables; no array is allocated."""
    return jax.eval_shape(stage.init, jax.random.key(0))


class StageDefaults:
    """The members of `Stage` that most stages have in common. It is inherited, and has no fields."""

    @property
    def requires(self) -> tuple[str, ...]:
        """No other stage is needed."""
        return ()

    @property
    def constant_stats(self) -> tuple[str, ...]:
        """All statistics belong to training."""
        return ()

    @property
    def degrading(self) -> Degrading | None:
        """The data are not degraded."""
        return None

    @property
    def training_rules(self) -> TrainingRules:
        """The default rules."""
        return TrainingRules()

    @property
    def calibrates(self) -> bool:
        """No statistics are measured before training."""
        return False

    @property
    def image_size(self) -> int | None:
        """No images are generated."""
        return None

    @property
    def diffusion_steps(self) -> int | None:
        """There is no diffusion."""
        return None

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Raises NotImplementedError: ``calibrates`` is False."""
        raise NotImplementedError(f"{type(self).__name__} has no statistics to measure")

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns the batch unchanged."""
        return batch

    @property
    def contrastive(self) -> bool:
        """The loss of an example depends on no other example."""
        return False

    def embed(self, params: Params, stats: Params, frozen: Mapping[str, Variables], batch: Batch) -> Embeddings:
        """Raises NotImplementedError: ``contrastive`` is False."""
        raise NotImplementedError(f"{type(self).__name__} is not contrastive")

    def contrast(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], embeddings: Embeddings
    ) -> tuple[jax.Array, Outputs]:
        """Raises NotImplementedError: ``contrastive`` is False."""
        raise NotImplementedError(f"{type(self).__name__} is not contrastive")

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns nothing: the loss and its metrics are all that is measured."""
        return {}

    def contract(self, params: Params) -> EmbeddingContract | None:
        """Returns None: the stage is no CLIP."""
        return None

    def adapted(self, params: Params) -> Params:
        """Returns the weights unchanged: the networks are the same."""
        return params

    def merged(self, frozen: Mapping[str, Variables], variables: Variables) -> Variables:
        """Returns the variables unchanged."""
        return variables


CLIP_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image_emb": ("image",),
    "text_emb": ("tokens", "mask"),
    "text_seq": ("tokens", "mask"),
    "null_text_emb": ("tokens", "mask"),
    "null_text_seq": ("tokens", "mask"),
    "null_mask": ("tokens", "mask"),
}
"""Columns of a batch that CLIP computes, and the columns that it computes them from."""


def clip_columns(inputs: Iterable[str]) -> tuple[str, ...]:
    """Returns those of ``inputs`` that CLIP computes, which a data set of embeddings stores."""
    return tuple(name for name in inputs if name in CLIP_COLUMNS)


def select_columns(inputs: Iterable[str], available: Collection[str]) -> tuple[str, ...]:
    """Returns the columns to select from a data set for a stage.

    Args:
      inputs: the stage's ``inputs``.
      available: the columns that the data set has.

    Returns:
      ``inputs``; an embedding that the data set lacks is replaced by the columns that CLIP computes it from, which
      ``Stage.prepare`` then does. Other columns that the data set lacks are left in place, for its error message.
    """
    names: dict[str, None] = {}
    for name in inputs:
        computed = name in CLIP_COLUMNS and name not in available
        names |= dict.fromkeys(CLIP_COLUMNS[name] if computed else (name,))
    return tuple(names)
