"""Every data format resumes mid-shard with exactly the next batch."""

import json

import numpy as np
import pytest
from embedding_tasks import LENGTH
from every_format import COUNT, write_every_format
from streams import text_stream

from dalle2_jax.data import (
    ShapesConfig,
    make_source,
)
from dalle2_jax.data.tools import convert
from dalle2_jax.testing import WordTokenizer


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Returns eleven images, one of them truncated, in every format; sharded formats have four records a shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SHARD_SIZE", 4)
        return write_every_format(tmp_path_factory.mktemp("forms"), 9, ShapesConfig(8, num_examples=COUNT))


KINDS = ("folder", "webdataset", "tfds", "embeddings", "retrieval", "paired", "shapes", "mixture")


def stream_of(configs, kind, batch_size=4, **how):
    return text_stream(make_source(configs[kind], "train"), WordTokenizer(), LENGTH, batch_size, seed=7, **how)


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_continues(configs, kind):
    uninterrupted = stream_of(configs, kind)
    batches = [next(uninterrupted) for _ in range(7)]  # of more than two passes
    for begun in (1, 3):
        stream = stream_of(configs, kind)
        for _ in range(begun):
            next(stream)
        resumed = stream_of(configs, kind)
        resumed.set_state(json.loads(json.dumps(stream.get_state())))
        assert_same([next(resumed) for _ in range(7 - begun)], batches[begun:])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_a_stream_that_one_process_resumes(configs, kind):
    """Two processes together receive the batches of one; a single process then resumes from their state."""
    uninterrupted = stream_of(configs, kind)
    batches = [next(uninterrupted) for _ in range(6)]
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
def test_any_number_of_workers_gives_the_same_batches(configs, kind, workers):
    uninterrupted = stream_of(configs, kind)
    batches = [next(uninterrupted) for _ in range(6)]
    stream = stream_of(configs, kind, num_workers=workers)
    stream.set_state({"global_next_index": 8})
    assert_same([next(stream) for _ in range(4)], batches[2:])
    stream.close()
