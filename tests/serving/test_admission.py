"""Limits on concurrency, size and time against a real server, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import tiny
from fakes import RecordingGenerator
from serving_client import CHAT, request

from kvfusion_rag import Answer, KVFusionGenerator, MemoryStore
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.serving import Access, ServingOptions, create_app, running, server


class NeverAnswers(RecordingGenerator):
    """A generator whose answers begin and never end, until they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.cancelled = threading.Event(), threading.Event()

    async def aanswer(self, *args: Any, **kwargs: Any) -> Answer:
        self.started.set()
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class StallsAfterOnePiece(RecordingGenerator):
    def step(self) -> None:
        self.threads.append(threading.get_ident())
        assert self.hold is not None
        if len(self.threads) > 1 and not self.hold.wait(10):
            raise TimeoutError("held too long")


@contextmanager
def served(generator: Any, **options: Any) -> Iterator[httpx.Client]:
    with (
        running(create_app(generator, options=ServingOptions(**options))) as url,
        httpx.Client(base_url=url, timeout=20) as client,
    ):
        yield client


def soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true within a few seconds."""
    limit = time.monotonic() + 10
    while not (found := condition()) and time.monotonic() < limit:
        time.sleep(0.01)
    return found


def disconnect_early(
    client: httpx.Client, body: dict[str, Any], ready: Callable[[], object], *, path: str = CHAT
) -> None:
    """Send a request and disconnect once ``ready`` returns."""
    data = json.dumps(body).encode()
    with connection(client) as sock:
        sock.sendall(head(len(data)).replace(CHAT.encode(), path.encode()) + data)
        ready()


def connection(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10)


def head(length: object, *headers: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"]
    lines += headers
    return "\r\n".join([*lines, "", ""]).encode()


def is_idle(client: httpx.Client) -> bool:
    """Whether a slot is free. The request is invalid, so it never reaches the generator."""
    return client.post(CHAT, json={}).status_code == 400


# Concurrency


def test_requests_above_the_limit_are_rejected():
    generator = NeverAnswers()
    with served(generator, max_concurrency=1) as client:
        with connection(client) as sock:
            data = json.dumps(request()).encode()
            sock.sendall(head(len(data)) + data)
            assert generator.started.wait(10)
            rejected = client.post(CHAT, json=request())
            assert rejected.status_code == 429 and rejected.headers["retry-after"] == "1"
            assert rejected.json()["error"]["type"] == "rate_limit_error"
            assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
        assert soon(lambda: is_idle(client))


def test_tenant_cannot_take_the_places_of_others():
    keys = {f"key-of-the-tenant-{name}": name for name in "ab"}
    generator = NeverAnswers()
    generator.with_namespace = lambda name: generator if name == "a" else RecordingGenerator()  # type: ignore[attr-defined]
    app = create_app(generator, access=Access(keys), options=ServingOptions(max_concurrency=2))  # type: ignore[arg-type]
    first, other = ({"authorization": f"Bearer {key}"} for key in keys)
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        with connection(client) as sock:
            data = json.dumps(request()).encode()
            sock.sendall(head(len(data), f"authorization: {first['authorization']}") + data)
            assert generator.started.wait(10)
            rejected = client.post(CHAT, json=request(), headers=first)
            assert rejected.status_code == 429 and "1 requests of this tenant" in rejected.text
            assert client.post(CHAT, json=request(), headers=other).status_code == 200
        assert generator.cancelled.wait(10)


# Disconnects


def test_disconnect_cancels_the_answer():
    generator = NeverAnswers()
    with served(generator) as client:
        disconnect_early(client, request(), generator.started.wait)
        assert generator.cancelled.wait(10)


def test_decoding_stops_after_a_disconnect():
    backbone = tiny.backbone("llama", max_position_embeddings=100_000)
    generator = KVFusionGenerator(TorchModel(backbone), store=MemoryStore())
    steps: list[None] = []
    with served(generator, max_concurrency=1) as client:
        asked = {**request(max_tokens=90_000), "model": generator.model_id}
        counting = backbone.model.register_forward_hook(lambda *_: steps.append(None))
        disconnect_early(client, asked, lambda: soon(lambda: len(steps) > 3))
        assert soon(lambda: is_idle(client))
        short = client.post(
            CHAT, json={**asked, "max_tokens": 2}
        )  # one thread computes all answers, so the first has ended
        counting.remove()
    assert short.json()["choices"][0]["finish_reason"] == "length"
    assert 3 < len(steps) < 20_000


def test_stream_is_closed_after_a_disconnect():
    generator = RecordingGenerator(pieces=["word "] * 500_000)
    with served(generator) as client:
        with client.stream("POST", CHAT, json=request(stream=True)) as response:
            next(response.iter_lines())
        assert soon(lambda: generator.streams[0].closed)
        assert len(generator.threads) < 500_000


def test_slot_is_released_only_when_the_current_piece_is_done():
    generator = RecordingGenerator(hold=threading.Event())
    with served(generator, max_concurrency=1) as client:
        disconnect_early(client, request(stream=True), lambda: soon(lambda: bool(generator.threads)))
        time.sleep(0.1)
        assert not is_idle(client) and not generator.streams[0].closed
        generator.hold.set()
        assert soon(lambda: is_idle(client)) and generator.streams[0].closed


# Time


def test_answer_is_cancelled_after_the_timeout():
    generator = NeverAnswers()
    with served(generator, timeout=0.3, max_concurrency=1) as client:
        late = client.post(CHAT, json=request())
        assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"
        assert generator.cancelled.wait(10) and soon(lambda: is_idle(client))


def test_stream_ends_with_an_error_after_the_timeout():
    generator = StallsAfterOnePiece(hold=threading.Event())
    with served(generator, timeout=0.5, max_concurrency=1) as client:
        late = client.post(CHAT, json=request(stream=True))
        *pieces, last, done, rest = late.text.split("\n\n")
        assert late.status_code == 200 and len(pieces) == 2 and (done, rest) == ("data: [DONE]", "")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert not is_idle(client)
        generator.hold.set()
        assert soon(lambda: is_idle(client)) and generator.streams[0].closed


def test_incomplete_body_is_rejected_after_the_timeout():
    with served(RecordingGenerator(), timeout=0.3, max_concurrency=1) as client:
        with connection(client) as sock:
            sock.sendall(head(100) + b"{")
            assert b" 504 " in sock.recv(4096).partition(b"\r\n")[0]
        assert soon(lambda: is_idle(client))


# Size


def test_body_size_is_checked_while_the_body_is_read():
    generator = RecordingGenerator()
    body = json.dumps(request(documents=["x" * 3000])).encode()
    with served(generator, max_body_bytes=len(body), max_concurrency=1) as client:
        headers = {"content-type": "application/json"}
        parts = [body[at : at + 700] for at in range(0, len(body), 700)]
        assert client.post(CHAT, content=iter(parts), headers=headers).status_code == 200  # without Content-Length
        for content in (body + b" ", iter([*parts, b" "])):
            found = client.post(CHAT, content=content, headers=headers)
            assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"
        assert is_idle(client) and len(generator.calls) == 1


@pytest.mark.parametrize("length", [1 << 40, 10**30, "9" * 5000])
def test_body_with_a_large_content_length_is_rejected_unread(length):
    with served(RecordingGenerator()) as client, connection(client) as sock:
        sock.sendall(head(length))
        assert sock.recv(4096).split(b" ")[1] in (b"413", b"400")  # uvicorn itself rejects some numbers


def test_client_with_a_large_body_receives_the_error():
    with served(RecordingGenerator(), max_body_bytes=1000, max_concurrency=1) as client:
        for content in (b" " * (20 << 20), iter([b" " * (1 << 20)] * 20)):
            found = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert found.status_code == 413


@pytest.mark.parametrize("headers", [{}, {"host": "page.example"}], ids=["too long", "not allowed"])
def test_connection_with_an_endless_body_is_closed(headers):
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    with served(RecordingGenerator(), max_body_bytes=1 << 20, max_concurrency=1) as client:
        with suppress(httpx.TransportError):  # it may be closed while the client writes
            found = client.post(CHAT, content=endless(), headers={"content-type": "application/json", **headers})
            assert found.status_code in (413, 403)
        assert soon(lambda: is_idle(client))


# Headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([f"x-{n}: {n}" for n in range(90)], b"200"),
        ([f"x-{n}: {n}" for n in range(200)], b"431"),
        ([f"x-{n}: {n}" for n in range(20_000)], b"400"),
        (["x: " + "x" * 40_000], b"400"),
    ],
    ids=["usual", "many", "very many", "long"],
)
def test_headers_are_limited(headers, status):
    data = json.dumps(request()).encode()
    with served(RecordingGenerator()) as client, connection(client) as sock:
        with suppress(ConnectionError):  # closed while the client writes
            sock.sendall(head(len(data), *headers) + data)
        assert sock.recv(4096).split(b" ")[1] == status


def test_endless_headers_close_the_connection():
    with served(RecordingGenerator()) as client, connection(client) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                sock.sendall(b"x: y\r\n" * 1000)
                time.sleep(0.01)
        assert client.get("/health").status_code == 200


# Stopping


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_open_requests_end_with_an_error_when_the_server_stops(monkeypatch, stream):
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 0.2)
    generator = StallsAfterOnePiece(hold=threading.Event()) if stream else NeverAnswers()
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(httpx.post(f"{url}{CHAT}", json=request(stream=stream), timeout=20))
        if generator.hold is not None:
            generator.hold.set()

    thread = threading.Thread(target=ask)
    with running(create_app(generator)) as url:
        thread.start()
        assert soon(lambda: len(generator.threads) > 1) if stream else generator.started.wait(10)
    thread.join()
    assert found[0].status_code == (200 if stream else 503)
    last = found[0].text
    if stream:
        *_, last, done, rest = last.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
