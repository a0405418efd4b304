"""Measure speed on this machine, with random weights of published shapes.

``kvfusion bench answer`` measures whole answers: transformers' ``generate`` on the joined prompt, and this package
with documents computed, from memory and from disk, each compared with the machine's limit. ``kvfusion bench store``
measures the time to the first token with documents computed, from disk and from memory compared with the joined
prompt, how fast files are loaded into the fused cache compared with plain reads, and what writing costs.
``kvfusion bench engines`` compares torch, llama.cpp, stock llama.cpp and vLLM on the same documents.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from .arguments.paths import existing_folder, output_file
from .arguments.values import count, device, names, plain_text, positive, share, whole
from .console import say, say_json
from .options import add_model_name

# Both are repeated here, because importing them would import torch.
ENGINES = (
    "torch-float32", "torch-bfloat16", "torch-int8", "llama.cpp-f16", "llama.cpp-q8_0", "llama.cpp-stock", "vllm"
)  # fmt: skip
SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3.1-8b", "tiny")

sizes = whole(1, 1 << 20)
at_least_two = whole(2, 1 << 20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(title="subjects", dest="subject", metavar="SUBJECT", required=True)
    title = "compare generate on the joined prompt with documents computed, in memory and on disk"
    add = _subject(subjects, "answer", title, repeats=3).add_argument
    add("--answer-tokens", type=sizes, default=32, metavar="N", help="tokens per answer, from 2 (default: 32)")
    add("--batch", type=sizes, default=1, metavar="N", help="questions asked together (default: 1)")
    overs = "documents of a batch: the same for all questions, or different ones for each (default: shared)"
    add("--over", choices=["shared", "different"], default="shared", help=overs)
    add("--hit-rate", type=share, default=1.0, metavar="SHARE", help="share of stored documents, 0 to 1 (default: 1)")
    add(
        "--sweep", action="append", type=plain_text, default=[], metavar="NAME=VALUE,...",
        help="measure several values of documents, document-tokens, question-tokens, answer-tokens, batch, over or "
        "hit-rate; 'batch=4,16 over=shared,different' measures all four; can be repeated (default: one case)",
    )  # fmt: skip
    systems = "systems to measure, some of generate, cold, memory and disk (default: all four)"
    add("--systems", type=names, default="generate,cold,memory,disk", metavar="A,B", help=systems)
    add("--warmups", type=count, default=1, metavar="N", help="warm-up runs before each measurement (default: 1)")
    add("--generate-up-to", type=positive, metavar="N", help="maximum tokens of a joined prompt (default: no limit)")
    weights = "store the layers' weights in 8 bits with torchao (default: weights of --dtype)"
    add("--weights", choices=["int8", "float8"], help=weights)
    markdown = "write the table to this file, and replace it if it exists (default: not written)"
    add("--markdown", type=output_file, metavar="FILE", help=markdown)
    store = _subject(subjects, "store", "measure reading documents from disk and memory, and writing them", repeats=5)
    store.add_argument(
        "--codec",
        choices=["raw", "v8"],
        default="raw",
        help="format of the store's files: raw, or v8, which keeps values in 8 bits (default: raw)",
    )
    _add_engines(subjects)


def _add_engines(subjects: Any) -> None:
    about = "compare torch, llama.cpp and vLLM on the same model and documents"
    parser = subjects.add_parser("engines", help=about, description=f"{about[0].upper()}{about[1:]}.")
    add_model_name(parser)
    add = parser.add_argument
    compared = f"engines to compare, separated by commas, of {','.join(ENGINES)} (default: all that are installed)"
    add("--engines", type=names, metavar="A,B", help=compared)
    add("--documents", type=sizes, default=20, metavar="N", help="documents per question (default: 20)")
    add("--document-tokens", type=sizes, default=150, metavar="N", help="tokens per document (default: 150)")
    add("--answer-tokens", type=at_least_two, default=32, metavar="N", help="tokens per answer, from 2 (default: 32)")
    add("--repeats", type=positive, default=5, metavar="N", help="questions per measurement (default: 5)")
    output = "write all figures as JSON to this file, and replace it if it exists (default: not written)"
    add("--output", type=output_file, metavar="FILE", help=output)


def _subject(subjects: Any, name: str, about: str, *, repeats: int) -> argparse.ArgumentParser:
    """Add a subject with the arguments that all subjects have."""
    parser = subjects.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    add = parser.add_argument
    shapes = "sizes of the model, as in the published one of this name (default: qwen2.5-0.5b)"
    add("--shape", choices=SHAPES, default="qwen2.5-0.5b", help=shapes)
    add("--documents", type=sizes, default=20, metavar="N", help="documents per question (default: 20)")
    add("--document-tokens", type=sizes, default=256, metavar="N", help="tokens per document (default: 256)")
    add("--question-tokens", type=sizes, default=64, metavar="N", help="tokens per question (default: 64)")
    dtypes = "precision of the weights (default: bfloat16, or float32 on a CPU without instructions for it)"
    add("--dtype", choices=["float32", "bfloat16"], help=dtypes)
    add("--device", type=device, metavar="NAME", help="device of the model: cpu, cuda, cuda:1 or mps (default: cpu)")
    add("--repeats", type=positive, default=repeats, metavar="N", help=f"repeats per measurement (default: {repeats})")
    folder = "existing folder in which the store is created and removed again (default: one for temporary files)"
    add("--folder", type=existing_folder, metavar="DIR", help=folder)
    output = "write all figures as JSON to this file, and replace it if it exists (default: not written)"
    add("--output", type=output_file, metavar="FILE", help=output)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.subject == "engines":
        return _engines(args)
    from ..model.hardware import choose_device, fast_dtype

    args.device = args.device or "cpu"
    args.dtype = args.dtype or str(fast_dtype(choose_device(args.device))).removeprefix("torch.")
    return {"answer": _answer, "store": _store}[args.subject](args)


def _answer(args: argparse.Namespace) -> int:
    from ..benchmark.speed import AnswerBenchmark, AnswerRun
    from ..benchmark.speed_table import markdown
    from ..benchmark.workload import SYSTEMS, Case, sweep
    from ..evaluation.report import run_facts

    base = Case(
        args.documents, args.document_tokens, args.question_tokens, args.answer_tokens, args.batch, args.over,
        args.hit_rate,
    )  # fmt: skip
    cases = sweep(base, args.sweep)
    systems = tuple(args.systems)
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise InvalidInputError(f"--systems has {unknown[0]!r}, but it must be some of {', '.join(SYSTEMS)}.")
    names = ("shape", "dtype", "device", "repeats", "warmups", "generate_up_to", "weights")
    options = AnswerBenchmark(systems=systems, **{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        benchmark = AnswerRun(options, Path(place))
        figures = {**benchmark.facts(), "rows": [], "run": run_facts()}
        for case in cases:
            figures["rows"] += benchmark.measure(case)
            _write(args.output, json.dumps(figures, indent=2) + "\n")  # after each case, since a sweep can take hours
            _write(args.markdown, markdown(figures))
    if args.json:
        say_json(figures)
    else:
        say(markdown(figures), end="")
    return 0


def _store(args: argparse.Namespace) -> int:
    from ..benchmark.store_speed import StoreBenchmark, measure_store
    from ..evaluation.report import run_facts

    names = ("shape", "documents", "document_tokens", "question_tokens", "dtype", "device", "codec", "repeats")
    figures = measure_store(StoreBenchmark(**{name: getattr(args, name) for name in names}), args.folder)
    figures["run"] = run_facts()
    _write(args.output, json.dumps(figures, indent=2) + "\n")
    if args.json:
        say_json(figures)
    else:
        _say_store(figures)
    return 0


def _engines(args: argparse.Namespace) -> int:
    from ..benchmark.engines import PACKAGES, EngineCase, installed_engines, measure_engines
    from ..evaluation.report import run_facts
    from ..model.location import locate_model

    has_gguf = locate_model(args.model, gguf_file=args.gguf_file, weights=False).gguf is not None
    of_gguf = {name for name, package in PACKAGES.items() if package == "llama_cpp"}
    engines = args.engines or [name for name in installed_engines() if has_gguf or name not in of_gguf]
    if not has_gguf and (named := [name for name in engines if name in of_gguf]):
        raise InvalidInputError(
            f"{args.model!r} has no GGUF file, which {named[0]} reads; name a GGUF file, or other --engines."
        )
    counts = ("documents", "document_tokens", "answer_tokens", "repeats", "threads")
    case = EngineCase(args.model, args.gguf_file, **{name: getattr(args, name) for name in counts})
    figures = {"rows": measure_engines(case, engines), "run": run_facts()}
    _write(args.output, json.dumps(figures, indent=2) + "\n")
    if args.json:
        say_json(figures)
        return 0
    say("seconds to the first token         cold    warm  shuffled  tokens/s  same answers  peak MiB")
    for row in figures["rows"]:
        say(f"{_engine_line(row['engine'], row)}  {row['peak MiB']:>8}")
        if joined := row.get("joined prompt"):
            say(_engine_line("  joined prompt", joined))
    return 0


def _engine_line(name: str, times: dict[str, Any]) -> str:
    same = f"{times['same answers after a shuffle']} of {times['questions']}"
    return (
        f"  {name:<30} {times['cold']:>6.2f}  {times['warm']:>6.2f}  {times['shuffled']:>8.2f}  "
        f"{times['tokens per second']:>8.1f}  {same:>12}"
    )


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        file.write_text(text, encoding="utf-8")


def _say_store(figures: dict[str, Any]) -> None:
    options, read = figures["options"], figures["read_gb_per_second"]
    say(
        f"{options['shape']} in {options['dtype']}, random weights; {options['documents']} documents of "
        f"{options['document_tokens']} tokens, question of {options['question_tokens']}; {figures['threads']} threads"
    )
    for name, times in figures["seconds_to_first_token"].items():
        faster = figures["times_faster_than_joined_prompt"][name]
        say(f"  {name:<14} {times['median']:>9.4f} s to the first token {faster:>8.2f} x")
    say(
        f"  into the fused cache {read['into the fused buffer']:.2f} GB/s, raw file read {read['raw file read']:.2f} "
        f"GB/s: {read['ratio']:.2f}"
    )
    writes = figures["write_seconds_per_document"]["median"]
    say(f"  {figures['bytes_per_1000_tokens']:,} bytes per 1,000 tokens; writing a document takes {writes:.4f} s")
