"""Fixtures of the data tests: three tar shards, and an isolated index cache without retry pauses."""

import pytest
from tar_files import members, tar

from dalle2_jax.data.storage import retry


@pytest.fixture
def alone(tmp_path_factory, monkeypatch):
    """Gives the test an empty index cache of its own, and shortens the pauses between retries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01))


@pytest.fixture
def shards(tmp_path):
    """Returns a folder of three shards with 5, 3 and 4 records."""
    for number, (first, last) in enumerate(((0, 5), (5, 8), (8, 12))):
        tar(tmp_path / f"{number:05d}.tar", members(range(first, last)))
    return tmp_path
