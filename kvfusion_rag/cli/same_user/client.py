"""Asks a running server of the same user over its Unix socket."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError, KVFusionError
from .place import is_private

ALIVE_SECONDS = 5.0  # time for a busy server to reply that it runs

logger = logging.getLogger(__name__)


class UnixConnection(HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, place: Path, timeout: float | None = None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._place = place

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._place))


def is_answering(place: Path) -> bool:
    """Return whether a server of this user answers at ``place``. The socket of a stopped one refuses."""
    if not is_private(place):
        return False
    connection = UnixConnection(place, ALIVE_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def ask_server(place: Path, request: dict[str, Any], key: str | None) -> Iterator[dict[str, Any]] | None:
    """Return the objects of a server's answer, or None if no server of this user can answer.

    Args:
        request: fields of ``AskRequest``.
        key: API key for a server that needs one.

    Raises:
        InvalidInputError: the question or an option is not allowed, or the files cannot be read.
    """
    if not is_answering(place):
        return None
    headers = {"content-type": "application/json", "connection": "close"}
    headers |= {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        connection = UnixConnection(place)
        connection.request("POST", "/ask", json.dumps(request), headers)
        response = connection.getresponse()
        if response.status == 200 and request["stream"]:
            return _events(response)
        data = json.loads(response.read())
    except (OSError, HTTPException, ValueError) as error:
        logger.info("the running server stopped before it answered: %s", error)
        return None
    if response.status == 200:
        return iter([data])
    message = data["error"]["message"]
    if response.status == 400:
        raise InvalidInputError(message)
    logger.warning("the running server over these documents does not answer, so the model is loaded here: %s", message)
    return None


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events.

    Raises:
        KVFusionError: the answer failed, or the server ended before its end.
    """
    try:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise KVFusionError(event["error"]["message"])
            yield event
    except (OSError, HTTPException):
        pass
    raise KVFusionError("the running server stopped before its answer was complete; ask again.")
