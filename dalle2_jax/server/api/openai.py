"""OpenAI's Images API: https://platform.openai.com/docs/api-reference/images."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dalle2_jax.server.api import payload
from dalle2_jax.server.api.bodies import Body, Edit, Generation, Variation, read_body
from dalle2_jax.server.api.errors import ApiError, invalid
from dalle2_jax.server.api.requests import (
    form_body,
    images_answer,
    json_body,
    make_task,
    owner_of,
    service_of,
    wait_for,
)
from dalle2_jax.server.api.schemas import form_schema, json_schema
from dalle2_jax.server.service import Service

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post("/images/generations", openapi_extra=json_schema(Generation))
async def generations(request: Request) -> dict[str, Any]:
    """Generates images of a caption."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        body = read_body(Generation, await json_body(request))
        return await _answer(service, request, owner, "text2image", body, {"prompt": body.prompt})


@router.post("/images/edits", openapi_extra=form_schema(Edit, ("image", "mask"), ("image",)))
async def edits(request: Request) -> dict[str, Any]:
    """Regenerates the transparent part of an image, or of its mask."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        fields, files = await form_body(request, ("image", "mask"))
        body = read_body(Edit, fields, strict=False)
        image = payload.read_image(_file(files, "image"), "image")
        mask = payload.read_image(files["mask"], "mask") if "mask" in files else None
        arguments = {"image": image.pixels, "mask": payload.edit_mask(image, mask), "prompt": body.prompt}
        return await _answer(service, request, owner, "inpaint", body, arguments)


@router.post("/images/variations", openapi_extra=form_schema(Variation, ("image",), ("image",)))
async def variations(request: Request) -> dict[str, Any]:
    """Generates images that have the CLIP embedding of an image."""
    service, owner = service_of(request), owner_of(request)
    with service.limits.request(owner):
        fields, files = await form_body(request, ("image",))
        body = read_body(Variation, fields, strict=False)
        image = payload.read_image(_file(files, "image"), "image")
        return await _answer(service, request, owner, "variations", body, {"image": image.pixels})


@router.get("/images/files/{name}", responses={200: {"content": {"image/png": {}}}})
def image_file(request: Request, name: str) -> Response:
    """Returns an image that was answered as ``url``. Its unpredictable name is the permission."""
    content = service_of(request).files.get(name)
    if content is None:
        raise ApiError(404, "there is no such image, or it has expired", "id", "file_not_found")
    return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})


@router.get("/models")
def models(request: Request) -> dict[str, Any]:
    """Lists the systems that are served."""
    service = service_of(request)
    owner_of(request)
    return {"object": "list", "data": [_model(service, name) for name in service.systems.names]}


@router.get("/models/{name}")
def model(request: Request, name: str) -> dict[str, Any]:
    """Describes a system."""
    service = service_of(request)
    owner_of(request)
    service.systems.check(name)
    return _model(service, name)


async def _answer(
    service: Service, request: Request, owner: str, command: str, body: Body, arguments: dict[str, Any]
) -> dict[str, Any]:
    task = make_task(service, command, body, arguments)
    ticket = service.submit(owner, task, body.n)
    return await images_answer(service, request, body, await wait_for(request, ticket))


def _file(files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise invalid(f"{name} is required: a file of the form", name, "missing_parameter")
    return files[name]


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.systems.created, "owned_by": "dalle2_jax"}
