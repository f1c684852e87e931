"""The index of tar shards at production size (simulated): no Python object per record."""

import pickle
import tracemalloc

import numpy as np
import pytest

from dalle2_jax.data import WebdatasetRecords
from dalle2_jax.data.formats import shard_index
from dalle2_jax.data.images.records import RejectionCounts
from dalle2_jax.data.storage import arrays


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            [(10, ""), (14, "no caption"), (3, "shard cut short"), (2, "shard damaged")],
            {"no caption": 1, "shard cut short": 12 - 3, "shard damaged": 12 - 2},
        ),
        ([(10, ""), (12, "shard cut short"), (11, "shard damaged")], {"shard cut short": 1, "shard damaged": 1}),
        ([(9, "shard damaged"), (3, "shard damaged"), (0, "shard lost")], {"shard damaged": 1 + 6, "shard lost": 9}),
        ([(10, ""), (2, "shard damaged"), (0, "not a tar")], {"shard damaged": 10 - 2, "not a tar": 10}),
        ([(0, "shard lost"), (0, "shard lost")], {"shard lost": 2}),
    ],
)
def test_lost_records_are_estimated_from_the_other_shards(found, expected):
    shards = [
        shard_index._Shard(count, 0, RejectionCounts({cause: 1} if cause else {}), None) for count, cause in found
    ]
    assert shard_index._total_rejections([f"{number}.tar" for number in range(len(shards))], shards).counts == expected


@pytest.mark.parametrize("buffered", [10_000_000, 0])
def test_a_million_records_open_without_an_object_per_record(tmp_path, monkeypatch, buffered):
    """Building the index does not hold every record in memory either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, each = [], 100
    for number in range(10_000):
        paths.append(tmp_path / f"{number:06d}.tar")
        paths[-1].touch()
    key = np.frombuffer(b"0123456789", np.uint8)
    rows = np.tile(np.array([512, 9, 1536, 9, 2560, 9], np.int64), (each, 1))
    index = shard_index.Index(
        rows, np.arange(1, each + 1) * 10, np.tile(key, each), np.array([0, each]), np.frombuffer(b"{}", np.uint8)
    )
    monkeypatch.setattr(shard_index, "_shard", lambda files, number: index)
    monkeypatch.setattr(shard_index, "tqdm", lambda found, *_, **__: found)
    monkeypatch.setattr(shard_index, "_HELD", buffered)
    monkeypatch.setattr(arrays, "_IN_MEMORY", buffered * 50)
    tracemalloc.start()
    WebdatasetRecords(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert buffered or peak < 40e6
    monkeypatch.setattr(shard_index, "_shard", None)
    tracemalloc.start()
    records = WebdatasetRecords(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 1_000_000 and records._index.key(999_999) == "0123456789"
    assert peak < 20e6 and isinstance(records._index.rows, np.memmap)
    assert len(pickle.dumps(records)) < 2e6
