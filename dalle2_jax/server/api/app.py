"""The application: routes, errors, and the engine's life."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

import dalle2_jax
from dalle2_jax.errors import UserError
from dalle2_jax.server.api import commands, health, openai
from dalle2_jax.server.api.errors import ApiError, from_exception, from_status
from dalle2_jax.server.api.guard import Guard
from dalle2_jax.server.service import Service


def create_app(service: Service) -> FastAPI:
    """Returns the application of a server: an ASGI application, for uvicorn, Ray Serve or tests.

    Args:
      service: its parts; started and closed with the application.
    """
    about = "OpenAI's Images API, and more, over DALL-E 2 (unCLIP) systems."
    app = FastAPI(
        title="dalle2_jax", version=dalle2_jax.__version__, description=about, docs_url=None, redoc_url=None,
        lifespan=_life,
    )  # fmt: skip
    app.state.service = service
    for router in (openai.router, commands.router, health.router):
        app.include_router(router)
    for path in health.PAGES:
        app.add_api_route(path, health.page(path), include_in_schema=False)
    for kind in (ApiError, UserError, OSError):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(HTTPException, _framework)
    app.add_middleware(Guard, service=service)
    return app


@contextlib.asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.start()
    yield
    await run_in_threadpool(service.close)


async def _known(request: Request, error: Exception) -> JSONResponse:
    known = from_exception(error)
    if known.status == 500:
        raise error  # the guard logs it
    return known.response()


async def _framework(request: Request, error: Any) -> JSONResponse:
    """Answers the errors of the framework, such as an unknown path or a damaged form, in OpenAI's shape."""
    return from_status(error.status_code, str(error.detail)).response()
