"""Train the answering decoder on rows of documents, question and answer.

Rows come from ``kvfusion build-data``. The result is a LoRA adapter (``--adapter OUT/best`` elsewhere), or with
``--preset paper`` a decoder with weights of its own. A run that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from .console import say, say_json, shown_path
from .options import positive, require_paths

if TYPE_CHECKING:
    from ..qa import QARow
    from ..training import Progress

# Settings of TrainingConfig that are flags or lists get arguments of their own.
NUMBERS = (
    "rank", "alpha", "dropout", "epochs", "max_steps", "batch_size", "accumulation", "learning_rate", "warmup",
    "weight_decay", "max_grad_norm", "joined_share", "eval_every", "seed",
)  # fmt: skip
SHARES_AND_RATES = ("dropout", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "joined_share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="JSON lines made by build-data (.gz too)")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets best/ and checkpoint/")
    parser.add_argument("--dev", nargs="+", default=[], metavar="ROWS", help="rows to choose the best checkpoint by")
    parser.add_argument("--dev-limit", type=positive, metavar="N", help="use the first N dev rows")
    parser.add_argument("--model", metavar="NAME", help="base model: hub name or folder (default: the embedded one)")
    parser.add_argument("--preset", choices=["lora", "paper"], default="lora", help="settings to start from")
    parser.add_argument("--full", action="store_true", default=None, help="train all weights, not an adapter")
    parser.add_argument("--evidence", action="store_true", default=None, help="train on the evidence sentence too")
    parser.add_argument("--targets", nargs="+", metavar="MODULE", help="modules that get an adapter")
    for name in NUMBERS:
        kind = float if name in SHARES_AND_RATES else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help="see TrainingConfig")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="precision of the model")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint if it is there")


def run(args: argparse.Namespace) -> int:
    require_paths([*args.rows, *args.dev])
    from ..training import preset, train

    given = {name: getattr(args, name) for name in (*NUMBERS, "full", "evidence")}
    config = preset(args.preset, **given, targets=tuple(args.targets) if args.targets else None)
    dev = _read(args.dev)[: args.dev_limit]
    progress = train(
        _read(args.rows), output=args.output, model=args.model, dev=dev, config=config, device=args.device,
        dtype=args.dtype, resume=args.resume, report=None if args.json else _say_progress,
    )  # fmt: skip
    if args.json:
        say_json({"output": args.output, "config": asdict(config), **asdict(progress), "best": progress.best})
    else:
        say(f"{progress.step} steps; the best decoder is in {shown_path(args.output)}/best")
    return 0


def _read(paths: list[str]) -> list[QARow]:
    from ..qa import read_rows

    return [row for path in paths for row in read_rows(path)]


def _say_progress(progress: Progress) -> None:
    recent = [loss for _, loss in progress.losses[-20:]]
    score = f", exact match on dev {progress.scores[-1][1]:.1f} %" if progress.scores else ""
    say(f"step {progress.step}: loss {sum(recent) / len(recent):.3f} nats a token{score}")
