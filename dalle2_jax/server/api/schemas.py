"""The schemas of requests in the OpenAPI document; `bodies` reads the requests themselves."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the OpenAPI description of a JSON request."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def form_schema(model: type[BaseModel], files: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """Returns the OpenAPI description of a multipart form with files."""
    schema = model.model_json_schema()
    binary = {name: {"type": "string", "format": "binary"} for name in files}
    schema["properties"] = {**binary, **schema["properties"]}
    schema["required"] = [*required, *schema.get("required", [])]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
