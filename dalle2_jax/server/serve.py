"""Runs a server: uvicorn in the main thread, until SIGINT or SIGTERM."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dalle2_jax.errors import UserError
from dalle2_jax.server.api.app import create_app
from dalle2_jax.server.config import ServerConfig
from dalle2_jax.server.service import Service

HEADER_SECONDS, CLOSING_SECONDS = 10.0, 5
"""Seconds for the headers of a connection's next request, and for answers to be sent at the end."""

MAX_CONNECTIONS, BACKLOG = 1_000, 2_048
"""Connections at a time, and those that wait to be accepted."""


class ImpatientProtocol(H11Protocol):
    """Closes connections whose next request does not arrive in time: those that send a byte now and then.

    uvicorn itself closes a connection that is idle after an answer, but waits without limit once a byte has arrived.
    """

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the first request."""
        super().connection_made(transport)
        self._impatience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def on_response_complete(self) -> None:
        """Starts the clock of the next request."""
        super().on_response_complete()
        self._impatience.cancel()
        self._impatience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._impatience.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """A server whose shutdown begins with its engine: it answers 503 until what was started is finished."""

    def __init__(self, config: ServerConfig, service: Service | None = None):
        self.service = service or Service(config)
        options = uvicorn.Config(
            create_app(self.service),
            host=config.host,
            port=config.port,
            http=ImpatientProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            h11_max_incomplete_event_size=32_768,
        )
        super().__init__(options)

    def stop(self, number: int = 0) -> None:
        """Begins the shutdown; may be called from a signal handler."""
        threading.Thread(target=self._stop, name="shutdown", daemon=True).start()

    def _stop(self) -> None:
        self.service.engine.close(self.service.config.drain)
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the command line, which calls `stop`."""
        yield

    def listen(self) -> socket.socket:
        """Returns the socket that the server listens on.

        Raises:
          UserError: the address cannot be used.
        """
        host, port = self.config.host, self.config.port
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with contextlib.ExitStack() as closed_on_failure:
                listener = closed_on_failure.enter_context(socket.socket(family, kind))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(BACKLOG)
                closed_on_failure.pop_all()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): use another --port") from error
        return listener

    def run_on(self, listener: socket.socket) -> None:
        """Serves on a socket until `stop`."""
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        asyncio.run(self.serve(sockets=[listener]))
