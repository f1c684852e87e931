"""Health, metrics, and the files of the web page."""

import importlib.resources
from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from dalle2_jax.server.api.errors import ApiError
from dalle2_jax.server.api.requests import owner_of, service_of

router = APIRouter(include_in_schema=False)

PAGES = {
    # path: (file of the package dalle2_jax.server.page, its type)
    "/": ("index.html", "text/html"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("app", "api", "images", "recipes")},
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}


@router.get("/healthz")
def healthz(request: Request) -> PlainTextResponse:
    """Whether the process works: 200, or 500 if the engine's thread has ended."""
    if not service_of(request).engine.alive:
        raise ApiError(500, "the engine has ended", None, "engine_ended")
    return PlainTextResponse("ok\n")


@router.get("/readyz")
def readyz(request: Request) -> PlainTextResponse:
    """Whether requests are accepted: 503 while systems are loaded, and during shutdown."""
    service = service_of(request)
    if not (service.ready and service.engine.accepting):
        raise ApiError(503, "the server is starting or shutting down", None, "not_ready", {"Retry-After": "5"})
    return PlainTextResponse("ready\n")


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Prometheus's metrics; they need a key where there are keys."""
    owner_of(request)
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def page(path: str) -> Callable[[], Response]:
    """Returns the route of a file of the web page, a path of `PAGES`."""
    name, kind = PAGES[path]

    def file() -> Response:
        content = importlib.resources.files("dalle2_jax.server.page").joinpath(name).read_bytes()
        return Response(content, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})

    return file
