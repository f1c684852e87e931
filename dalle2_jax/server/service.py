"""`Service`: the parts of a running server, and the life of its engine."""

import logging
import secrets
import threading
from collections.abc import Callable

from dalle2_jax.errors import UserError, printable
from dalle2_jax.server.api.files import FileStore
from dalle2_jax.server.api.jobs import Jobs
from dalle2_jax.server.api.keys import Limits, read_keys
from dalle2_jax.server.config import ServerConfig
from dalle2_jax.server.engine import Engine, Ticket
from dalle2_jax.server.engine.engine import Listener
from dalle2_jax.server.engine.sampling import CascadeRunner, Task, warm_up_tasks
from dalle2_jax.server.engine.systems import Systems
from dalle2_jax.server.metrics import Metrics
from dalle2_jax.system.system import System, load

LOG = logging.getLogger("dalle2_jax.server")


class Service:
    """What the routes use.

    Args:
      config: of the server.
      loaders: name -> function that loads the system; None loads those of the configuration.

    Attributes:
      ready: whether the systems are loaded, and compiled if the configuration asks for it.
    """

    def __init__(self, config: ServerConfig, loaders: dict[str, Callable[[], System]] | None = None):
        self.config = config
        self.keys = None if config.api_keys is None else read_keys(config.api_keys)
        self.limits = Limits(config.requests_per_minute, config.concurrency)
        self.systems = Systems(loaders or {name: _loader(path) for name, path in config.systems.items()}, config.memory)
        self.metrics = Metrics()
        self.engine = Engine(CascadeRunner(self.systems), config.batch_sizes, config.queue, self.metrics)
        self.files = FileStore(config.files, config.url_seconds)
        self.jobs = Jobs(config.url_seconds)
        self.ready = False
        self.metrics.watch("dalle2_queue_images", "Images accepted and not finished.", lambda: self.engine.waiting)
        self.metrics.watch("dalle2_systems_bytes", "Bytes of loaded systems.", lambda: self.systems.nbytes)

    def start(self) -> None:
        """Starts the engine and, in the background, loads the first system or, with warm-up, all of them."""
        self.files.open()
        self.engine.start()
        threading.Thread(target=self._prepare, name="warm-up", daemon=True).start()

    def _prepare(self) -> None:
        names = self.systems.names if self.config.warmup else self.systems.names[:1]
        sizes = self.engine.sizes if self.config.warmup else ()
        try:
            for name in names:
                for task in warm_up_tasks(name, sizes):
                    listener = (lambda *_: None) if task.observed else None
                    self.engine.submit("", task.item(), task.options.get("num", 1), listener).future.result()
            self.ready = True
        except UserError as error:
            LOG.error("%s", printable(error))

    def submit(self, owner: str, task: Task, images: int, listener: Listener | None = None) -> Ticket:
        """Submits a request to the engine; see `Engine.submit`."""
        self.systems.check(task.system)
        return self.engine.submit(owner, task.item(), images, listener)

    def seed(self, given: int | None) -> int:
        """Returns the seed of a request: a random one if none is given."""
        return secrets.randbits(32) if given is None else given

    def close(self) -> None:
        """Ends the engine, and removes temporary files."""
        self.engine.close(self.config.drain)
        self.files.close()


def _loader(path: str) -> Callable[[], System]:
    return lambda: load(path)
