"""Batched CLIP inference: images and captions from the host in, embeddings out, on all devices."""

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float32, Int32, UInt8

from dalle2_jax.stages import ClipStage
from dalle2_jax.system.loaded_stage import LoadedStage


class ClipEmbedder:
    """A loaded CLIP that computes embeddings in batches of one size, padded if necessary, so that it compiles once.

    Args:
      clip: a loaded CLIP.
      sharding: how a batch is split over the devices.
      batch_size: rows of a batch, rounded up to a multiple of the devices.
    """

    def __init__(self, clip: LoadedStage, sharding: NamedSharding, batch_size: int):
        devices = sharding.mesh.size
        self.batch_size = -(-batch_size // devices) * devices
        self._variables, self._sharding = clip.variables, sharding
        stage = cast(ClipStage, clip.stage)
        self._encode_image = jax.jit(stage.encode_image)
        self._encode_text = jax.jit(stage.encode_text)
        self._encode_empty = jax.jit(stage.encode_empty)

    def images(self, image: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B E"]:
        """Returns the embeddings of at most ``batch_size`` images, in the space of the embedding contract."""
        return self._run(self._encode_image, image)

    def captions(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns text_emb and text_seq of at most ``batch_size`` captions."""
        return self._run(self._encode_text, {"tokens": tokens, "mask": mask})

    def empty(self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> dict[str, np.ndarray]:
        """Returns null_text_emb, null_text_seq and null_mask of the empty caption, one row each, given any captions."""
        rows = self._run(self._encode_empty, {"tokens": tokens, "mask": mask})
        return {name: row[0] for name, row in rows.items()}

    def _run(self, program: Callable[..., Any], rows: Any) -> Any:
        size = len(jax.tree.leaves(rows)[0])
        padded = jax.tree.map(lambda row: np.pad(row, [(0, self.batch_size - size)] + [(0, 0)] * (row.ndim - 1)), rows)
        result = program(self._variables, jax.device_put(padded, self._sharding))
        return jax.tree.map(lambda row: _to_numpy(row)[:size], result)


def _to_numpy(array: jax.Array) -> np.ndarray:
    row = np.asarray(array)
    return row if row.dtype == bool else row.astype(np.float32)
