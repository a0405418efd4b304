"""Small document KVs, stores and requests for the tests of the store."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from kvfusion_rag import DiskStore, DocumentStore, MemoryStore, RemoteStore
from kvfusion_rag.model.kv import DocumentKV, KVShape
from kvfusion_rag.store import KVRequest, document_key
from kvfusion_rag.store.documents import Compute
from kvfusion_rag.store.format import layout

SHAPE = KVShape(2, 3, 8, 12, torch.float32)
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ids_of(number: int, tokens: int = 5) -> tuple[int, ...]:
    return tuple(range(number * 100, number * 100 + tokens))


def key_of(number: int, tokens: int = 5, namespace: str = "", model: str = "model") -> str:
    return document_key(model, namespace, ids_of(number, tokens))


SIZE = layout(key_of(1), 5, SHAPE, "raw").total  # bytes of one document's file


def kv_of(number: int, tokens: int = 5, shape: KVShape = SHAPE) -> DocumentKV:
    """Return the one correct KV of document ``number``, a function of its token ids."""
    generator = torch.Generator().manual_seed(number)
    grid, widths = (shape.layers, shape.heads, tokens), (shape.key_width, shape.value_width)
    keys, values = (torch.randn(*grid, width, generator=generator).to(shape.dtype) for width in widths)
    return DocumentKV(keys, values, ids_of(number, tokens))


def same(a: DocumentKV, b: DocumentKV) -> bool:
    return a.token_ids == b.token_ids and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def put(store: DiskStore, *numbers: int, **names: str) -> None:
    for number in numbers:
        assert store.put(key_of(number, **names), kv_of(number))


def read(store: DiskStore, number: int, tokens: int = 5, shape: KVShape = SHAPE, **names: str):
    """Return the miss (or None) and the KV of document ``number``."""
    into = shape.empty(ids_of(number, tokens))
    return store.get(key_of(number, tokens, **names), shape, into), into


def files_of(store: DiskStore) -> list[Path]:
    return sorted(store.path.glob("v*/*/*/*.safetensors"))


class Computer:
    """Computes the correct KVs and records the requested keys."""

    def __init__(
        self, numbers: Iterable[int], tokens: int = 5, namespace: str = "", before: Callable[[], Any] = lambda: None
    ) -> None:
        self._documents = {key_of(n, tokens, namespace): (n, tokens) for n in numbers}
        self._before = before
        self.computed: list[str] = []

    def __call__(self, keys: Sequence[str]):
        for key in keys:
            self.computed.append(key)
            self._before()
            yield key, kv_of(*self._documents[key])


def fetch_kvs(store: DocumentStore, numbers: Iterable[int], compute: Compute, namespace: str = "", into=None):
    """Fetch documents, into the slots of ``into`` by number if given."""
    requests = {
        key_of(number, namespace=namespace): KVRequest(ids_of(number), (into or {}).get(number)) for number in numbers
    }
    return store.fetch(requests, SHAPE, CPU, compute)


def fetch(store: DocumentStore, numbers: Iterable[int], compute: Compute | None = None, namespace: str = ""):
    """Fetch documents, check their KVs and return their origins."""
    keys = {number: key_of(number, namespace=namespace) for number in numbers}
    fetched = fetch_kvs(store, keys, compute or Computer(keys, namespace=namespace), namespace)
    assert all(same(fetched.kvs[key], kv_of(number)) for number, key in keys.items())
    return [fetched.origins[key] for key in keys.values()]


def prefetch(store: DocumentStore, *numbers: int) -> Future[int]:
    return store.prefetch({key_of(n): ids_of(n) for n in numbers}, SHAPE, CPU)


def layered(folder: Path, **options: Any) -> DocumentStore:
    """Return a store with memory and disk tiers."""
    return DocumentStore(MemoryStore(), DiskStore(folder / "disk"), **options)


def failing(error: Exception) -> Callable[..., Any]:
    """Return a function that raises ``error``."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def run_forked(work: Callable[[], object]) -> int | None:
    """Run ``work`` in a forked process and return its exit code, or None if it hangs."""
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    return code


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # because the path of a socket is short
    try:
        with closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(path.name[:100])
    finally:
        os.chdir(here)
    os.rename(path.parent / path.name[:100], path)


# What can lie in the place of a file, by name
FOREIGN: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": lambda path: (path / "inside").mkdir(parents=True),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "link to itself": lambda path: path.symlink_to(path),
}


def put_all(remote: RemoteStore, *numbers: int) -> None:
    for number in numbers:
        remote.put(key_of(number), kv_of(number))


def remote_entries(remote: RemoteStore) -> int:
    return sum(count for _, count in remote.totals().values())
