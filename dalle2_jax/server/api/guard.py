"""What every request passes before its route: limits of size and time, origins, security headers, the log.

Web pages of other origins may not use a server on the loopback address: their requests have an Origin header, and after
DNS rebinding another Host.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from dalle2_jax.server.api import payload
from dalle2_jax.server.api.errors import ApiError, from_exception, invalid
from dalle2_jax.server.config import LOOPBACK
from dalle2_jax.server.service import LOG, Service

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

MAX_BODY = {
    # the beginning of a path: bytes of a request's body
    "/v1/images/generations": 100_000,
    "/v1/images/": 2 * payload.MAX_BYTES + 200_000,
    "/dalle2/": 2 * payload.MAX_BYTES * 4 // 3 + 200_000,
    "/": 10_000,
}

BODY_SECONDS, PART_SECONDS = 60.0, 10.0
"""Seconds for the body of a request, and between two parts of it."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}

UNLOGGED = ("/healthz", "/readyz", "/metrics")


class Guard:
    """ASGI middleware around the whole application.

    Args:
      app: the application.
      service: its parts.
    """

    def __init__(self, app: Any, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # there are no web sockets
            await send({"type": "websocket.close", "code": 1000})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, headers = time.monotonic(), Headers(scope=scope)
        status = 0

        async def send_with_headers(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), headers.get("origin"))
            await send(message)

        async def answer(error: ApiError) -> None:
            await error.response()(scope, receive, send_with_headers)

        try:
            self._check_origin(scope, headers)
            if self._is_preflight(scope, headers):
                await send_with_headers({"type": "http.response.start", "status": 204, "headers": []})
                await send_with_headers({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, self._bounded(scope, headers, receive), send_with_headers)
        except Exception as error:
            known = from_exception(error)
            if known.status == 500:
                LOG.exception("%s failed", scope["path"][:200])
            if status:  # the answer has begun: closing the connection is all that is left
                raise
            await answer(known)
        finally:
            self._record(scope, status, time.monotonic() - begun)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["route"].path if "route" in scope else "none"
        self._service.metrics.requests.labels(route, str(status)).inc()
        self._service.metrics.latency.labels(route).observe(seconds)
        if scope["path"] not in UNLOGGED:
            LOG.info("%s %r %d %.0f ms", scope["method"], scope["path"][:200], status, 1000 * seconds)

    # --- origins --------------------------------------------------------------------------------

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError (403) for a request of another web page, or under a host name that is not the server's."""
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        config = self._service.config
        public = urlsplit(config.public_url or "").hostname
        if config.api_keys is None and host not in (*LOOPBACK, config.host, public):
            raise ApiError(403, "this server is used as localhost or 127.0.0.1", None, "wrong_host")
        origin = headers.get("origin")
        if origin is None or origin in config.cors:
            return
        if origin == config.public_url or urlsplit(origin).netloc == headers.get("host"):
            return
        raise ApiError(403, "web pages of this origin may not use the server", None, "wrong_origin")

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        return scope["method"] == "OPTIONS" and "access-control-request-method" in headers

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        for name, value in HEADERS.items():
            headers[name] = value
        headers.setdefault("Cache-Control", "no-store")
        if origin is not None and origin in self._service.config.cors:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            headers.add_vary_header("Origin")

    # --- bodies ---------------------------------------------------------------------------------

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Returns a ``receive`` that raises ApiError: 413 for too large a body, 408 for too slow a one."""
        limit = next(size for start, size in MAX_BODY.items() if scope["path"].startswith(start) or start == "/")
        declared = headers.get("content-length", "0")
        too_large = invalid(f"the request has more than {limit} bytes", None, "request_too_large", 413)
        if not declared.isdecimal() or int(declared[:20]) > limit:
            raise too_large
        total, complete, deadline = 0, False, time.monotonic() + BODY_SECONDS

        async def bounded() -> Any:
            nonlocal total, complete
            if complete:
                return await receive()
            try:
                left = max(0.0, min(PART_SECONDS, deadline - time.monotonic()))
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError:
                raise ApiError(408, "the request took too long to arrive", None, "request_timeout") from None
            total += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if total > limit:
                raise too_large
            return message

        return bounded
