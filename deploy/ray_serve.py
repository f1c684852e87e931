"""Replicas of a server behind Ray Serve's proxy.

    pip install 'dalle2_jax[serve]' 'ray[serve]'
    DALLE2_SYSTEMS=shapes serve run deploy.ray_serve:app

Settings are environment variables:

    DALLE2_SYSTEMS   the systems, separated by commas: runs/demo or NAME=runs/demo
    DALLE2_REPLICAS  the number of replicas (2)
    DALLE2_GPUS      GPUs of each replica (0)
    DALLE2_API_KEYS  the file of keys; without it, the proxy must stay on the loopback address, Ray's default
    DALLE2_FILES     a folder that all replicas share, for images that are answered as url

A replica is a whole server: it owns its devices and batches its own requests. Jobs (/dalle2/jobs) are known to the
replica that started them only: with several replicas, use the requests that wait for their images.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from ray import serve

REPLICAS = int(os.environ.get("DALLE2_REPLICAS", "2"))
GPUS = float(os.environ.get("DALLE2_GPUS", "0"))


def make_app() -> FastAPI:
    """Returns the application of one replica; called in the replica, where the devices are."""
    from dalle2_jax.server import ServerConfig, Service, create_app

    words = os.environ.get("DALLE2_SYSTEMS", "shapes").split(",")
    systems = {word.partition("=")[0] if "=" in word else Path(word).name: word.rpartition("=")[2] for word in words}
    keys, files = os.environ.get("DALLE2_API_KEYS"), os.environ.get("DALLE2_FILES")
    config = ServerConfig(systems, api_keys=Path(keys) if keys else None, files=Path(files) if files else None)
    return create_app(Service(config))


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=64,
    ray_actor_options={"num_gpus": GPUS},
    health_check_period_s=10,
    graceful_shutdown_timeout_s=70,
)
@serve.ingress(make_app)
class Images:
    """A replica."""


app = Images.bind()
