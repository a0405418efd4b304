"""Make an adapter of a model from your own documents, without labels.

The model writes and answers questions about the documents, learns to give the same answers over fused documents, and
is judged on held-out questions. The adapter is kept if it beats untuned fusion. Run the same command again to resume a
run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .console import say, say_json, shown_path
from .options import add_gguf_file, positive, require_paths

if TYPE_CHECKING:
    from ..adapting import AdaptOptions, AdaptReport

TRAINING = ("epochs", "max_steps", "batch_size", "accumulation", "rank", "eval_every")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=names)
    add_gguf_file(parser)
    add = parser.add_argument
    add("--docs", nargs="+", required=True, metavar="PATH", help="files and folders (txt, md, html, pdf)")
    add("--output", required=True, metavar="DIR", help="for adapter/, report.json and the run's state")
    add("--questions", metavar="FILE", help="your own questions: one per line, or .jsonl {question, passage}")
    add("--passages", type=positive, metavar="N", help="maximum passages to ask about (default: 400)")
    add("--questions-per-passage", type=int, choices=[1, 2, 3], metavar="N", help="1 to 3 (default: 2)")
    add("--passage-tokens", type=positive, metavar="N", help="maximum tokens per passage (default: 160)")
    add("--documents", type=positive, metavar="N", help="maximum documents per question (default: 5)")
    add("--held-out", type=float, metavar="SHARE", help="share of passages for judging, 0 to 1 (default: 0.15)")
    add("--judged", type=positive, metavar="N", help="maximum questions to judge (default: 100)")
    add("--min-f1", type=float, metavar="F1", help="word F1 with which answers are repeated, 0 to 1 (default: 0.6)")
    add("--answer-tokens", type=positive, metavar="N", help="maximum tokens per answer (default: 64)")
    layouts = "layout of questions; fixed asks for few words (default: the model's own)"
    add("--layout", choices=["prompt", "fixed"], help=layouts)
    add("--seed", type=int, metavar="N", help="seed of everything random (default: 0)")
    for name in TRAINING:
        add(f"--{name.replace('_', '-')}", type=positive, metavar="N", help="see TrainingConfig")
    add("--learning-rate", type=float, metavar="N", help="see TrainingConfig")
    add("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    add("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="precision of the model (default: float32 on a CPU)")


def run(args: argparse.Namespace) -> int:
    require_paths([*args.docs, *([args.questions] if args.questions else [])])
    options = _options(args)
    from ..adapting import adapt

    report = adapt(
        args.model, docs=args.docs, output=args.output, options=options, gguf_file=args.gguf_file,
        questions=args.questions, device=args.device, dtype=args.dtype, progress=not args.json,
        note=(lambda text: None) if args.json else say,
    )  # fmt: skip
    if args.json:
        say_json({"output": args.output, **report.to_dict()})
    else:
        _say_end(report, Path(args.output), args.model)
    return 0


def _options(args: argparse.Namespace) -> AdaptOptions:
    from dataclasses import replace

    from ..adapting import AdaptOptions

    def given(*names: str) -> dict[str, object]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    training = given(*TRAINING, "learning_rate", "gradient_checkpointing")
    own = given(
        "passages", "questions_per_passage", "passage_tokens", "documents", "held_out", "judged", "min_f1",
        "answer_tokens", "layout", "seed",
    )  # fmt: skip
    options = AdaptOptions(**own)  # type: ignore[arg-type]
    return replace(options, training=replace(options.training, **training))  # type: ignore[arg-type]


def _say_end(report: AdaptReport, output: Path, model: str | None) -> None:
    from ..adapting.report import table

    mean, low, high = report.margin
    say()
    say(table(report))
    say(f"{report.judged} held-out questions over up to {report.documents} documents, compared with the answers from")
    say(f"the gold passage only; adapted minus untuned {mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})")
    say()
    if not report.kept:
        say(f"The adapter does not beat untuned fusion and was not kept; see {shown_path(output)}/report.json.")
        return
    adapter = f"{shown_path(output)}/adapter"
    named = f"--model {model} " if model else ""
    say(f'Use it: kvfusion ask "..." --docs PATH {named}--adapter {adapter}')
