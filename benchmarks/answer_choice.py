"""Measure an alternative to focus: answer from each of the best documents alone, and keep the most likely answer.

    python benchmarks/answer_choice.py ROWS --journal FILE [--model NAME] [--limit 100] [--documents 4] [--json FILE]

The answer that is kept has the highest sum of its document's score of focus and LAMBDA times its own log-probability.
ROWS come from ``kvfusion build-data`` or lost-in-the-middle, of which the first are taken. The offline embedding model
gives the retriever's scores. The journal keeps what was measured, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.data import QARow, read_rows
from kvfusion_rag.data.answer_match import answer_in_text
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.evaluation.scores import with_scores
from kvfusion_rag.retrieval import SentenceTransformerEmbedder

LAMBDAS = (0.5, 1.0, 2.0, 4.0)
ANSWER_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--journal", type=Path, required=True, help="file of measurements, which is continued")
    parser.add_argument("--model", help="hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--limit", type=int, default=100, help="number of rows (default: 100)")
    parser.add_argument("--documents", type=int, default=4, help="documents that are answered from (default: 4)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    rows = list(islice(read_rows(args.rows), args.limit))
    done = len(args.journal.read_text().splitlines()) if args.journal.exists() else 0
    if done < len(rows):
        generator = KVFusionGenerator.from_pretrained(args.model)
        with args.journal.open("a", encoding="utf-8") as journal:
            for row in tqdm(list(with_scores(rows[done:], SentenceTransformerEmbedder()))):
                journal.write(json.dumps(measure(generator, row, args.documents)) + "\n")
                journal.flush()
    measured = [json.loads(line) for line in args.journal.read_text(encoding="utf-8").splitlines()][: len(rows)]
    figures = {"rows": len(measured), "figures": report(measured), "run": run_facts()}
    print(json.dumps(figures["figures"], indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(generator: KVFusionGenerator, row: QARow, most: int) -> dict[str, Any]:
    """Return the answers by focus, and those from each of the ``most`` best documents alone."""
    documents = [passage.document(str(number)) for number, passage in enumerate(row.passages)]
    by_focus = [generator.answer(row.question, documents, focus=m, max_new_tokens=ANSWER_TOKENS) for m in (1, 2)]
    scores = [source.focus_score or 0.0 for source in by_focus[0].sources]
    alone = []
    for number in sorted(range(len(documents)), key=lambda n: -scores[n])[:most]:
        answer = generator.answer(row.question, [documents[number]], max_new_tokens=ANSWER_TOKENS)
        found = generator.attribute(row.question, [documents[number]], answer=answer)
        alone.append({
            "text": answer.text, "log_probability": found.log_probability, "score": scores[number],
            "gold": bool(row.passages[number].gold),
        })  # fmt: skip
    return {"answers": row.answers, "focus": [answer.text for answer in by_focus], "alone": alone}


def report(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Return how often (%) the right answer is in the text, and how often the gold document is found."""
    golds = [next((one for one in row["alone"] if one["gold"]), None) for row in measured]
    shares = {
        "focus 1": _share([answer_in_text(row["focus"][0], row["answers"]) for row in measured]),
        "focus 2": _share([answer_in_text(row["focus"][1], row["answers"]) for row in measured]),
        "gold document first": _share([row["alone"][0]["gold"] for row in measured]),
        "gold document among the answered": _share([gold is not None for gold in golds]),
        "from the gold document alone, if answered": _share(
            [answer_in_text(gold["text"], row["answers"]) for gold, row in zip(golds, measured, strict=True) if gold]
        ),
        "any of the answers": _share(
            [any(answer_in_text(one["text"], row["answers"]) for one in row["alone"]) for row in measured]
        ),
    }
    for documents in range(2, max(len(row["alone"]) for row in measured) + 1):
        for weight in LAMBDAS:
            kept = [max(row["alone"][:documents], key=lambda one: _sum(one, weight))["text"] for row in measured]
            shares[f"{documents} documents, lambda {weight:g}"] = _share(
                [answer_in_text(text, row["answers"]) for text, row in zip(kept, measured, strict=True)]
            )
    return shares


def _sum(one: dict[str, Any], weight: float) -> float:
    return one["score"] + weight * one["log_probability"]


def _share(found: list[bool]) -> float:
    return round(100 * sum(found) / len(found), 1)


if __name__ == "__main__":
    main()
