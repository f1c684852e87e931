"""What all routes share: who asks, what is in the request, waiting for images, and the answer with them."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from dalle2_jax.server.api import payload
from dalle2_jax.server.api.bodies import Body, form_fields, parse_json, sample_options, side_of
from dalle2_jax.server.api.errors import ApiError, invalid
from dalle2_jax.server.api.keys import authenticate
from dalle2_jax.server.engine import Ticket
from dalle2_jax.server.engine.sampling import Generated, Task
from dalle2_jax.server.service import LOG, Service

MAX_FIELD = 100_000
"""Bytes of a form field that is no file."""


def service_of(request: Request) -> Service:
    """Returns the server's parts."""
    return request.app.state.service


def owner_of(request: Request) -> str:
    """Returns whose request it is: the holder of its key, or its address if the server has no keys.

    Raises:
      ApiError: 401, the key is missing or wrong.
    """
    keys = service_of(request).keys
    if keys is None:
        return request.client.host if request.client else ""
    return authenticate(keys, request.headers.get("authorization"))


async def json_body(request: Request) -> dict[str, Any]:
    """Returns the JSON object of a request. ApiError if it is none, or its type is another."""
    _check_type(request, "application/json")
    return parse_json(await request.body())


async def form_body(request: Request, files: Sequence[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the fields and files of a multipart form.

    Args:
      request: the request.
      files: the names of files; other parts are fields.

    Raises:
      ApiError: 400, it is no form in UTF-8, a name is repeated, or a file is a field or the other way round.
    """
    _check_type(request, "multipart/form-data")
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise invalid("the charset of a form must be utf-8", None, "invalid_content_type")
    fields: dict[str, str] = {}
    contents: dict[str, bytes] = {}
    async with request.form(max_files=len(files) + 1, max_fields=60, max_part_size=MAX_FIELD) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in fields or name in contents:
                raise invalid(f"{name[:100]} is given twice", name[:100])
            if isinstance(value, UploadFile) != (name in files):
                kind = "a file" if name in files else "a field"
                raise invalid(f"{name[:100]} must be {kind} of the form", name[:100])
            if isinstance(value, UploadFile):
                contents[name] = await value.read(payload.MAX_BYTES + 1)
            else:
                fields[name] = value
    return form_fields(fields), contents


def _check_type(request: Request, expected: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != expected:
        raise invalid(f"the request must be {expected}, not {given[:50] or 'of no type'}", None, "invalid_content_type")


def make_task(service: Service, command: str, body: Body, arguments: Mapping[str, Any], observed: bool = False) -> Task:
    """Returns what the engine runs for a request.

    Raises:
      ApiError: 400, a size or a number of steps that the server does not allow.
      UnknownSystem: there is no such model.
    """
    name = body.model or service.systems.names[0]
    service.systems.check(name)
    side = side_of(body.size)
    if service.config.log_prompts:
        LOG.info("%s %r", command, arguments.get("prompt"))
    options = sample_options(body, service.seed(body.seed), service.config.max_steps)
    return Task(name, command, arguments, options, None if body.resize else side, observed)


async def wait_for(request: Request, ticket: Ticket) -> list[Any]:
    """Returns the results of a request to the engine; a client that disconnects cancels it.

    Raises:
      ApiError: 499, the client has gone: no one reads the answer.
    """
    results = asyncio.ensure_future(asyncio.wrap_future(ticket.future))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({results, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            raise ApiError(499, "the client has gone", None, "client_gone")
        return results.result()
    finally:
        gone.cancel()
        results.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def images_answer(
    service: Service, request: Request, body: Body, generated: Sequence[Generated]
) -> dict[str, Any]:
    """Returns the answer with images: OpenAI's fields, and ``dalle2`` with the provenance of all.

    Raises:
      OSError: the disk is full.
    """
    service.metrics.images.inc(len(generated))
    side = side_of(body.size) if body.resize else None
    return await asyncio.to_thread(_encode_answer, service, str(request.base_url), body, generated, side)


def _encode_answer(
    service: Service, base_url: str, body: Body, generated: Sequence[Generated], side: int | None
) -> dict[str, Any]:
    base = (service.config.public_url or base_url).rstrip("/")
    data = []
    for image in generated:
        pixels = image.pixels if side is None else payload.resized(image.pixels, side)
        content = payload.encode_png(pixels, image.provenance)
        if body.response_format == "b64_json":
            data.append({"b64_json": payload.to_base64(content)})
        else:
            data.append({"url": f"{base}/v1/images/files/{service.files.put(content)}"})
    about = {**generated[0].provenance, "pictures": [image.provenance["pictures"][0] for image in generated]}
    shown = side or generated[0].pixels.shape[0]
    return {"created": int(time.time()), "data": data, "size": f"{shown}x{shown}", "dalle2": about}
