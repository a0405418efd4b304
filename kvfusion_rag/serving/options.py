"""The limits and defaults of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..schema import FocusChoice, ModeChoice
from ..text.settings import is_count, require_focus, require_mode

# Each operation of a model releases the interpreter's lock and then waits for it. With Python's 5 ms, one thread that
# reads a large request slows every answer down.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Limits and defaults of a server.

    Attributes:
        mode: mode of requests that do not set one. ``None`` uses the model's own.
        focus: focus of requests that do not set one: a number of documents to keep, ``None`` for all documents, or
            "auto" for the model's own number.
        max_concurrency: number of requests in progress at once. Further ones are rejected with status 429.
        tenant_concurrency: number of requests in progress at once in one namespace. ``None`` means half of
            ``max_concurrency`` if keys have several namespaces, so that no tenant can lock out the others.
        max_body_bytes: maximum size of a request's body.
        max_documents: maximum number of documents in a request.
        timeout: seconds after which a request is cancelled, including the time to read its body.
        model_names: names of the model in requests, of which the first is that in answers. Default: the model's own.
        metrics: whether ``GET /metrics`` serves Prometheus metrics, to all clients with access in any namespace.
    """

    mode: ModeChoice | None = None
    focus: FocusChoice = "auto"
    max_concurrency: int = 64
    tenant_concurrency: int | None = None
    max_body_bytes: int = 4 << 20
    max_documents: int = 256
    timeout: float = 600.0
    model_names: tuple[str, ...] = ()
    metrics: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidInputError if a value is not allowed."""
        if self.mode is not None:
            require_mode(self.mode)
        require_focus(self.focus)
        for name in ("max_concurrency", "max_body_bytes", "max_documents"):
            if not is_count(value := getattr(self, name)):
                raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number from 1.")
        if self.tenant_concurrency is not None and not is_count(self.tenant_concurrency):
            raise InvalidInputError(
                f"tenant_concurrency is {self.tenant_concurrency!r}, but it must be a whole number from 1 or None."
            )
        if any(not isinstance(name, str) or not name.strip() for name in self.model_names):
            raise InvalidInputError(f"model_names is {self.model_names!r}, but each name must contain text.")
        if not 0 < self.timeout < math.inf:
            raise InvalidInputError(f"timeout is {self.timeout!r}, but it must be a number of seconds above 0.")

    def names_of(self, model_id: str) -> tuple[str, ...]:
        """Return the names of the model with this id."""
        return self.model_names or (model_id,)

    @property
    def max_parts(self) -> int:
        """Limit on strings, list items, fields and objects of a body: 100 for each document, and for the rest."""
        return 10_000 + 100 * self.max_documents
