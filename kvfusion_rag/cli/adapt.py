"""Make an adapter of a model from your own documents, without labels.

The model writes and answers questions about the documents, learns to give the same answers over fused documents, and
is judged on held-out questions, over all documents and over the one that focus chooses. The adapter is kept if it
beats the untuned model in either case. Run the same command again to resume a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapting.options import AdaptOptions
from ..training.config import TrainingConfig
from .arguments.fields import add_fields
from .arguments.paths import existing, existing_file, output_folder
from .console import say, say_json, shown_path, shows_progress
from .options import FILE_KINDS, add_device, add_model_position

if TYPE_CHECKING:
    from ..adapting import AdaptReport

OPTIONS = (  # fields of AdaptOptions
    "passages", "questions_per_passage", "passage_tokens", "documents", "held_out", "judged", "min_f1",
    "answer_tokens", "layout", "seed",
)  # fmt: skip
TRAINING = (  # fields of TrainingConfig
    "epochs", "max_steps", "batch_size", "accumulation", "rank", "eval_every", "learning_rate",
    "gradient_checkpointing",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_position(parser)
    add = parser.add_argument
    documents = f"files and folders with the documents ({FILE_KINDS})"
    add("--docs", nargs="+", type=existing, required=True, metavar="PATH", help=documents)
    output = "folder for adapter/, report.json and the run's state"
    add("--output", type=output_folder, required=True, metavar="DIR", help=output)
    questions = "your own questions: one per line, or .jsonl {question, passage} (default: the model writes them)"
    add("--questions", type=existing_file, metavar="FILE", help=questions)
    defaults = AdaptOptions()
    add_fields(parser, AdaptOptions, OPTIONS, {"": defaults})
    add_fields(parser, TrainingConfig, TRAINING, {"": defaults.training})
    add_device(parser)
    precision = "precision of the model (default: float32 on CPU, otherwise the checkpoint's)"
    add("--dtype", choices=["float32", "bfloat16"], help=precision)


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    from ..adapting import adapt

    report = adapt(
        args.model, docs=args.docs, output=args.output, options=options, gguf_file=args.gguf_file,
        questions=args.questions, device=args.device, dtype=args.dtype, progress=shows_progress(args),
        note=(lambda text: None) if args.json else say,
    )  # fmt: skip
    if args.json:
        say_json({"output": str(args.output), **report.to_dict()})
    else:
        _say_end(report, args)
    return 0


def _options(args: argparse.Namespace) -> AdaptOptions:
    def given(names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    options = AdaptOptions(**given(OPTIONS))
    return replace(options, training=replace(options.training, **given(TRAINING)))


def _say_end(report: AdaptReport, args: argparse.Namespace) -> None:
    from ..adapting.judging import SYSTEMS
    from ..adapting.report import points, table

    output = shown_path(args.output)
    say()
    say(table(report))
    say(f"{report.judged} held-out questions over up to {report.documents} documents, compared with the answers from")
    say("the gold passage only. Adapted minus untuned:")
    say(f"  over all documents  {points(report.margin)}")
    say(f"  with focus          {points(report.focus_margin)}")
    say()
    command = 'kvfusion ask "..." --docs PATH' + (f" --model {args.model}" if args.model else "")
    best = next(system for system in SYSTEMS if system.name == report.best)
    if best.adapted:
        say(f"Use it: {command} --adapter {output}/adapter")
        return
    focus = f" --focus {best.focus or 'none'}" if best.mode == "fusion" else ""
    layout = f', with "layout": "{args.layout}" in its kvfusion.json' if args.layout else ""
    say(f"The untuned model is best: {command} --adapter none --mode {best.mode}{focus}{layout}")
    if report.kept:
        say(f"The adapter is in {output}/adapter.")
    else:
        say(f"The adapter does not beat the untuned model and was not kept; see {output}/report.json.")
