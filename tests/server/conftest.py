"""A server in this process over a tiny system."""

import pytest
from memory_system import make_system
from starlette.testclient import TestClient

from dalle2_jax.server import ServerConfig, Service, create_app


@pytest.fixture(scope="session")
def tiny():
    """A system that all servers of these tests share."""
    return make_system()


@pytest.fixture(scope="session")
def serve(tiny):
    """Makes services: ``serve(**fields of ServerConfig)``."""

    def make(**fields):
        names = fields.pop("names", ("tiny", "second"))
        config = ServerConfig({name: "nowhere" for name in names}, **{"batch_sizes": (1, 4), **fields})
        return Service(config, {name: lambda: tiny for name in names})

    return make


@pytest.fixture(scope="session")
def client(serve):
    """A client of a server with default limits."""
    with TestClient(create_app(serve(requests_per_minute=100_000)), "http://localhost") as client:
        yield client
