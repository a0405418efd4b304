"""What a server allows, checked once when it is made. Knows neither HTTP nor models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..schema import FocusChoice, ModeChoice
from ..text.settings import is_count, require_focus, require_mode


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """Limits of a server.

    Attributes:
        mode: of requests that name none; ``None`` for the model's own.
        focus: of requests that name none: a number of documents to keep, ``None`` for all, "auto" for the model's own.
        max_concurrency: requests that are read and answered at once; further ones are refused with 429.
        max_body_bytes: longest body of a request.
        max_documents: most documents of one request.
        timeout: seconds until a request is given up, the reading of its body included.
        metrics: whether ``GET /metrics`` shows counts to Prometheus; to all who may ask, whatever their namespace.
    """

    mode: ModeChoice | None = None
    focus: FocusChoice = "auto"
    max_concurrency: int = 64
    max_body_bytes: int = 4 << 20
    max_documents: int = 256
    timeout: float = 600.0
    metrics: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        if self.mode is not None:
            require_mode(self.mode)
        require_focus(self.focus)
        for name in ("max_concurrency", "max_body_bytes", "max_documents"):
            if not is_count(value := getattr(self, name)):
                raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number from 1.")
        if not 0 < self.timeout < math.inf:
            raise InvalidInputError(f"timeout is {self.timeout!r}, but it must be a number of seconds above 0.")
