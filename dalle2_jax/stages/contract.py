"""The embedding contract: which CLIP embeddings a stage was trained on."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from dalle2_jax.errors import ContractError
from dalle2_jax.ranges import EmbeddingScale, Width
from dalle2_jax.types import Params, Preprocessing


@dataclasses.dataclass(frozen=True)
class EmbeddingContract:
    """The embedding space of a system: the CLIP that it comes from, and how its embeddings are normalised.

    Stages that were trained in different spaces do not work together, although all shapes fit.

    Attributes:
      clip: fingerprint of the CLIP weights.
      dim: width of the embeddings.
      normalisation: "unit" (to unit length, times ``scale``; 17.2 at 1,024 dimensions in Ramesh et al. 2022, App. C) or
        "raw" (times ``scale``).
      scale: the factor.
      preprocessing: how images of any size become CLIP's input. Contracts of early versions lack it and have the
        default.
    """

    clip: str
    dim: Width
    normalisation: str = "unit"
    scale: EmbeddingScale = 17.2
    preprocessing: Preprocessing = Preprocessing()

    def differences(self, other: "EmbeddingContract") -> dict[str, tuple[Any, Any]]:
        """Returns field -> (this value, the other's) for each field in which two contracts differ; {} if they agree."""
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def check(self, other: "EmbeddingContract", what: str, remedy: str) -> None:
        """Raises ContractError "<what> (<the differences>): <remedy>" unless two contracts agree."""
        differences = self.differences(other)
        if differences:
            listed = ", ".join(f"{name} {mine!r} against {theirs!r}" for name, (mine, theirs) in differences.items())
            raise ContractError(f"{what} ({listed}): {remedy}", differences)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    # The index in row-major order, axis by axis: flattening a sharded array would gather it.
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        index, stride = index + place * jnp.uint32(stride % 2**32), stride * leaf.shape[axis]
    # Each value is hashed with its index (MurmurHash3's finaliser), so that exchanged values and flipped signs change
    # the sum. It wraps at 2^32, and does not depend on the order of summation.
    mixed = bits ^ index * jnp.uint32(2_654_435_761)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(multiplier)
    return jnp.sum(mixed, dtype=jnp.uint32)


def fingerprint(params: Params) -> str:
    """Returns a hash of float32 weights as 8 hex digits, which does not depend on how they are sharded."""
    code = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        entry = f"{jax.tree_util.keystr(path)}:{leaf.shape}:{int(_checksum(leaf))}"
        code = zlib.crc32(entry.encode(), code)
    return f"{code:08x}"
