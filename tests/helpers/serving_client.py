"""An in-process client of the server, and the bodies and events of its requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.testclient import TestClient

from kvfusion_rag.serving import Access, ServingOptions, create_app

CHAT = "/v1/chat/completions"


def client_of(generator: Any, access: Access | None = None, **options: Any) -> TestClient:
    """Return a client that the app treats as a client on this machine."""
    app = create_app(generator, access=access, options=ServingOptions(**options))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "fake/model", "messages": messages or [{"role": "user", "content": "Where?"}], **fields}


def events(text: str) -> Iterator[dict[str, Any]]:
    """Yield the data of server-sent events, and check that they end as OpenAI's do."""
    *found, last, rest = text.split("\n\n")
    assert last == "data: [DONE]" and rest == ""
    for line in found:
        assert line.startswith("data: ") and "\n" not in line
        yield json.loads(line.removeprefix("data: "))


def extension(text: str, *, stream: bool) -> dict[str, Any]:
    """Return the ``kvfusion`` object of a reply."""
    return (list(events(text))[-1] if stream else json.loads(text))["kvfusion"]
