"""A vector database in memory, shared by name, and a local Chroma server, for tests of shared indexes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from kvfusion_rag.retrieval.databases.database import Record, Table


class MemoryDatabase:
    """Keeps tables in memory. ``fail_at`` makes the call with that number, from 0, raise; writes may be half done."""

    location = "memory://tests"

    def __init__(self, fail_at: int | None = None) -> None:
        self.tables: defaultdict[tuple[str, Table], dict[str, Record]] = defaultdict(dict)
        self.fail_at = fail_at
        self.calls = 0

    def collections(self) -> list[str]:
        return sorted(name for name, table in self.tables if table == "files")

    def read(self, collection: str, table: Table, ids: Sequence[str]) -> list[Record]:
        return [self.tables[collection, table][id] for id in ids if id in self.tables[collection, table]]

    def scan(self, collection: str, table: Table) -> Iterator[Record]:
        yield from [Record(one.id, one.payload) for one in self.tables[collection, table].values()]

    def write(self, collection: str, table: Table, records: Sequence[Record]) -> None:
        for number, record in enumerate(records):
            if number == len(records) // 2:
                self._count()
            self.tables[collection, table][record.id] = record

    def remove(self, collection: str, table: Table, ids: Sequence[str]) -> None:
        for number, id in enumerate(ids):
            if number == len(ids) // 2:
                self._count()
            self.tables[collection, table].pop(id, None)

    def nearest(self, collection: str, vector: np.ndarray, count: int) -> list[tuple[float, Record]]:
        records = self.tables[collection, "texts"].values()
        found = [(1 - float(one.vector @ vector), one) for one in records if one.vector is not None]
        return sorted(found, key=lambda pair: (pair[0], pair[1].id))[:count]

    def close(self) -> None:
        pass

    def _count(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise ConnectionError("the connection was lost")


@contextmanager
def chroma_server(folder: Path) -> Generator[str]:
    """Run a Chroma server and yield its address, ``host:port``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = Path(sys.executable).with_name("chroma")
    host, port = address.split(":")
    process = subprocess.Popen(
        [command, "run", "--path", folder, "--host", host, "--port", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://{address}/api/v2/heartbeat").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < until, "the server did not start"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)
