"""Measure speed on this machine, with random weights of published shapes.

``kvfusion bench store`` measures the time to the first token with documents computed, from disk and from memory
against the joined prompt, how fast files come into the fused buffer against plain reads, and what writing costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .console import say, say_json
from .options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", choices=["store"], help="what to measure")
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="qwen2.5-0.5b (default), qwen2.5-1.5b or tiny")
    parser.add_argument("--documents", type=positive, default=20, metavar="N", help="of a question (default: 20)")
    parser.add_argument("--document-tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--question-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: bfloat16, or float32 on a CPU that has no instructions for it",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--codec", choices=["raw", "v8"], default="raw")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="of each measurement (default: 5)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the store is put (default: a temporary one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON")


def run(args: argparse.Namespace) -> int:
    from ..backbone import choose_device
    from ..evaluation.report import run_facts
    from ..evaluation.shapes import shape_named
    from ..evaluation.store_speed import StoreBenchmark, measure_store
    from ..probe import fast_dtype

    shape_named(args.shape)
    args.dtype = args.dtype or str(fast_dtype(choose_device(args.device))).removeprefix("torch.")
    names = ("shape", "documents", "document_tokens", "question_tokens", "dtype", "device", "codec", "repeats")
    found = measure_store(StoreBenchmark(**{name: getattr(args, name) for name in names}), args.folder)
    found["run"] = run_facts()
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.json:
        say_json(found)
    else:
        _say(found)
    return 0


def _say(found: dict[str, Any]) -> None:
    options, read = found["options"], found["read_gb_per_second"]
    say(
        f"{options['shape']} in {options['dtype']}, random weights; {options['documents']} documents of "
        f"{options['document_tokens']} tokens, question of {options['question_tokens']}; {found['threads']} threads"
    )
    for name, times in found["seconds_to_first_token"].items():
        faster = found["times_faster_than_joined_prompt"][name]
        say(f"  {name:<14} {times['median']:>9.4f} s to the first token {faster:>8.2f} x")
    say(
        f"  into the fused buffer {read['into the fused buffer']:.2f} GB/s, raw file read {read['raw file read']:.2f} "
        f"GB/s: {read['ratio']:.2f}"
    )
    writes = found["write_seconds_per_document"]["median"]
    say(f"  {found['bytes_per_1000_tokens']:,} bytes a thousand tokens; writing a document takes {writes:.4f} s")
