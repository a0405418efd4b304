"""Measures the document store: time to the first token with it, and its read speed compared with plain file reads.

All ratios come from one process with the same weights, documents and questions. Weights are random, since only their
shape matters.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.engine import EngineOptions
from ..engine.requests import Batch
from ..engine.running_batch import start_run
from ..fusion.sampling import DecodingOptions
from ..fusion.torch_model import TorchModel
from ..generator import KVFusionGenerator
from ..store import Codec, DiskStore, DocumentStore, MemoryStore
from .shapes import random_backbone, random_text
from .speed import spread


@dataclass(frozen=True, slots=True)
class StoreBenchmark:
    """Settings: ``documents`` of ``document_tokens`` each, and a question over all of them."""

    shape: str = "qwen2.5-0.5b"
    documents: int = 20
    document_tokens: int = 256
    question_tokens: int = 64
    dtype: str = "bfloat16"
    device: str = "cpu"
    codec: Codec = "raw"
    repeats: int = 5
    seed: int = 0


def measure_store(options: StoreBenchmark, folder: Path | None = None) -> dict[str, Any]:
    """Return medians, spreads and ratios. The store is created in ``folder``, by default a temporary one.

    Times are seconds to the first token. "disk" reads files that are in the system's page cache, like those of
    documents in use. "cold disk" drops them from the cache first.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        return _Run(options, Path(place)).measure()


class _Run:
    def __init__(self, options: StoreBenchmark, folder: Path) -> None:
        self.options, self.folder = options, folder
        rng = random.Random(options.seed)
        self.backbone = random_backbone(options.shape, options.dtype, options.device, options.seed)
        self.documents = [random_text(rng, options.document_tokens) for _ in range(options.documents)]
        self.question = random_text(rng, options.question_tokens)

    def measure(self) -> dict[str, Any]:
        options = self.options
        disk = DiskStore(self.folder / "store", codec=options.codec)
        memory = self._generator(DocumentStore(MemoryStore(8 << 30)))
        stored = self._generator(DocumentStore(None, disk))
        nothing = self._generator(DocumentStore())
        joined = self._times(lambda: self._first_token(nothing, mode="concat"))
        cold = self._times(lambda: self._first_token(nothing))
        stored.prefill(self.documents)
        memory.prefill(self.documents)
        from_disk = self._times(lambda: self._first_token(stored))
        from_cold_disk = self._times(lambda: self._first_token(stored), before=lambda: _drop_pages(disk.path))
        from_memory = self._times(lambda: self._first_token(memory))
        files = sorted(disk.path.glob("v*/*/*/*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        load = self._times(lambda: self._load(stored))
        raw = self._times(lambda: _read_raw(files))
        times = {"joined prompt": joined, "cold": cold, "disk": from_disk, "cold disk": from_cold_disk,
                 "memory": from_memory}  # fmt: skip
        base = statistics.median(joined)
        tokens = options.documents * options.document_tokens
        return {
            "options": asdict(options),
            "threads": torch.get_num_threads(),
            "seconds_to_first_token": {name: spread(found) for name, found in times.items()},
            "times_faster_than_joined_prompt": {
                name: round(base / statistics.median(found), 2) for name, found in times.items()
            },
            "bytes": size,
            "bytes_per_1000_tokens": round(1000 * size / tokens),
            "read_gb_per_second": {
                "into the fused buffer": _rate(size, load),
                "raw file read": _rate(size, raw),
                "ratio": round(statistics.median(raw) / statistics.median(load), 2),
            },
            "write_seconds_per_document": spread([t / options.documents for t in self._writes()]),
        }

    def _generator(self, store: DocumentStore) -> KVFusionGenerator:
        return KVFusionGenerator(
            TorchModel(self.backbone), store=store, options=EngineOptions(max_fused_tokens=1 << 20)
        )

    def _first_token(self, generator: KVFusionGenerator, **options: Any) -> float:
        answer = generator.answer(self.question, self.documents, max_new_tokens=1, **options)
        return answer.timings.first_token

    def _load(self, generator: KVFusionGenerator) -> float:
        """Return the seconds to fill the fused cache from files, including all checks."""
        engine = generator._engine
        request = engine.request(self.question, self.documents, None, "fusion", DecodingOptions(1))
        began = time.perf_counter()
        start_run(engine.model, engine.document_kvs, Batch.of(request)).release()
        return time.perf_counter() - began

    def _writes(self) -> list[float]:
        """Return the seconds of each repeat to write all documents into an empty store, without computing them."""
        seconds = []
        for number in range(self.options.repeats):
            disk = DiskStore(self.folder / f"written{number}", codec=self.options.codec)
            store = DocumentStore(None, disk)
            self._generator(store).prefill(self.documents)
            seconds.append(store.metrics.store_seconds["disk"])
        return seconds

    def _times(self, measure: Callable[[], float], before: Callable[[], None] = lambda: None) -> list[float]:
        before()
        measure()  # warm-up
        seconds = []
        for _ in range(self.options.repeats):
            before()
            seconds.append(measure())
        return seconds


def _read_raw(files: Sequence[Path]) -> float:
    """Return the seconds of plain reads of all files into allocated memory."""
    buffers = [bytearray(file.stat().st_size) for file in files]
    began = time.perf_counter()
    for file, buffer in zip(files, buffers, strict=True):
        descriptor = os.open(file, os.O_RDONLY)
        os.preadv(descriptor, [buffer], 0)
        os.close(descriptor)
    return time.perf_counter() - began


def _drop_pages(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that they are read from the disk."""
    for file in folder.glob("v*/*/*/*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _rate(size: int, seconds: Sequence[float]) -> float:
    """Return GB per second."""
    return round(size / statistics.median(seconds) / 1e9, 2)
