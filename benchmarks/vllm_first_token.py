"""Measure the first token of engine vLLM: fused documents against the joined prompt with vLLM's own prefix cache.

    python benchmarks/vllm_first_token.py [--model NAME] [--documents 20] [--tokens 150] [--repeats 3] [--json FILE]

Needs the environment of vLLM (docs/engines.md). Each repetition has documents and questions of its own. ``cold`` is
the first question about documents, ``warm`` another question about them, and ``shuffled`` a third one over them in
another order. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from kvfusion_rag import Document, KVFusionGenerator
from kvfusion_rag.evaluation.report import run_facts

ANSWER_TOKENS = 32
WAYS = {"fused": {"mode": "fusion", "focus": None}, "joined": {"mode": "concat", "focus": None}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=150, help="of each document")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        generator = KVFusionGenerator.from_pretrained(args.model, engine="vllm", store=store, adapter=None)
        figures: dict[str, Any] = {"run": run_facts(), "documents": args.documents, "tokens": args.tokens}
        for way in WAYS:
            rounds = [measure(generator, way, args, number) for number in range(args.repeats)]
            names = ("cold", "warm", "shuffled", "tokens_per_second")
            figures[way] = {name: statistics.median(one[name] for one in rounds if name in one) for name in names}
    figures["ratio_after_a_shuffle"] = figures["joined"]["shuffled"] / figures["fused"]["shuffled"]
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(generator: KVFusionGenerator, way: str, args: argparse.Namespace, number: int) -> dict[str, float]:
    """Return seconds to the first token of three questions about the same new documents, and tokens per second."""
    rng = random.Random(f"{way} {number}")
    documents = [Document(text(rng, args.tokens), id=str(n)) for n in range(args.documents)]
    shuffled = rng.sample(documents, len(documents))
    asked = {"cold": ("Who built the mill?", documents), "warm": ("Who owns the ferry?", documents),
             "shuffled": ("When does the harbour close?", shuffled)}  # fmt: skip
    found: dict[str, float] = {}
    for name, (question, given) in asked.items():
        answer = generator.answer(question, given, max_new_tokens=ANSWER_TOKENS, **WAYS[way])
        found[name] = answer.timings.first_token
        if len(answer.token_ids) > 1:
            seconds = answer.timings.total - answer.timings.first_token
            found["tokens_per_second"] = (len(answer.token_ids) - 1) / seconds
    return found


def text(rng: random.Random, tokens: int) -> str:
    """Return a text of about ``tokens`` tokens that no other document begins like."""
    words = ("mill", "ferry", "harbour", "keeper", "river", "stone", "light", "boat", "sack", "family", "north", "old")
    return " ".join(rng.choices(words, k=tokens))


if __name__ == "__main__":
    main()
