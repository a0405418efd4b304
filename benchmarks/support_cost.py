"""Compare the time of answers that measure support with that of answers that do not, in one process.

    OMP_NUM_THREADS=1 python benchmarks/support_cost.py [MODEL] [--documents 1 5 20] [--tokens 160] [--repeats 5]

Both read the same random words from the store, in turn. Answers have 16 tokens at most. The figures are medians of
processor time, which other programs change little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from random_documents import QUESTION, random_document

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.evaluation.report import run_facts

ANSWER_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model with a calibration (default: the default model)")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 5, 20], help="numbers (default: 1 5 20)")
    parser.add_argument("--tokens", type=int, default=160, help="approximate tokens per document (default: 160)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each after a warm-up (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    generator = KVFusionGenerator.from_pretrained(args.model)
    found = []
    for count in args.documents:
        documents = [random_document(generator, number, args.tokens) for number in range(count)]
        for focus in ("auto", None):
            plain, judged = compared(generator, documents, focus, args.repeats)
            found.append({"documents": count, "focus": focus, "plain": plain, "with_support": judged})
            shown = "no focus" if focus is None else "focus"
            print(
                f"{count:3} documents, {shown:8}: {plain:.3f} s, with support {judged:.3f} s "
                f"(+{judged - plain:.3f} s, {judged / plain:.2f} times)"
            )
    if args.json:
        facts = {"model": generator.model_id, "tokens": args.tokens, "repeats": args.repeats}
        args.json.write_text(json.dumps({"options": facts, "seconds": found, "run": run_facts()}, indent=2) + "\n")


def compared(generator: KVFusionGenerator, documents: list[str], focus: str | None, repeats: int) -> list[float]:
    """Return the processor seconds of an answer without and with support."""
    seconds: list[list[float]] = [[], []]
    for number in range(-1, repeats):
        for times, min_support in zip(seconds, (None, "auto"), strict=True):
            began = time.process_time()
            generator.answer(
                QUESTION, documents, max_new_tokens=ANSWER_TOKENS, mode="fusion", focus=focus, min_support=min_support
            )
            if number >= 0:
                times.append(time.process_time() - began)
    return [statistics.median(times) for times in seconds]


if __name__ == "__main__":
    main()
