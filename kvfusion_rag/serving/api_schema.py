"""The OpenAPI document of the server: the statuses and content types that each path really has."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel


class ErrorFacts(BaseModel):
    """What went wrong, in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every reply that is an error."""

    error: ErrorFacts


_MEANINGS = {
    400: "A field or value is not allowed, or the body is not JSON.",
    401: "The API key is missing or wrong.",
    403: "The Host or the web page of the request is not allowed.",
    404: "The model does not exist.",
    413: "The body is too large.",
    429: "Too many requests are in progress or waiting.",
    431: "The request has too many headers.",
    500: "The server failed; its log contains the cause.",
    503: "The server is stopping.",
    504: "The request took too long.",
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or a stream of its pieces.", "content": {"text/event-stream": {}}}
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": _MEANINGS[status]} for status in statuses}


_ACCESS = _errors(401, 403, 431, 500)
_WORK = _ACCESS | _errors(400, 413, 429, 503, 504)
REPLIES: dict[str, dict[int | str, dict[str, Any]]] = {
    "health": _errors(403, 431, 500),
    "page": _ACCESS | {200: {"description": "A page.", "content": {"text/html": {}}}},
    "models": _ACCESS,
    "model": _ACCESS | _errors(404),
    "work": _WORK,
    "answer": _WORK | _errors(404) | _EVENTS,
}
"""Replies of the paths besides the usual one, as FastAPI's ``responses`` takes them."""
METRICS_REPLIES = _ACCESS | {200: {"description": "Metrics for Prometheus.", "content": {"text/plain": {}}}}


def set_schema(app: FastAPI) -> None:
    """Leave out FastAPI's own status 422, which this server does not use, from the schema of all routes so far."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
