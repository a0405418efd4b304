"""Measure how often focus keeps all gold documents, by documents kept and by the weight of the retriever's score.

    python benchmarks/focus_ranks.py ROWS [--model NAME] [--limit 100] [--dtype bfloat16] [--json FILE]

ROWS come from ``kvfusion build-data``. The offline embedding model gives the retriever's scores. Weight "inf" ranks
only by them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

from tqdm import tqdm

from kvfusion_rag import DocumentStore, KVFusionGenerator, MemoryStore
from kvfusion_rag.data import read_ready_rows
from kvfusion_rag.engine.focus import standardized
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.evaluation.scores import with_scores
from kvfusion_rag.retrieval import SentenceTransformerEmbedder

KEPT = (1, 2, 3, 5)
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--model", help="hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--limit", type=int, default=100, help="size of the random sample of rows (default: 100)")
    parser.add_argument("--dtype", help="precision of the model")
    parser.add_argument("--memory", type=int, default=4, metavar="GIB", help="memory for document KVs (default: 4)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    rows = [row for row in read_ready_rows(args.rows) if row.gold]
    rows = random.Random(0).sample(rows, min(args.limit, len(rows)))
    store = DocumentStore(MemoryStore(args.memory << 30))
    generator = KVFusionGenerator.from_pretrained(args.model, dtype=args.dtype, store=store)
    generator = generator.with_settings(focus_weight=0.0)
    found = {weight: dict.fromkeys(KEPT, 0) for weight in WEIGHTS}
    for row in tqdm(list(with_scores(rows, SentenceTransformerEmbedder()))):
        documents = [passage.document(str(number)) for number, passage in enumerate(row.passages)]
        answer = generator.answer(row.question, documents, mode="fusion", focus=1, max_new_tokens=1)
        likelihoods = [source.focus_score or 0.0 for source in answer.sources]
        scores = standardized([passage.score or 0.0 for passage in row.passages])
        gold = {number for number, passage in enumerate(row.passages) if passage.gold}
        for weight in WEIGHTS:
            ranked = sorted(range(len(documents)), key=lambda n: -_total(likelihoods[n], scores[n], weight))
            for kept in KEPT:
                found[weight][kept] += gold <= set(ranked[:kept])
    shares = {str(w): {k: round(100 * n / len(rows), 1) for k, n in by.items()} for w, by in found.items()}
    print(f"{len(rows)} questions; all gold documents among the first {', '.join(map(str, KEPT))} (%)")
    for name, share in shares.items():
        print(f"weight {name:>4}: " + " / ".join(f"{value:.0f}" for value in share.values()))
    if args.json:
        args.json.write_text(json.dumps({"rows": len(rows), "kept": shares, "run": run_facts()}, indent=2) + "\n")


def _total(likelihood: float, score: float, weight: float) -> float:
    return score if weight == math.inf else likelihood + weight * score


if __name__ == "__main__":
    main()
