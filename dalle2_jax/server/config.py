"""The configuration of a server."""

import dataclasses
import ipaddress
from collections.abc import Mapping
from pathlib import Path

from dalle2_jax.errors import ConfigError, shown
from dalle2_jax.server.engine.engine import SIZES

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How a server listens, and what it allows.

    Attributes:
      systems: name -> folder, name in the package or URL; the first is the default model.
      host: the address to listen on.
      port: 0 takes a free one.
      api_keys: the file with the keys; required beyond the loopback addresses.
      batch_sizes: the sizes of compiled batches. A single one makes images equal to the last bit under any load.
      queue: images that are accepted and not finished, at most.
      warmup: whether all batch sizes of all systems are compiled before the server is ready.
      memory: bytes that loaded systems may take; None has no limit.
      requests_per_minute: of a key.
      concurrency: requests of a key at a time.
      max_steps: sampling steps of a stage that a request may set.
      url_seconds: how long images that were answered as ``url`` are kept.
      files: the folder of these images; None makes a temporary one. Replicas may share one.
      public_url: the address under which clients see the server; None takes it from each request.
      cors: origins of other web pages that may call the API.
      log_prompts: whether the log has captions.
      drain: seconds that requests have to finish after SIGTERM.
    """

    systems: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    batch_sizes: tuple[int, ...] = SIZES
    queue: int = 64
    warmup: bool = False
    memory: int | None = None
    requests_per_minute: int = 600
    concurrency: int = 32
    max_steps: int = 250
    url_seconds: int = 3600
    files: Path | None = None
    public_url: str | None = None
    cors: tuple[str, ...] = ()
    log_prompts: bool = False
    drain: float = 60.0

    def __post_init__(self) -> None:
        if not self.systems:
            raise ConfigError("a server needs at least one system", "systems")
        if self.api_keys is None and not self.is_local:
            raise ConfigError(
                f"host {shown(self.host)} is reachable from other machines: give --api_keys FILE, or listen on "
                "127.0.0.1",
                "host",
            )

    @property
    def is_local(self) -> bool:
        """Whether the server can be reached from this machine only."""
        try:
            return self.host in LOOPBACK or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
