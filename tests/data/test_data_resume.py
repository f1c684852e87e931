"""Every kind of data goes on, in the middle of a shard, with the batch that would have come."""

import json

import cv2
import numpy as np
import pytest
from test_embeddings import LENGTH, task_of
from test_retrieval_layout import write as write_retrieval

from dalle2_jax.data import (
    EmbeddingsConfig,
    FolderConfig,
    FolderSource,
    MixtureConfig,
    ShapesConfig,
    TfdsConfig,
    WebdatasetConfig,
    convert,
    make_source,
    make_stream,
)
from dalle2_jax.data.embed import write_split
from dalle2_jax.testing import WordTokenizer

COUNT = 11


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Eleven pictures, one of them torn, in every form; shards of four where there are shards."""
    root, noise, lines = tmp_path_factory.mktemp("forms"), np.random.default_rng(0), []
    folder = root / "folder"
    folder.mkdir()
    for number in range(COUNT):
        cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(9, 12, 3), dtype=np.uint8))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": [f"red {number}", f"blue {number}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:50])
    before, convert.SHARD_SIZE = convert.SHARD_SIZE, 4
    for form in convert.FORMATS:
        convert.convert({"train": FolderSource(folder)}, root / form, form)
    convert.SHARD_SIZE = before
    write_split(task_of(folder, root / "embeddings", shard_size=4))
    write_retrieval(root / "retrieval", [[(number, f"red {number}")] for number in range(COUNT)])
    how = {"resolution": 8, "crop": "random"}
    found = {
        "folder": FolderConfig(str(folder), **how),
        "webdataset": WebdatasetConfig(str(root / "webdataset"), **how),
        "tfds": TfdsConfig(str(root / "arrayrecord"), **how),
        "embeddings": EmbeddingsConfig(str(root / "embeddings")),
        "retrieval": EmbeddingsConfig(str(root / "retrieval")),
        "paired": FolderConfig(str(folder), **how, embeddings=str(root / "embeddings")),
        "shapes": ShapesConfig(8, num_examples=COUNT),
    }
    parts = {name: found[name] for name in ("webdataset", "shapes")}
    return {**found, "mixture": MixtureConfig(parts, {"webdataset": 2.0, "shapes": 1.0}, 8)}


KINDS = ("folder", "webdataset", "tfds", "embeddings", "retrieval", "paired", "shapes", "mixture")


def stream_of(configs, kind, batch_size=4, **how):
    return make_stream(make_source(configs[kind], "train"), WordTokenizer(), LENGTH, batch_size, seed=7, **how)


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_goes_on(configs, kind):
    whole = stream_of(configs, kind)
    batches = [next(whole) for _ in range(7)]  # of more than two passes
    for begun in (1, 3):
        stream = stream_of(configs, kind)
        for _ in range(begun):
            next(stream)
        resumed = stream_of(configs, kind)
        resumed.set_state(json.loads(json.dumps(stream.get_state())))
        assert_same([next(resumed) for _ in range(7 - begun)], batches[begun:])


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_and_one_goes_on(configs, kind):
    """Two see together what one sees, and after them one."""
    whole = stream_of(configs, kind)
    batches = [next(whole) for _ in range(6)]
    shares = [stream_of(configs, kind, process_index=number, process_count=2) for number in range(2)]
    for batch in batches[:3]:
        rows = [next(share) for share in shares]
        for name, row in batch.items():
            np.testing.assert_array_equal(np.stack([one[name] for one in rows], axis=1).reshape(row.shape), row)
    alone = stream_of(configs, kind)
    alone.set_state(shares[0].get_state())
    assert_same([next(alone) for _ in range(3)], batches[3:])


@pytest.mark.parametrize("kind", ["webdataset", "paired", "mixture"])
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(configs, kind, workers):
    whole = stream_of(configs, kind)
    batches = [next(whole) for _ in range(6)]
    stream = stream_of(configs, kind, num_workers=workers)
    stream.set_state({"global_next_index": 8})
    assert_same([next(stream) for _ in range(4)], batches[2:])
    stream.close()
