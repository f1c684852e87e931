"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from dalle2_jax.errors import ConfigError, UserError, printable
from dalle2_jax.files import disk_full
from dalle2_jax.server.engine import Closing, QueueFull
from dalle2_jax.server.engine.systems import UnknownSystem

INVALID, SERVER = "invalid_request_error", "server_error"

_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error of a request.

    Attributes:
      status: of HTTP.
      param: the parameter that is wrong; None if it is not about one.
      code: a name for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def kind(self) -> str:
        """The "type" of OpenAI's errors."""
        return {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, INVALID if self.status < 500 else SERVER
        )

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        message, param = printable(self)[:1000], self.param and printable(self.param)
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """Returns the error of a wrong parameter."""
    return ApiError(status, message, param, code)


def too_many(message: str, retry_after: float, code: str = "rate_limit_exceeded") -> ApiError:
    """Returns the error of a limit that will have passed after some seconds."""
    return ApiError(429, message, None, code, {"Retry-After": str(max(1, round(retry_after)))})


def from_exception(error: BaseException) -> ApiError:
    """Returns the error that a client gets for an exception. Unexpected ones are not described: they may have paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return too_many(str(error), error.retry_after, "queue_full")
    if isinstance(error, Closing):
        return ApiError(503, str(error), None, "shutting_down", {"Retry-After": "5"})
    if isinstance(error, UnknownSystem):
        return ApiError(404, str(error), "model", "model_not_found")
    if isinstance(error, ConfigError):
        return invalid(str(error), error.field or None)
    if isinstance(error, UserError):
        return invalid(str(error))
    if disk_full(error):
        return ApiError(
            507, "the server has no space for image files: request b64_json", "response_format", "disk_full"
        )
    return ApiError(500, "the server failed; its log has the details", None, "internal_error")


def from_status(status: int, detail: str) -> ApiError:
    """Returns the error of an HTTP status that the framework raised."""
    if status == 404:
        detail = "there is nothing at this path; the API is described at /docs"
    return ApiError(status, detail, None, _CODES.get(status, "invalid_request"))
