"""Three tar shards, and a test of data alone on its machine."""

import pytest
from tar_files import members, tar

from dalle2_jax.data import patience


@pytest.fixture
def alone(tmp_path_factory, monkeypatch):
    """No index of another test, and no waiting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.01))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 3 and 4 records."""
    for number, (first, last) in enumerate(((0, 5), (5, 8), (8, 12))):
        tar(tmp_path / f"{number:05d}.tar", members(range(first, last)))
    return tmp_path
