"""CLIP at work for others: pictures and captions from the host in, their embeddings out, on all devices."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Int32, UInt8

from dalle2_jax.generation.system import Member


class ClipEmbedder:
    """A loaded CLIP that embeds ``batch_size`` rows at a time, the last ones padded, so that it compiles once.

    Args:
      clip: a system's CLIP.
      sharding: how a batch is split over the devices.
      batch_size: rows at a time, rounded up to a whole number on every device.
    """

    def __init__(self, clip: Member, sharding: NamedSharding, batch_size: int):
        devices = sharding.mesh.size
        self.batch_size = -(-batch_size // devices) * devices
        self._variables, self._sharding = clip.variables, sharding
        self._encode = jax.jit(clip.stage.encode_image)
        self._read = jax.jit(clip.stage.read)
        self._read_empty = jax.jit(clip.stage.read_empty)

    def images(self, pictures: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B E"]:
        """Embeds at most ``batch_size`` pictures, in the contract's space."""
        return self._run(self._encode, pictures)

    def captions(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns text_emb and text_seq of at most ``batch_size`` captions."""
        return self._run(self._read, {"tokens": tokens, "mask": mask})

    def empty(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns the empty caption's null_text_emb, null_text_seq and null_mask, one row each, given any captions."""
        rows = self._run(self._read_empty, {"tokens": tokens, "mask": mask})
        return {name: row[0] for name, row in rows.items()}

    def _run(self, program: Callable, rows: jax.Array | dict) -> np.ndarray | dict[str, np.ndarray]:
        size = len(jax.tree.leaves(rows)[0])
        padded = jax.tree.map(lambda row: np.pad(row, [(0, self.batch_size - size)] + [(0, 0)] * (row.ndim - 1)), rows)
        said = program(self._variables, jax.device_put(padded, self._sharding))
        return jax.tree.map(lambda row: _plain(row)[:size], said)


def _plain(row: jax.Array) -> np.ndarray:
    row = np.asarray(row)
    return row if row.dtype == bool else row.astype(np.float32)
