"""Measure the effect of ``codec="v8"`` (8-bit values) of the disk store on tokens and exact match.

    python benchmarks/store_compression.py ROWS.jsonl.gz [--model NAME] [--limit 500] --json results.json

ROWS come from ``kvfusion build-data`` or lost-in-the-middle. Each question is answered greedily with both codecs over
the same documents. Intervals are 95 % bootstrap intervals over questions.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kvfusion_rag import DiskStore, DocumentStore, KVFusionGenerator, MemoryStore
from kvfusion_rag.data.formats import read_ready_rows
from kvfusion_rag.evaluation import exact_match
from kvfusion_rag.evaluation.bootstrap import Bootstrap
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.store import CODECS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", help="hub name or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--limit", type=int, help="size of the random sample of rows (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    rows = list(read_ready_rows(args.rows))
    if args.limit is not None:
        rows = random.Random(args.seed).sample(rows, min(args.limit, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, rows, Path(folder))
    report = {"file": args.rows.name, "questions": len(rows), "figures": figures, "run": run_facts()}
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(args: argparse.Namespace, rows: list[Any], folder: Path) -> dict[str, Any]:
    generators = {}
    for codec in CODECS:
        store = DocumentStore(MemoryStore(1 << 28), DiskStore(folder / codec, codec=codec))
        generators[codec] = KVFusionGenerator.from_pretrained(args.model, dtype=args.dtype, store=store)
    right: dict[str, list[float]] = {codec: [] for codec in CODECS}
    same: list[float] = []
    sizes: dict[str, int] = {}
    for row in tqdm(rows, unit="question"):
        documents = [passage.document(str(number)) for number, passage in enumerate(row.passages)]
        answers = {codec: gen.answer(row.question, documents) for codec, gen in generators.items()}
        for codec, answer in answers.items():
            right[codec].append(float(exact_match(answer.text, row.answers)))
        same.append(float(answers["raw"].token_ids == answers["v8"].token_ids))
    for codec, gen in generators.items():
        assert gen.store is not None
        assert gen.store.disk is not None
        files = [file.stat().st_size for file in gen.store.disk.path.glob("v*/*/*/*.safetensors")]
        sizes[codec] = round(sum(files) / len(files))
    bootstrap = Bootstrap(args.seed)

    def interval(values: np.ndarray) -> dict[str, float]:
        found = bootstrap.interval(values)
        return {"mean": round(found.mean, 2), "low": round(found.low, 2), "high": round(found.high, 2)}

    arrays = {codec: 100 * np.array(values) for codec, values in right.items()}
    return {
        "token_match": interval(100 * np.array(same)),
        "exact_match": {codec: interval(values) for codec, values in arrays.items()},
        "exact_match_difference": interval(arrays["v8"] - arrays["raw"]),
        "bytes_per_document": sizes,
    }


if __name__ == "__main__":
    main()
