"""What training and sampling may assume of a stage."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dalle2_jax.types import Batch, Metrics, Params


class Variables(NamedTuple):
    """A network's arrays: what is learned, and what is measured (BatchNorm's averages, a quantiser's edges)."""

    params: Params
    stats: Params


class Outputs(NamedTuple):
    """What ``Stage.loss`` returns beside the scalar: metrics, and the statistics after the step."""

    metrics: Metrics
    stats: Params


class Stage(Protocol):
    """One trainable part of the system: a frozen, hashable value that holds no arrays.

    Borrowed weights (CLIP under the prior, the base under a LoRA) come in as ``frozen``: they are not
    differentiated, not optimised and not checkpointed again. Only ``prepare`` sees them: what ``loss``
    needs of them, it finds in the prepared batch.
    """

    name: str
    borrows: tuple[str, ...]
    # and, where it has any, constant_stats: tuple[str, ...], names of statistics that no training changes

    def init(self, key: jax.Array) -> Variables:
        """Returns fresh variables."""

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns a larger batch with what the borrowed stages add; nothing is overwritten."""

    def loss(self, params: Params, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Outputs]:
        """Returns the float32 scalar to minimise over a prepared batch, and the rest."""


@runtime_checkable
class Calibrates(Protocol):
    """A stage, besides, whose statistics are measured once, before its first step.

    ``Stage.init`` gives zeros of the right shapes in their place. ``calibrates`` says whether the stage, as it is
    configured, has any to measure.
    """

    calibrates: bool

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics of as many training batches (on the devices, as in training) as it takes."""


@dataclasses.dataclass(frozen=True)
class EmbeddingContract:
    """Which embedding space a system speaks: which CLIP, and in what normalisation.

    Stages trained under different contracts cannot work together, though every shape fits;
    most published unCLIP attempts failed on this. ``clip`` is a fingerprint of the CLIP weights.
    ``normalisation`` is "unit" (to unit length, times ``scale``; 17.2 at 1,024 dimensions in
    Ramesh et al. 2022, App. C) or "raw" (times ``scale``).
    """

    clip: str
    dim: int
    normalisation: str = "unit"
    scale: float = 17.2


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
    # Each value is hashed with its place (MurmurHash3's finaliser), so that exchanged values and
    # flipped signs change the sum, which wraps at 2^32 and may be taken in any order.
    mixed = bits ^ jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2_654_435_761)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(multiplier)
    return jnp.sum(mixed, dtype=jnp.uint32)


def fingerprint(params: Params) -> str:
    """Returns a short name of these exact float32 weights, the same however they are sharded."""
    code = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = f"{jax.tree_util.keystr(path)}:{leaf.shape}:{int(_checksum(leaf))}"
        code = zlib.crc32(entry.encode(), code)
    return f"{code:08x}"
