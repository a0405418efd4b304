"""Compare the time per token of answers in a JSON schema with that of answers without a format, in one process.

    python benchmarks/structured_cost.py [MODEL] [--tokens 64] [--batches 1 16] [--repeats 7] [--json results.json]

Both decode the same questions over the same documents, in turn, and never end by themselves. The first token is not
counted, since it reads the question. Steps are measured in processor time, which other programs change little, so set
OMP_NUM_THREADS=1. The times to read the tokenizer and to compile a schema are printed once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfusion_rag import AnswerFormat, KVFusionGenerator
from kvfusion_rag.engine.calls import read_calls
from kvfusion_rag.evaluation.report import run_facts

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["place", "person", "event"]},
        "facts": {
            "type": "array",
            "minItems": 500,
            "items": {
                "type": "object",
                "properties": {"text": {"type": "string", "maxLength": 60}, "year": {"type": "integer"}},
                "required": ["text", "year"],
            },
        },
    },
    "required": ["title", "kind", "facts"],
}
DOCUMENTS = [
    "The lighthouse was built by Amara Osei in 1874. It is 31 metres high.",
    "Two grey doves sleep on the roof.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub name (default: the default model)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer (default: 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="rows of a batch (default: 1 16)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each after a warm-up (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    generator = KVFusionGenerator.from_pretrained(args.model)
    generator._engine.model.backbone.end_ids = frozenset()  # so that all answers have the same length
    compiled = [compile_time(generator, number) for number in range(2)]
    print(f"tokenizer and first schema {compiled[0]:.3f} s, second schema {compiled[1]:.4f} s")
    found = {rows: compared(generator, rows, args.tokens, args.repeats) for rows in args.batches}
    for rows, figures in found.items():
        plain, limited = figures["plain_ms"], figures["format_ms"]
        spread = f"{figures['least']:.3f} to {figures['most']:.3f}"
        print(f"{rows:3} rows: {plain:.2f} ms per step without a format, {limited:.2f} ms with one")
        print(f"          ratio of medians {figures['ratio']:.3f}, of single runs {spread}")
    if args.json:
        facts = {"tokens": args.tokens, "repeats": args.repeats, "model": generator.model_id}
        args.json.write_text(
            json.dumps({"options": facts, "compile_seconds": compiled, "rows": found, "run": run_facts()}, indent=2)
            + "\n"
        )


def compile_time(generator: KVFusionGenerator, number: int) -> float:
    """Return the seconds to compile a schema that was not compiled before."""
    began = time.perf_counter()
    generator._engine.model.constraint(AnswerFormat.json_schema({**SCHEMA, "title": f"schema {number}"}))
    return time.perf_counter() - began


def compared(generator: KVFusionGenerator, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    """Return the milliseconds per step with and without a format, and their ratio."""
    format = AnswerFormat.json_schema(SCHEMA)
    plain, limited = [], []
    for number in range(-1, repeats):
        times = [step_time(generator, rows, tokens, each) for each in (None, format)]
        if number >= 0:
            plain.append(times[0])
            limited.append(times[1])
    ratios = [mine / other for mine, other in zip(limited, plain, strict=True)]
    medians = statistics.median(plain), statistics.median(limited)
    return {
        "plain_ms": round(1e3 * medians[0], 3), "format_ms": round(1e3 * medians[1], 3),
        "ratio": round(medians[1] / medians[0], 4), "least": round(min(ratios), 4), "most": round(max(ratios), 4),
    }  # fmt: skip


def step_time(generator: KVFusionGenerator, rows: int, tokens: int, format: AnswerFormat | None) -> float:
    """Return the processor seconds per step after the first, in which each row grows by a token."""
    questions = [f"What is known about the lighthouse, in part {number}?" for number in range(rows)]
    documents: Sequence[Any] = [DOCUMENTS] * rows
    options = {"max_new_tokens": tokens, "response_format": format, "focus": None}
    engine = generator._engine
    call = read_calls(engine, questions, documents, None, options)
    [batch] = engine.runner.batches([engine.runner.prepare(request, call.decoding) for request in call.requests])
    times = [time.process_time() for _ in engine.runner.decode(engine.runner.start(batch), call.decoding)]
    assert len(times) == tokens
    return (times[-1] - times[0]) / (tokens - 1)


if __name__ == "__main__":
    main()
