"""How a worker loads its generator and opens its store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..generator import KVFusionGenerator
from ..home import absolute, home
from ..store import DEFAULT_DISK_BYTES, DEFAULT_MEMORY_BYTES, DocumentStore, MemoryStore, as_store, open_store

KEYWORDS = (None, "shipped")  # for adapters that are not a folder


@dataclass(frozen=True, slots=True)
class GeneratorSpec:
    """A generator as plain data, which can be sent to other machines. These need the same model under this name.

    Attributes:
        model: hub name, folder or GGUF file. Default: SmolLM2-135M-Instruct.
        store: folder or URL of the store. Default: each worker's memory.
        store_options: options of ``open_store``.
        options: options of ``KVFusionGenerator.from_pretrained`` apart from model and store, such as namespace.
        namespace_bytes: maximum bytes of one namespace on the store's local disk, and the same share of its memory.
            Default: no limit.
    """

    model: str | None = None
    store: str | None = None
    store_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    namespace_bytes: int | None = None

    def open_store(self, cache: Path | None = None) -> DocumentStore | str:
        """Open the store, or return "memory". ``cache`` is the folder of the local disk tier in front of a URL."""
        share = self.namespace_bytes
        if share is None:
            return "memory" if self.store is None else open_store(self.store, local=cache, **self.store_options)
        if self.store is None:
            return as_store(MemoryStore(namespace_bytes=share))
        of_memory = max(1, DEFAULT_MEMORY_BYTES * share // self.store_options.get("max_bytes", DEFAULT_DISK_BYTES))
        memory = MemoryStore(namespace_bytes=of_memory)
        return open_store(self.store, local=cache, memory=memory, namespace_bytes=share, **self.store_options)

    def load(self, cache: Path | None = None) -> KVFusionGenerator:
        """Load the model with the store. ``cache`` is as in :meth:`open_store`."""
        return KVFusionGenerator.from_pretrained(self.model, store=self.open_store(cache), **self.options)

    def in_this_folder(self) -> GeneratorSpec:
        """Return the same generator with absolute paths, because workers have other current folders."""
        model = absolute_if_here(self.model)
        is_url = self.store is None or "://" in self.store
        store = self.store if is_url else str(absolute(self.store or ""))
        named = {name: self.options.get(name) for name in ("adapter", "decoder")}
        weights = {name: absolute_if_here(one) for name, one in named.items() if one not in KEYWORDS}
        return replace(self, model=model, store=store, options={**self.options, **weights})


def absolute_if_here(name: str | None) -> str | None:
    """Return the absolute path if ``name`` is one of this folder, and not a name of the hub."""
    return str(absolute(name)) if name is not None and os.path.exists(name) else name


class WorkerCache:
    """A folder for the local disk tier of one worker process, which later workers of this machine use again.

    Args:
        url: URL of the store.

    Attributes:
        folder: the first free one. It stays locked while this object exists, also by its process's death.
    """

    def __init__(self, url: str) -> None:
        base = home() / "store" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-workers"
        base.mkdir(parents=True, exist_ok=True)
        for number in count():
            self._lock = FileLock(base / f"{number}.lock")
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                continue
            self.folder = base / str(number)
            return
