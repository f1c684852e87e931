"""The same eleven captioned images, one of them truncated, in every format that is read."""

import json

import cv2
import numpy as np
from embedding_tasks import task_of
from retrieval_folders import write as write_retrieval

from dalle2_jax.data import (
    EmbeddingsConfig,
    FolderConfig,
    FolderSource,
    MixtureConfig,
    TfdsConfig,
    WebdatasetConfig,
)
from dalle2_jax.data.embeddings.write import write_split
from dalle2_jax.data.tools import convert

COUNT = 11


def write_every_format(root, height, shapes, states=False):
    """Writes images of ``height`` x 12 pixels below a folder.

    Args:
      root: the folder.
      height: of the images, which are read at 8 x 8.
      shapes: the configuration of the generated images.
      states: whether text states are stored with the embeddings.

    Returns:
      name -> configuration of each data set, a mixture among them.
    """
    noise, lines, folder = np.random.default_rng(0), [], root / "folder"
    folder.mkdir()
    for number in range(COUNT):
        cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(height, 12, 3), dtype=np.uint8))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": [f"red {number}", f"blue {number}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:50])
    for form in convert.FORMATS:
        convert.convert({"train": FolderSource(folder)}, root / form, form)
    write_split(task_of(folder, root / "embeddings", shard_size=4, states=states))
    write_retrieval(root / "retrieval", [[(number, f"red {number}")] for number in range(COUNT)])
    options = {"resolution": 8, "crop": "random"}
    found = {
        "folder": FolderConfig(str(folder), **options),
        "webdataset": WebdatasetConfig(str(root / "webdataset"), **options),
        "tfds": TfdsConfig(str(root / "arrayrecord"), **options),
        "embeddings": EmbeddingsConfig(str(root / "embeddings")),
        "retrieval": EmbeddingsConfig(str(root / "retrieval")),
        "paired": FolderConfig(str(folder), **options, embeddings=str(root / "embeddings")),
        "shapes": shapes,
    }
    parts = {name: found[name] for name in ("webdataset", "shapes")}
    return {**found, "mixture": MixtureConfig(parts, {"webdataset": 2.0, "shapes": 1.0}, 8)}
