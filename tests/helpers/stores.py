"""Small document KVs and stores for the tests of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from kvfusion_rag import DiskStore
from kvfusion_rag.model.kv import DocumentKV, KVShape
from kvfusion_rag.store import KVRequest, document_key

SHAPE = KVShape(2, 3, 8, torch.float32)
CPU = torch.device("cpu")


def ids_of(number: int, tokens: int = 5) -> tuple[int, ...]:
    return tuple(range(number * 100, number * 100 + tokens))


def key_of(number: int, tokens: int = 5, namespace: str = "", model: str = "model") -> str:
    return document_key(model, namespace, ids_of(number, tokens))


def kv_of(number: int, tokens: int = 5, shape: KVShape = SHAPE) -> DocumentKV:
    """The one right KV of document ``number``, a function of its ids."""
    generator = torch.Generator().manual_seed(number)
    size = (shape.layers, shape.heads, tokens, shape.width)
    keys, values = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
    return DocumentKV(keys, values, ids_of(number, tokens))


def same(a: DocumentKV, b: DocumentKV) -> bool:
    return a.token_ids == b.token_ids and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def read(store: DiskStore, number: int, tokens: int = 5, shape: KVShape = SHAPE, **names: str):
    """(why not, KV) of document ``number``."""
    into = shape.empty(ids_of(number, tokens))
    return store.get(key_of(number, tokens, **names), shape, into), into


def files_of(store: DiskStore) -> list[Path]:
    return sorted(store.path.glob("v*/*/*/*.safetensors"))


def wanted_of(numbers: Iterable[int], tokens: int = 5, namespace: str = "") -> dict[str, KVRequest]:
    return {key_of(n, tokens, namespace): KVRequest(ids_of(n, tokens)) for n in numbers}


class Computer:
    """Computes the right KVs, and remembers what it was asked for."""

    def __init__(
        self, numbers: Iterable[int], tokens: int = 5, namespace: str = "", before: Callable[[], None] = lambda: None
    ) -> None:
        self._made = {key_of(n, tokens, namespace): (n, tokens) for n in numbers}
        self._before = before
        self.asked: list[str] = []

    def __call__(self, keys: Sequence[str]):
        for key in keys:
            self.asked.append(key)
            self._before()
            yield key, kv_of(*self._made[key])
