"""Measure a server of two tenants under attack: good requests, their times, memory, and the time to stop.

    python benchmarks/mixed_load.py [--model NAME] [--tiny] [--seconds 60] [--clients 3] [--json results.json]

Starts ``kvfusion serve`` with a store. Clients of one tenant ask questions whose answers are known from a generator
without a server. After a while without attacks, the other tenant attacks and the server is restarted twice. The
attackers run in a process of low priority, because in truth they have machines of their own. Exits with 1 if an answer
was wrong or lost, if attacked requests take more than twice as long at the 95th percentile, or if a stop takes more
than ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

CHAT, DOCUMENTS = "/v1/chat/completions", "/v1/documents"
GOOD, BAD = "key-of-the-good-tenant", "key-of-the-attacker"
NAMES = (
    "Amara Osei",
    "Thomas Grant",
    "Ada Quill",
    "Tomas Lindqvist",
    "Vera Holm",
    "Piet Maas",
    "Rosa Blum",
    "Ian Frey",
)
WORKS = ("mill", "ferry", "pier", "bakery", "lock")
PEOPLE = [(work, name, 1850 + 7 * number) for number, name in enumerate(NAMES) for work in WORKS]
PAUSE = 0.2  # seconds between two requests of one attacker
PATIENCE = 120.0  # seconds for which a good client retries
MAX_RATIO, MAX_STOP_SECONDS = 2.0, 10.0


def question(number: int) -> tuple[str, list[str]]:
    """Return a question and its documents, the same for each number."""
    rng = random.Random(number)
    documents = [
        f"The {work} of {name.split()[1]} was built by {name} in {year}." for work, name, year in rng.sample(PEOPLE, 4)
    ]
    return f"Who built the {documents[0].split()[1]} of {documents[0].split()[3]}?", documents


def body_of(model: str, number: int) -> dict[str, Any]:
    asked, documents = question(number)
    messages = [{"role": "user", "content": asked}]
    return {"model": model, "messages": messages, "documents": documents, "max_tokens": 12}


def headers_of(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "content-type": "application/json"}


class Server:
    """A server process that can be stopped and started again at the same address."""

    def __init__(self, model: str | None, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        (folder / "keys.json").write_text(json.dumps({GOOD: "good", BAD: "bad"}))
        options = ["--port", str(port), "--api-keys-file", str(folder / "keys.json"), "--store", str(folder / "store")]
        options += ["--store-namespace-bytes", "1GiB", *(["--model", model] if model else [])]
        self._command = [sys.executable, "-m", "kvfusion_rag.cli", "serve", *options]
        self.model = ""
        self.peak = 0.0
        self.start()

    def start(self) -> None:
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        assert self._process.stdout is not None
        self.model = self._process.stdout.readline().decode().split()[1]  # serving NAME at URL

    def stop(self) -> float:
        """Stop the server as an operator does, and return the seconds until its process has ended."""
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        assert code == 0, f"the server ended with exit code {code}"
        return time.monotonic() - began

    def memory(self) -> float:
        """Return the resident memory in MiB, and keep the largest value."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            found = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
            self.peak = max(self.peak, found)
            return found
        return 0.0


@dataclass
class Tally:
    """What happened to good requests. Times are of the attempt that was answered, in seconds."""

    times: list[float] = field(default_factory=list)
    retries: int = 0
    wrong: int = 0
    lost: int = 0

    def percentile(self, share: float) -> float:
        return statistics.quantiles(self.times, n=100, method="inclusive")[round(100 * share) - 1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "requests": len(self.times), "wrong": self.wrong, "lost": self.lost, "retries": self.retries,
            "p50": round(self.percentile(0.5), 3), "p95": round(self.percentile(0.95), 3),
        }  # fmt: skip


def ask_until(server: Server, answers: dict[int, str], tally: Tally, stop: threading.Event, seed: int) -> None:
    """Ask questions one after another, as a client does that retries."""
    numbers = random.Random(seed)
    with httpx.Client(base_url=server.url, headers=headers_of(GOOD), timeout=PATIENCE) as client:
        while not stop.is_set():
            number = numbers.choice(list(answers))
            until = time.monotonic() + PATIENCE
            while True:
                began = time.monotonic()
                with suppress(httpx.TransportError):
                    found = client.post(CHAT, json=body_of(server.model, number))
                    if found.status_code == 200:
                        tally.times.append(time.monotonic() - began)
                        tally.wrong += found.json()["choices"][0]["message"]["content"] != answers[number]
                        break
                    if found.status_code not in (429, 503):
                        tally.wrong += 1
                        break
                tally.retries += 1
                if time.monotonic() > until:
                    tally.lost += 1
                    break
                time.sleep(0.3)


# Attacks: each function makes one attempt


def send(url: str, data: bytes, seconds: float) -> None:
    """Send bytes, read for a while, and leave."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=seconds) as sock:
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


def attacks_of(url: str, model: str) -> dict[str, Callable[[], None]]:
    chat = body_of(model, 0)
    same = [{"id": "x" * 20_000 if n == 0 else str(n), "text": "The ferry carries forty cars."} for n in range(100)]
    long = "The keeper of the lamp walks down to the harbour every evening. " * 8_000

    def post(path: str, seconds: float = 30.0, **body: Any) -> None:
        send(url, raw(path, json.dumps(body).encode()), seconds)

    def slow_headers() -> None:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as sock:
            for letter in raw(CHAT, b"")[:40]:
                sock.sendall(bytes([letter]))
                time.sleep(0.25)

    def forget() -> None:
        post("/v1/documents/forget", documents=question(random.randrange(len(PEOPLE)))[1])

    return {
        "zeros for documents": lambda: post(CHAT, **{**chat, "documents": [0] * 1_300_000}),
        "zeros to forget": lambda: post("/v1/documents/forget", documents=[0] * 1_300_000),
        "long document, client leaves": lambda: post(DOCUMENTS, 1.0, documents=[f"{random.random()} {long}"]),
        "many documents, client leaves": lambda: post(
            DOCUMENTS, 1.0, documents=[f"{random.random()} {long[:2000]}" for _ in range(200)]
        ),
        "long id": lambda: post(CHAT, **{**chat, "documents": same}),
        "long title": lambda: post(CHAT, **{**chat, "documents": [{"text": "x", "title": long[:200_000]}]}),
        "long question": lambda: post(CHAT, **{**chat, "messages": [{"role": "user", "content": long}]}),
        "forget": forget,
        "slow headers": slow_headers,
        "many headers": lambda: send(url, raw(CHAT, b"{}", *[f"x-{n}: {n}" for n in range(20_000)]), 5.0),
        "no key": lambda: send(url, raw(CHAT, b"[" * 1_000_000, key="guessed"), 5.0),
    }


def attack(url: str, model: str) -> None:
    """Attack until the process is ended."""
    os.nice(10)

    def repeat(one: Callable[[], None]) -> None:
        while True:
            with suppress(OSError):
                one()
            time.sleep(PAUSE)

    threads = [threading.Thread(target=repeat, args=(one,), daemon=True) for one in attacks_of(url, model).values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# The run


@contextmanager
def good_clients(server: Server, answers: dict[int, str], count: int) -> Iterator[Tally]:
    tally, stop = Tally(), threading.Event()
    threads = [threading.Thread(target=ask_until, args=(server, answers, tally, stop, n)) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def watch(server: Server, seconds: float) -> None:
    """Wait, and note the server's memory meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        server.memory()
        time.sleep(0.2)


def known_answers(model: str | None, number: int) -> dict[int, str]:
    """Return the answers of a generator without a server, by question."""
    import torch

    from kvfusion_rag import KVFusionGenerator

    torch.set_num_threads(1)
    generator = KVFusionGenerator.from_pretrained(model)
    return {n: generator.answer(*question(n), max_new_tokens=12).text for n in range(number)}


def measure(server: Server, answers: dict[int, str], args: argparse.Namespace) -> dict[str, Any]:
    for number in answers:  # all documents are stored before anything is timed
        httpx.post(server.url + CHAT, json=body_of(server.model, number), headers=headers_of(GOOD), timeout=PATIENCE)
    stops: list[float] = []
    with good_clients(server, answers, args.clients) as calm:
        watch(server, args.seconds)
    before, server.peak = server.memory(), 0.0
    attacker = subprocess.Popen([sys.executable, __file__, "--attack", server.url, "--attacked-model", server.model])
    try:
        with good_clients(server, answers, args.clients) as attacked:
            for _ in range(2):
                watch(server, args.seconds)
                stops.append(server.stop())
                server.start()
            watch(server, args.seconds)
    finally:
        attacker.kill()
        attacker.wait()
    watch(server, 15)  # work of clients that have left ends
    after = server.memory()
    stops.append(server.stop())
    return {
        "calm": calm.to_dict(),
        "attacked": attacked.to_dict(),
        "ratio of p95": round(attacked.percentile(0.95) / calm.percentile(0.95), 2),
        "memory in MiB": {"before": round(before), "peak": round(server.peak), "after": round(after)},
        "seconds to stop": [round(seconds, 1) for seconds in stops],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name, folder or GGUF file (default: the default model)")
    parser.add_argument("--tiny", action="store_true", help="a random model of the tests, for a quick run")
    parser.add_argument("--seconds", type=float, default=60, help="of each of the four parts (default: 60)")
    parser.add_argument("--clients", type=int, default=3, help="good clients (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--attacked-model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        attack(args.attack, args.attacked_model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.tiny:
            sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
            import tiny

            args.model = str(tiny.save(folder / "model", max_position_embeddings=8192))
        found = measure(Server(args.model, folder), known_answers(args.model, len(PEOPLE)), args)
    print(json.dumps(found, indent=2))
    if args.json:
        from kvfusion_rag.evaluation.report import run_facts

        args.json.write_text(json.dumps({**found, "run": run_facts()}, indent=2) + "\n")
    attacked = found["attacked"]
    is_good = attacked["wrong"] == attacked["lost"] == 0 and found["ratio of p95"] <= MAX_RATIO
    return 0 if is_good and max(found["seconds to stop"]) <= MAX_STOP_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
