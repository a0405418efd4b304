"""Compare the time to the first token over stored documents: with focus, all fused, and in a joined prompt.

    python benchmarks/focus_time.py [MODEL] [--documents 20] [--tokens 160] [--focus 1] [--repeats 5] [--json FILE]

All read the same random words with the same weights, in turn, in one process. The figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from random_documents import QUESTION, random_document

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.evaluation.report import run_facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=160, help="approximate tokens per document (default: 160)")
    parser.add_argument("--focus", type=int, default=1, help="documents kept (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each after a warm-up (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    generator = KVFusionGenerator.from_pretrained(args.model)
    documents = [random_document(generator, number, args.tokens) for number in range(args.documents)]
    modes: dict[str, dict[str, Any]] = {
        "focus": {"mode": "fusion", "focus": args.focus},
        "fusion": {"mode": "fusion", "focus": None},
        "concat": {"mode": "concat", "focus": None},
    }
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for number in range(-1, args.repeats):
        for name, mode in modes.items():
            answer = generator.answer(QUESTION, documents, max_new_tokens=1, **mode)
            if number >= 0:
                seconds[name].append(answer.timings.first_token)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(
            f"{name:7} {medians[name]:7.3f} s to the first token ({min(times):.3f} to {max(times):.3f}), "
            f"{medians[name] / medians['concat']:.3f} of concat"
        )
    if args.json:
        facts = {"documents": args.documents, "tokens": args.tokens, "focus": args.focus, "first_token": seconds}
        args.json.write_text(json.dumps({**facts, "run": run_facts()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
