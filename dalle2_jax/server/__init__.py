"""Serves systems: the engine that batches requests, OpenAI's Images API over it, and the web page.

    from dalle2_jax.server import Service, ServerConfig, create_app

    app = create_app(Service(ServerConfig({"demo": "runs/demo"})))  # an ASGI application

Needs ``pip install 'dalle2_jax[serve]'``.
"""

from dalle2_jax.server.api.app import create_app
from dalle2_jax.server.config import ServerConfig
from dalle2_jax.server.service import Service

__all__ = ["Service", "ServerConfig", "create_app"]
