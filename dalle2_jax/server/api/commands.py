"""The commands that OpenAI's API does not have, jobs, and embeddings: ``/dalle2``."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from dalle2_jax.server.api import payload
from dalle2_jax.server.api.bodies import (
    COMMANDS,
    Background,
    Embed,
    Inpaint,
    Interpolate,
    Reconstruct,
    Text2Image,
    TextDiff,
    Variations,
    read_body,
)
from dalle2_jax.server.api.errors import invalid
from dalle2_jax.server.api.jobs import Job
from dalle2_jax.server.api.requests import images_answer, json_body, make_task, owner_of, service_of, wait_for
from dalle2_jax.server.api.schemas import json_schema
from dalle2_jax.server.engine import Ticket
from dalle2_jax.server.engine.engine import Listener
from dalle2_jax.server.engine.sampling import Progress, Task
from dalle2_jax.server.service import Service

router = APIRouter(prefix="/dalle2", tags=["dalle2_jax"])


def _inpaint(body: Inpaint) -> dict[str, Any]:
    image = payload.read_base64(body.image, "image")
    mask = None if body.mask is None else payload.read_base64(body.mask, "mask")
    regenerated = payload.edit_mask(image, mask)
    return {"image": image.pixels, "mask": regenerated, "prompt": body.prompt, "resample": body.resample}


def _interpolate(body: Interpolate) -> dict[str, Any]:
    images = [payload.read_base64(image, "images").pixels for image in body.images]
    return {"images": images, "frames": body.frames, "eta": body.eta, "prompt": body.prompt}


def _with_image(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Returns a function that reads the image of a body, and takes other fields as they are."""

    def arguments(body: Any) -> dict[str, Any]:
        fields = {name: getattr(body, name) for name in names}
        return {"image": payload.read_base64(body.image, "image").pixels, **fields}

    return arguments


def _text_diff(body: TextDiff) -> dict[str, Any]:
    fields = _with_image("frames", "theta", "depth", "prompt")(body)
    return {**fields, "captions": (body.before, body.after)}


ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "text2image": lambda body: {"prompt": body.prompt},
    "variations": _with_image("prompt", "eta"),
    "reconstruct": _with_image("prompt", "steps"),
    "inpaint": _inpaint,
    "interpolate": _interpolate,
    "text_diff": _text_diff,
}
"""Command -> the arguments of its function in ``system.rows.COMMANDS``."""


async def _run(request: Request, command: str) -> JSONResponse:
    """Answers with the images, or at once with a job."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        body = read_body(COMMANDS[command], await json_body(request))
        if body.previews and not body.background:
            raise invalid("previews are events of a job: set background too", "previews")
        arguments = await asyncio.to_thread(ARGUMENTS[command], body)
        _check_inversion(arguments, service.config.max_steps)
        task = make_task(service, command, body, arguments, body.previews)
        images = body.n * arguments.get("frames", 1)
        if not body.background:
            ticket = service.submit(owner, task, images)
            return JSONResponse(await images_answer(service, request, body, await wait_for(request, ticket)))
        return JSONResponse(_start_job(service, request, owner, task, body, images).describe(), 202)


def _check_inversion(arguments: dict[str, Any], max_steps: int) -> None:
    """Raises ApiError if an inversion has more steps than the server allows."""
    steps = arguments.get("steps")
    if steps is not None and steps > max_steps:
        raise invalid(f"steps are more than the {max_steps} that this server allows", "steps")


def _start_job(service: Service, request: Request, owner: str, task: Task, body: Background, images: int) -> Job:
    job, loop = service.jobs.add(owner, images), asyncio.get_running_loop()

    def listen(position: int, progress: Progress) -> None:
        loop.call_soon_threadsafe(job.update, position, progress)

    listener: Listener = listen
    try:
        ticket = service.submit(owner, task, images, listener)
    except BaseException:
        service.jobs.discard(job)
        raise
    job.run(_finish_job(service, request, body, ticket))
    return job


async def _finish_job(service: Service, request: Request, body: Background, ticket: Ticket) -> dict[str, Any]:
    try:
        return await images_answer(service, request, body, await asyncio.wrap_future(ticket.future))
    finally:
        ticket.cancel()


@router.post("/text2image", openapi_extra=json_schema(Text2Image))
async def text2image(request: Request) -> JSONResponse:
    """Generates images of a caption: as OpenAI's generations, or as a job."""
    return await _run(request, "text2image")


@router.post("/variations", openapi_extra=json_schema(Variations))
async def variations(request: Request) -> JSONResponse:
    """Generates images with the embedding of an image, from fresh noise or its own."""
    return await _run(request, "variations")


@router.post("/reconstruct", openapi_extra=json_schema(Reconstruct))
async def reconstruct(request: Request) -> JSONResponse:
    """Generates an image again from its embedding and the noise that DDIM inversion finds."""
    return await _run(request, "reconstruct")


@router.post("/inpaint", openapi_extra=json_schema(Inpaint))
async def inpaint(request: Request) -> JSONResponse:
    """Regenerates the transparent part of an image or of its mask."""
    return await _run(request, "inpaint")


@router.post("/interpolate", openapi_extra=json_schema(Interpolate))
async def interpolate(request: Request) -> JSONResponse:
    """Generates the images between two."""
    return await _run(request, "interpolate")


@router.post("/text_diff", openapi_extra=json_schema(TextDiff))
async def text_diff(request: Request) -> JSONResponse:
    """Changes an image by the difference between two captions."""
    return await _run(request, "text_diff")


@router.post("/embed", openapi_extra=json_schema(Embed))
async def embed(request: Request) -> dict[str, Any]:
    """Returns CLIP embeddings of captions and images, in the space of the system's embedding contract."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        body = read_body(Embed, await json_body(request))
        if not body.texts and not body.images:
            raise invalid("give texts, images or both", "texts", "missing_parameter")
        images = [payload.read_base64(image, "images").pixels for image in body.images]
        task = Task(body.model or service.systems.names[0], "embed", {"texts": body.texts, "images": images})
        [found] = await wait_for(request, service.submit(owner, task, 1))
        return {"model": task.system, **{name: rows.tolist() for name, rows in found.items()}}


@router.get("/models/{name}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Describes a system, which is loaded: the sizes that it generates, and how its stages are sampled."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        [about] = await wait_for(request, service.submit(owner, Task(name, "describe", {}), 1))
        return {"id": name, **about}


@router.get("/jobs/{name}")
async def job(request: Request, name: str) -> dict[str, Any]:
    """Returns the state of a job, with its result when it is done."""
    return service_of(request).jobs.get(owner_of(request), name).describe()


@router.delete("/jobs/{name}")
async def cancel_job(request: Request, name: str) -> dict[str, Any]:
    """Cancels a job."""
    found = service_of(request).jobs.get(owner_of(request), name)
    found.cancel()
    return {"id": found.id, "object": "dalle2.job", "cancelled": True}


@router.get("/jobs/{name}/events", responses={200: {"content": {"text/event-stream": {}}}})
async def job_events(request: Request, name: str) -> StreamingResponse:
    """Streams the progress of a job as server-sent events, with previews where they were requested."""
    found = service_of(request).jobs.get(owner_of(request), name)
    return StreamingResponse(found.events(), media_type="text/event-stream")
