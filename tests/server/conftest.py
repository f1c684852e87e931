"""A server in this process over a tiny system, and images to send to it."""

import io

import numpy as np
import pytest
from memory_system import make_system
from PIL import Image
from starlette.testclient import TestClient

from dalle2_jax.server import ServerConfig, Service, create_app

FEW = {"prior": {"steps": 2}, "decoder": {"steps": 2}, "upsampler_1": {"steps": 2}}
"""Settings that make requests quick."""

FEW_WITHOUT_PRIOR = {name: settings for name, settings in FEW.items() if name != "prior"}


def png(side=16, mode=None, clear=False, width=None):
    """Returns a PNG file; ``clear`` makes its upper half transparent."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, width or side, 4), np.uint8)
    pixels[..., 3] = 255
    if clear:
        pixels[: side // 2, :, 3] = 0
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode or ("RGBA" if clear else "RGB")).save(content, "PNG")
    return content.getvalue()


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
