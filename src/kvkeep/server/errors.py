"""Errors as clients of the two protocols expect them."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvkeep.engine.async_engine import EngineDownError
from kvkeep.errors import (
    CapacityError,
    ConfigError,
    KVKeepError,
    PinCapacityError,
    RequestError,
    TierError,
)
from kvkeep.server.field_errors import bad_fields
from kvkeep.server.unknown_routes import allowed_methods, no_route, wrong_method

__all__ = [
    "ApiError",
    "add_error_routes",
    "api_error",
    "error_body",
    "error_response",
    "is_anthropic",
]

_log = logging.getLogger(__name__)
_ANTHROPIC_PATHS = "/v1/messages"
_STATUS_TO_KIND = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Where Anthropic's names differ from OpenAI's.
_ANTHROPIC_KINDS = {"server_error": "api_error"}
_FIELD = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\])?(?:\.[a-z0-9_]+(?:\[\d+\])?)*)(?:=| is | has )")


class ApiError(Exception):
    """An answer that is an error: status, message, and what programs read.

    `kind` is the field "type" of the body; None takes the usual one of the status. `param` names the field
    of the request that is wrong, `code` is a word for programs, "model_not_found" for instance.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or _STATUS_TO_KIND.get(status, "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def api_error(error: Exception) -> ApiError:
    """What a client is told of `error`; what is not meant for it stays in the log."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case RecursionError():
            return ApiError(400, "the request is nested too deeply; send flatter JSON")
        case KVKeepError():
            return _own_error(error)
        case _:
            return ApiError(500, "the server failed; its log says more", code="internal_error")


def _own_error(error: KVKeepError) -> ApiError:
    match error:
        case ConfigError() | RequestError():
            return ApiError(400, str(error), param=_param_of(str(error)))
        case PinCapacityError():
            return ApiError(413, str(error), code="pin_cap")
        case CapacityError():
            return ApiError(400, str(error), code="capacity_exceeded")
        case EngineDownError() | TierError():
            return ApiError(503, str(error), code="unavailable", headers={"retry-after": "1"})
        case _:
            return ApiError(500, str(error), code="internal_error")


def error_body(path: str, error: ApiError, request_id: str = "") -> dict[str, Any]:
    """The body of an error in the protocol of `path`; streams send it for a late one, too."""
    if is_anthropic(path):
        kind = _ANTHROPIC_KINDS.get(error.kind, error.kind)
        body = {"type": "error", "error": {"type": kind, "message": error.message}}
        return body | {"request_id": request_id} if request_id else body
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def is_anthropic(path: str) -> bool:
    """Whether `path` belongs to Anthropic's protocol."""
    return path == _ANTHROPIC_PATHS or path.startswith(_ANTHROPIC_PATHS + "/")


def error_response(path: str, error: ApiError, request_id: str = "") -> JSONResponse:
    """The whole response."""
    return JSONResponse(
        error_body(path, error, request_id), status_code=error.status, headers=error.headers
    )


def add_error_routes(app: FastAPI) -> None:
    """Answer every error of every route in the shape of its protocol."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = _of_request(request, error) or api_error(error)
        # What nobody foresaw is logged where it ends, in RequestIds.
        if found.status == 500 and isinstance(error, KVKeepError):
            _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(request.url.path, found, getattr(request.state, "request_id", ""))

    for kind in (ApiError, KVKeepError, RequestValidationError, HTTPException, RecursionError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)


def _of_request(request: Request, error: Exception) -> ApiError | None:
    """The answer where it is about the request as such: its fields, its path, its method."""
    if isinstance(error, RequestValidationError):
        bad = bad_fields(error, request)
        return ApiError(400, bad.message, param=bad.param)
    if not isinstance(error, HTTPException) or error.detail != HTTPStatus(error.status_code).phrase:
        return None
    if error.status_code == HTTPStatus.NOT_FOUND:
        return ApiError(404, no_route(request))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # What the framework says of a path is of the first of its routes alone.
        methods = allowed_methods(request)
        allow = ", ".join(methods) or (error.headers or {}).get("Allow", "")
        return ApiError(405, wrong_method(request, allow), headers={"allow": allow})
    return None


def _param_of(message: str) -> str | None:
    """The field that a message of ours begins with: `field=value`, `field is` or `field has`."""
    match = _FIELD.match(message)
    return match[1] if match else None
