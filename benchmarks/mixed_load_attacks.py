"""Attack a server: huge, long, slow and endless requests of one tenant, until the process is ended.

    python benchmarks/mixed_load_attacks.py URL MODEL

Part of ``mixed_load.py``.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from mixed_load import BAD, CHAT, body_of, question

DOCUMENTS = "/v1/documents"
PAUSE = 0.2  # seconds between two requests of one attacker


def connect(url: str, seconds: float) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=seconds)


def send(url: str, data: bytes, seconds: float) -> None:
    """Send bytes, read for a while, and leave."""
    with connect(url, seconds) as sock:
        sock.sendall(data)
        with suppress(TimeoutError):
            while sock.recv(65536):
                pass


def raw(path: str, body: bytes, *headers: str, key: str = BAD) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join([*lines, f"authorization: Bearer {key}", "connection: close", *headers, "", ""]).encode() + body


def attacks_of(url: str, model: str) -> list[Callable[[], None]]:
    chat = body_of(model, 0)
    same = [{"id": "x" * 20_000 if n == 0 else str(n), "text": "The ferry carries forty cars."} for n in range(100)]
    long = "The keeper of the lamp walks down to the harbour every evening. " * 8_000

    def post(path: str, seconds: float = 30.0, **body: Any) -> None:
        send(url, raw(path, json.dumps(body).encode()), seconds)

    def slow_headers() -> None:
        with connect(url, 5.0) as sock:
            for letter in raw(CHAT, b"")[:40]:
                sock.sendall(bytes([letter]))
                time.sleep(0.25)

    def forget() -> None:
        post("/v1/documents/forget", documents=question(random.randrange(20))[1])

    return [
        lambda: post(CHAT, **{**chat, "documents": [0] * 1_300_000}),
        lambda: post("/v1/documents/forget", documents=[0] * 1_300_000),
        lambda: post(DOCUMENTS, 1.0, documents=[f"{random.random()} {long}"]),  # its client leaves
        lambda: post(DOCUMENTS, 1.0, documents=[f"{random.random()} {long[:15_000]}"]),  # one pass, if it fits
        lambda: post(DOCUMENTS, 1.0, documents=[f"{random.random()} {long[:2000]}" for _ in range(200)]),
        lambda: post(CHAT, **{**chat, "documents": same}),
        lambda: post(CHAT, **{**chat, "documents": [{"text": "x", "title": long[:200_000]}]}),
        lambda: post(CHAT, **{**chat, "messages": [{"role": "user", "content": long}]}),
        forget,
        slow_headers,
        lambda: send(url, raw(CHAT, b"{}", *[f"x-{n}: {n}" for n in range(20_000)]), 5.0),
        lambda: send(url, raw(CHAT, b"[" * 1_000_000, key="guessed"), 5.0),
    ]


def attack(url: str, model: str) -> None:
    """Attack until the process is ended."""
    os.nice(10)

    def repeat(one: Callable[[], None]) -> None:
        while True:
            with suppress(OSError):
                one()
            time.sleep(PAUSE)

    for one in attacks_of(url, model):
        threading.Thread(target=repeat, args=(one,)).start()


if __name__ == "__main__":
    attack(*sys.argv[1:])
