"""Errors in OpenAI's format: a status, and a JSON object with message, type, param and code.

Errors of the client keep their message. Internal errors get a general message, because messages of other libraries
may contain paths and addresses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import (
    ContextLimitError,
    InvalidInputError,
    KVFusionError,
    MemoryLimitError,
    OverloadError,
    UnsupportedModelError,
)

RETRY_AFTER = {"retry-after": "1"}  # seconds
_MAX_MESSAGE_CHARACTERS = 500  # a message may quote what the client sent
_MAX_PARAM_CHARACTERS = 100
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


@dataclass(eq=False)
class ApiError(KVFusionError):
    """The status and message that a client receives instead of an answer."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message
        if len(message) > _MAX_MESSAGE_CHARACTERS:
            message = message[:_MAX_MESSAGE_CHARACTERS] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class Reply(JSONResponse):
    """A JSON response in ASCII, which can contain any code point, even lone surrogates."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def error_reply(error: Exception) -> Reply:
    """Return the response for ``error``."""
    api_error = as_api_error(error)
    return Reply(api_error.to_dict(), api_error.status, dict(api_error.headers))


def as_api_error(error: Exception) -> ApiError:
    """Return the ApiError that the client receives for ``error``."""
    match error:
        case ApiError():
            return error
        case ContextLimitError():
            return ApiError(400, str(error), "context_length_exceeded")
        case UnsupportedModelError():
            return ApiError(400, str(error), "unsupported_by_model")
        case InvalidInputError():
            return ApiError(400, str(error), "invalid_value")
        case OverloadError():
            return ApiError(429, str(error), "overloaded", headers=RETRY_AFTER)
        case MemoryLimitError():
            return ApiError(500, str(error), "out_of_memory")
        case HTTPException():
            return ApiError(error.status_code, f"{error.detail}.", headers=dict(error.headers or {}))
    return ApiError(500, "the request failed; the server's log contains the cause.", "internal_error")


def is_server_error(error: Exception) -> bool:
    """Return whether ``error`` belongs in the server's log, because the operator must act."""
    return as_api_error(error).status >= 500


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the ApiError for the first problem that pydantic found in a body."""
    problem = problems[0]
    kind, where = problem["type"], [part for part in problem["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']}.", "invalid_json")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as application/json.", "invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    param = param[:_MAX_PARAM_CHARACTERS]
    if kind == "extra_forbidden":
        return ApiError(400, f"{param!r} is an unknown field.", "unknown_parameter", param)
    if kind == "missing":
        return ApiError(400, f"{param!r} is missing.", "missing_required_parameter", param)
    return ApiError(400, f"{param}: {problem['msg'].removeprefix('Value error, ')}.", "invalid_value", param)
