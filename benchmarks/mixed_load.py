"""Measure a server of two tenants under attack: good requests, their times, memory, and the time to stop.

    python benchmarks/mixed_load.py [--model NAME] [--tiny] [--seconds 60] [--clients 3]
        [--questions 20]

Starts ``kvfusion serve`` with a store. Clients of one tenant ask questions whose answers are known from a generator
without a server. After a while without attacks, the other tenant attacks (``mixed_load_attacks.py``) and the server is
restarted twice. The attackers run in a process of low priority, because in truth they have machines of their own.
Exits with 1 if an answer was wrong or lost, if attacked requests take more than twice as long at the 95th percentile,
or if a stop takes more than ten seconds.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
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
ATTACKS = Path(__file__).with_name("mixed_load_attacks.py")
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


def attempt(client: httpx.Client, body: dict[str, Any], tally: Tally) -> str | None:
    """Return the answer, or None if the client should try again."""
    began = time.monotonic()
    try:
        found = client.post(CHAT, json=body)
    except httpx.TransportError:
        return None
    if found.status_code != 200:
        return None if found.status_code in (429, 503) else f"status {found.status_code}"
    tally.times.append(time.monotonic() - began)
    return found.json()["choices"][0]["message"]["content"]


def ask_until(server: Server, answers: dict[int, str], tally: Tally, stop: threading.Event, seed: int) -> None:
    """Ask questions one after another, as a client does that retries."""
    numbers = random.Random(seed)
    with httpx.Client(base_url=server.url, headers=headers_of(GOOD), timeout=PATIENCE) as client:
        while not stop.is_set():
            number = numbers.choice(list(answers))
            until = time.monotonic() + PATIENCE
            while (text := attempt(client, body_of(server.model, number), tally)) is None:
                tally.retries += 1
                if time.monotonic() > until:
                    break
                time.sleep(0.3)
            tally.lost += text is None
            tally.wrong += text not in (None, answers[number])


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
    attacker = subprocess.Popen([sys.executable, str(ATTACKS), server.url, server.model])
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
    parser.add_argument("--questions", type=int, default=20, help="different good questions (default: 20)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.tiny:
            sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
            import tiny

            args.model = str(tiny.save(folder / "model", max_position_embeddings=8192))
        found = measure(Server(args.model, folder), known_answers(args.model, args.questions), args)
    print(json.dumps(found, indent=2))
    attacked = found["attacked"]
    is_good = attacked["wrong"] == attacked["lost"] == 0 and found["ratio of p95"] <= MAX_RATIO
    return 0 if is_good and max(found["seconds to stop"]) <= MAX_STOP_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
