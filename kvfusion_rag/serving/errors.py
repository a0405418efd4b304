"""Errors as OpenAI's clients read them: a status, and a JSON object with message, type, param and code.

What a client did wrong is told as it is; of what went wrong in here only that it did, since messages of other
libraries hold paths and addresses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import ContextLimitError, InvalidInputError, KVFusionError, MemoryLimitError, OverloadError

RETRY_AFTER = {"retry-after": "1"}  # seconds
_LONGEST_MESSAGE = 500  # characters; a message may repeat what the client sent
_LONGEST_PARAM = 100
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


@dataclass(eq=False)
class ApiError(KVFusionError):
    """A request that is not answered: what the client is told."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class Reply(JSONResponse):
    """JSON in ASCII: every text can be sent, whatever code points it has."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def error_reply(error: Exception) -> Reply:
    """The response that tells a client of ``error``."""
    told = as_api_error(error)
    return Reply(told.to_dict(), told.status, dict(told.headers))


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``."""
    match error:
        case ApiError():
            return error
        case ContextLimitError():
            return ApiError(400, str(error), "context_length_exceeded")
        case InvalidInputError():
            return ApiError(400, str(error), "invalid_value")
        case OverloadError():
            return ApiError(429, str(error), "overloaded", headers=RETRY_AFTER)
        case MemoryLimitError():
            return ApiError(500, str(error), "out_of_memory")
        case HTTPException():
            return ApiError(error.status_code, f"{error.detail}.", headers=dict(error.headers or {}))
    return ApiError(500, "the request could not be answered; the server's log has the cause.", "internal_error")


def is_own_fault(error: Exception) -> bool:
    """Whether the server's log should have ``error``: whoever runs it has to act."""
    return as_api_error(error).status >= 500


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of the problems that pydantic found in a body."""
    problem = problems[0]
    kind, where = problem["type"], [part for part in problem["loc"] if part != "body"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {problem['ctx']['error']}.", "invalid_json")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as application/json.", "invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    param = param[:_LONGEST_PARAM]
    if kind == "extra_forbidden":
        return ApiError(400, f"{param!r} is no field that this server reads.", "unknown_parameter", param)
    if kind == "missing":
        return ApiError(400, f"{param!r} is missing.", "missing_required_parameter", param)
    return ApiError(400, f"{param}: {problem['msg'].removeprefix('Value error, ')}.", "invalid_value", param)
