"""Measure how times and sizes of the vector index and of a store's folder grow with the number of passages.

    python benchmarks/growth_time.py [--chunks 10000 100000 300000] [--files 1000 10000] [--json results.json]

Vectors are random, with 384 numbers as in all-MiniLM-L6-v2, and texts have 600 characters (about 150 tokens). A search
is measured without embedding the question. Stored documents have one token, because only their number matters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvfusion_rag import DiskStore
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.model.kv import DocumentKV
from kvfusion_rag.retrieval.collection import DATABASE_FILE, ChunkCollection, Place, StoredChunk, StoredFile, text_key
from kvfusion_rag.store import document_key

WIDTH = 384
TEXT = 600  # characters
PER_FILE = 1000  # chunks that are written in one transaction
SEARCHES = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[10_000, 100_000, 300_000])
    parser.add_argument("--files", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {"index": [], "folder": []}
    for name, measure, sizes in (("index", measure_index, args.chunks), ("folder", measure_folder, args.files)):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                figures[name].append({"passages": size} | measure(Path(folder), size))
            print(name, json.dumps(figures[name][-1]))
    if args.json:
        args.json.write_text(json.dumps({"figures": figures, "run": run_facts()}, indent=2) + "\n")


def measure_index(folder: Path, chunks: int) -> dict[str, float]:
    """Return seconds to write, open and search an index of ``chunks`` texts, and its bytes."""
    rng = np.random.default_rng(0)

    def vectors(number: int) -> np.ndarray:
        drawn = rng.standard_normal((number, WIDTH), dtype=np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def write() -> None:
        for start in range(0, chunks, PER_FILE):
            texts = [f"{number} ".ljust(TEXT, "x") for number in range(start, min(start + PER_FILE, chunks))]
            keys = [text_key(text) for text in texts]
            places = tuple(Place(str(start), number, key, 0, TEXT) for number, key in enumerate(keys, start=1))
            rows = zip(keys, texts, vectors(len(texts)), strict=True)
            file = StoredFile(str(start), "", "", (), places)
            collection.write([], [file], [StoredChunk(key, "", text, vector) for key, text, vector in rows])

    def search() -> None:
        np.argsort(collection.distances(question)[1], kind="stable")  # as in DocumentIndex.search

    collection = ChunkCollection(folder, "measured", {})
    wrote = _seconds(write)
    collection.close()
    opened = time.perf_counter()
    collection = ChunkCollection(folder, "measured", {})
    opened = time.perf_counter() - opened
    question = vectors(1)[0]
    search()  # the first one joins the vectors to a matrix
    seconds = sorted(_seconds(search) for _ in range(SEARCHES))
    collection.close()
    return {
        "write_seconds": round(wrote, 2),
        "open_seconds": round(opened, 3),
        "search_seconds": round(median(seconds), 6),
        "search_seconds_least": round(seconds[0], 6),
        "search_seconds_most": round(seconds[-1], 6),
        "bytes": (folder / DATABASE_FILE).stat().st_size,
    }


def measure_folder(folder: Path, files: int) -> dict[str, float]:
    """Return seconds to write and open a store folder with ``files`` documents, and the bytes of its index."""
    kv = DocumentKV(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), (0,))
    store = DiskStore(folder / "store")
    keys = [document_key("", "", (number,)) for number in range(files)]
    wrote = _seconds(lambda: [store.put(key, kv) for key in keys])
    opened = _seconds(lambda: DiskStore(folder / "store"))
    return {
        "write_seconds": round(wrote, 2),
        "open_seconds": round(opened, 3),
        "index_bytes": (folder / "store" / "index.sqlite").stat().st_size,
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
