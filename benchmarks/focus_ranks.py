"""Measure how often focus keeps all gold documents, by documents kept and by the weight of the retriever's score.

    python benchmarks/focus_ranks.py ROWS [--model NAME] [--limit 100] [--dtype bfloat16] [--json FILE]

ROWS come from ``kvfusion build-data``. The offline embedding model gives the retriever's scores. "Together" is the
choice of focus, and "alone" ranks each document by its own score.
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
from kvfusion_rag.engine.document_kvs import Scope
from kvfusion_rag.engine.engine import Engine
from kvfusion_rag.engine.focus import Ids, best_documents, document_scores, scored_question
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.evaluation.scores import with_scores
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.retrieval import SentenceTransformerEmbedder
from kvfusion_rag.schema import Document
from kvfusion_rag.store import KVRequest
from kvfusion_rag.text.documents import EncodedDocuments

KEPT = (1, 2, 3, 5)
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--model", help="hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--limit", type=int, default=100, help="size of the random sample of rows (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--dtype", help="precision of the model")
    parser.add_argument("--memory", type=int, default=4, metavar="GIB", help="memory for document KVs (default: 4)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    rows = [row for row in read_ready_rows(args.rows) if row.gold]
    rows = random.Random(args.seed).sample(rows, min(args.limit, len(rows)))
    store = DocumentStore(MemoryStore(args.memory << 30))
    generator = KVFusionGenerator.from_pretrained(args.model, dtype=args.dtype, store=store)
    found = {(weight, rule): dict.fromkeys(KEPT, 0) for weight in WEIGHTS for rule in ("together", "alone")}
    for row in tqdm(list(with_scores(rows, SentenceTransformerEmbedder()))):
        documents = [passage.document(str(number)) for number, passage in enumerate(row.passages)]
        encoded, tokens = question_tokens(generator._engine, row.question, documents)
        gold = {number for number, passage in enumerate(row.passages) if passage.gold}
        for weight in WEIGHTS:
            alone = ranked_alone(encoded, tokens, weight)
            for kept in KEPT:
                found[weight, "together"][kept] += gold <= set(best_documents(encoded, tokens, weight, kept))
                found[weight, "alone"][kept] += gold <= set(alone[:kept])
    shares = {
        f"weight {weight}, {rule}": {kept: round(100 * count / len(rows), 1) for kept, count in by_kept.items()}
        for (weight, rule), by_kept in found.items()
    }
    print(f"{len(rows)} questions; all gold documents among those kept, of {', '.join(map(str, KEPT))} (%)")
    for name, share in shares.items():
        print(f"{name:20} " + " / ".join(f"{value:.0f}" for value in share.values()))
    if args.json:
        args.json.write_text(json.dumps({"rows": len(rows), "kept": shares, "run": run_facts()}, indent=2) + "\n")


def ranked_alone(encoded: EncodedDocuments, tokens: dict[Ids, list[float]], weight: float) -> list[int]:
    """Return the documents' indices by their own scores, the best first."""
    sums = {ids: math.fsum(values) for ids, values in tokens.items()}
    scores = document_scores(encoded.documents, sums, weight)
    return sorted(range(len(scores)), key=lambda number: -(scores[number] or 0.0))


def question_tokens(
    engine: Engine[TorchModel], question: str, documents: list[Document]
) -> tuple[EncodedDocuments, dict[Ids, list[float]]]:
    """Return the documents as focus reads them, and the log-probability of the question's tokens given each."""
    layout, kvs = engine.prompts.fused_layout(None), engine.document_kvs
    kvs.refresh()
    scope = Scope(layout.prefix, "")
    encoded = engine.read(documents, layout).with_keys(lambda ids: kvs.key(ids, scope))
    requests = {key: KVRequest(ids) for key, ids in encoded.keys.items()}
    fetched = kvs.fetch(requests, None, kvs.version, scope, is_cancelled=lambda: False)
    ids, given = scored_question(engine.encoder.plain, question)
    read = [fetched.kvs[key] for key in encoded.keys]
    tokens = engine.model.token_likelihoods(kvs.prefix_kv(scope), read, ids, given=given)
    return encoded, dict(zip(encoded.keys.values(), tokens, strict=True))


if __name__ == "__main__":
    main()
