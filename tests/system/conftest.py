"""A tiny system in memory, for tests of the Python face."""

import pytest
from memory_system import make_system


@pytest.fixture(scope="session")
def system():
    """Untrained stages: their images are noise."""
    return make_system()
