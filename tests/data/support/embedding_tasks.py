"""Writes small folders of stored embeddings with an embedder that needs no network."""

import dataclasses
import json

import numpy as np

from dalle2_jax.data import FolderSource
from dalle2_jax.data.embeddings.write import Task
from dalle2_jax.testing import WordTokenizer

DIM, LENGTH = 6, 8
CONTRACT = {"clip": "12345678", "dim": DIM, "normalisation": "unit", "scale": 1.5}


class SumEmbedder:
    """Embeds images by their first pixels and captions by their tokens; counts its calls for images.

    Args:
        max_calls: The call after this many raises KeyboardInterrupt, to simulate a killed run.
    """

    batch_size = 4

    def __init__(self, max_calls=10**9):
        self.calls, self.max_calls = 0, max_calls

    def images(self, images):
        self.calls += 1
        if self.calls > self.max_calls:
            raise KeyboardInterrupt
        assert images.dtype == np.uint8 and len(images) <= self.batch_size
        return images.reshape(len(images), -1).astype(np.float32)[:, :DIM]

    def captions(self, tokens, mask):
        assert len(tokens) <= self.batch_size
        states = np.repeat(tokens[:, :, None], 3, axis=2).astype(np.float32) / 7
        return {"text_emb": tokens[:, :DIM].astype(np.float32), "text_seq": states}

    def empty(self, tokens, mask):
        columns = self.captions(tokens, mask)
        return {"null_text_emb": columns["text_emb"][0], "null_text_seq": columns["text_seq"][0], "null_mask": mask[0]}


def task_of(image_folder, out, embedder=None, **fields):
    """Returns the `Task` that embeds the train split of an image folder into ``out``, in shards of three images."""
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "clip" / "contract.json").write_text(json.dumps(CONTRACT))
    source = FolderSource(image_folder, resolution=8)
    task = Task(source, "train", embedder or SumEmbedder(), WordTokenizer(), LENGTH, out, shard_size=3)
    return dataclasses.replace(task, **fields)
