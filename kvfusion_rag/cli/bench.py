"""Measure speed on this machine, with random weights of published shapes.

``kvfusion bench answer`` measures whole answers: transformers' ``generate`` on the joined prompt, and ours with
documents computed, from memory and from disk; each figure stands beside the least that the machine could do.
``kvfusion bench store`` measures the time to the first token with documents computed, from disk and from memory
against the joined prompt, how fast files come into the fused buffer against plain reads, and what writing costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from .console import say, say_json
from .options import count, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(title="subjects", dest="subject", metavar="SUBJECT", required=True)
    answer = _subject(subjects, "answer", "generate on the joined prompt against cold, memory and disk", repeats=3)
    answer.add_argument("--answer-tokens", type=int, default=32, metavar="N", help="default: 32")
    answer.add_argument("--batch", type=int, default=1, metavar="N", help="questions asked together (default: 1)")
    answer.add_argument("--over", default="shared", help="documents of a batch: shared (default) or different")
    answer.add_argument(
        "--hit-rate", type=float, default=1.0, metavar="SHARE", help="of documents that memory and disk have: 0 to 1"
    )
    answer.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="measure several values of documents, document-tokens, question-tokens, answer-tokens, batch, over or "
        "hit-rate; 'batch=4,16 over=shared,different' measures all four; may be given several times",
    )
    answer.add_argument("--systems", default="generate,cold,memory,disk", metavar="A,B", help="default: all four")
    answer.add_argument("--warmups", type=count, default=1, metavar="N", help="of each measurement (default: 1)")
    answer.add_argument(
        "--generate-up-to",
        type=positive,
        metavar="TOKENS",
        help="leave generate out where the joined prompt is longer",
    )
    answer.add_argument("--weights", choices=["int8", "float8"], help="keep the layers' weights in 8 bit (torchao)")
    answer.add_argument("--threads", type=positive, metavar="N", help="of torch (default: its own choice)")
    answer.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    store = _subject(subjects, "store", "documents from disk and memory, and what writing costs", repeats=5)
    store.add_argument("--codec", choices=["raw", "v8"], default="raw")


def _subject(subjects: Any, name: str, about: str, *, repeats: int) -> argparse.ArgumentParser:
    """A subject with the arguments that all have."""
    parser = subjects.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument(
        "--shape",
        default="qwen2.5-0.5b",
        help="qwen2.5-0.5b (default), qwen2.5-1.5b, qwen2.5-7b, llama-3.1-8b or tiny",
    )
    parser.add_argument("--documents", type=positive, default=20, metavar="N", help="of a question (default: 20)")
    parser.add_argument("--document-tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--question-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: bfloat16, or float32 on a CPU that has no instructions for it",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--repeats", type=positive, default=repeats, metavar="N", help=f"of each measurement (default: {repeats})"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the store is put (default: a temporary one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON")
    about = "print one JSON object and nothing else"
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=about)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..benchmark.shapes import shape_named
    from ..model.hardware import choose_device, fast_dtype

    shape_named(args.shape)  # before anything is measured
    args.dtype = args.dtype or str(fast_dtype(choose_device(args.device))).removeprefix("torch.")
    return {"answer": _answer, "store": _store}[args.subject](args)


def _answer(args: argparse.Namespace) -> int:
    import torch

    from ..benchmark.speed import AnswerBenchmark, AnswerRun
    from ..benchmark.speed_table import markdown
    from ..benchmark.workload import SYSTEMS, Case, sweep
    from ..evaluation.report import run_facts

    base = Case(
        args.documents, args.document_tokens, args.question_tokens, args.answer_tokens, args.batch, args.over,
        args.hit_rate,
    )  # fmt: skip
    cases = sweep(base, args.sweep)
    systems = tuple(args.systems.split(","))
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise InvalidInputError(f"--systems has {unknown[0]!r}, but it must be of {', '.join(SYSTEMS)}.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("shape", "dtype", "device", "repeats", "warmups", "generate_up_to", "weights")
    options = AnswerBenchmark(systems=systems, **{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        measured = AnswerRun(options, Path(place))
        found = {**measured.facts(), "rows": [], "run": run_facts()}
        for case in cases:
            found["rows"] += measured.measure(case)
            _write(args.output, json.dumps(found, indent=2) + "\n")  # at once: a sweep may take hours
            _write(args.markdown, markdown(found))
    if args.json:
        say_json(found)
    else:
        say(markdown(found), end="")
    return 0


def _store(args: argparse.Namespace) -> int:
    from ..benchmark.store_speed import StoreBenchmark, measure_store
    from ..evaluation.report import run_facts

    names = ("shape", "documents", "document_tokens", "question_tokens", "dtype", "device", "codec", "repeats")
    found = measure_store(StoreBenchmark(**{name: getattr(args, name) for name in names}), args.folder)
    found["run"] = run_facts()
    _write(args.output, json.dumps(found, indent=2) + "\n")
    if args.json:
        say_json(found)
    else:
        _say_store(found)
    return 0


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        file.write_text(text, encoding="utf-8")


def _say_store(found: dict[str, Any]) -> None:
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
