"""Train the answering decoder on rows of documents, question and answer.

Rows come from ``kvfusion build-data``. The result is a LoRA adapter (``--adapter OUT/best`` in other commands), or
with ``--preset paper`` a decoder with its own weights. ``--resume`` resumes a run with the same rows and settings,
except that ``--epochs`` and ``--max-steps`` can be higher.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from .console import say, say_json, shown_path
from .options import add_model_name, positive, require_paths

if TYPE_CHECKING:
    from ..data.rows import QARow
    from ..training import Progress, TrainingConfig
    from ..training.config import Loss

# Numbers of TrainingConfig; flags, choices and lists have their own arguments.
NUMBERS = (
    "rank", "alpha", "dropout", "epochs", "max_steps", "batch_size", "accumulation", "learning_rate", "warmup",
    "weight_decay", "max_grad_norm", "joined_share", "eval_every", "seed",
)  # fmt: skip
SHARES_AND_RATES = ("dropout", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "joined_share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="JSON lines made by build-data (.gz too)")
    parser.add_argument("--output", required=True, metavar="DIR", help="for best/, checkpoint/ and losses.json")
    parser.add_argument("--dev", nargs="+", default=[], metavar="ROWS", help="rows for choosing the best checkpoint")
    parser.add_argument("--dev-limit", type=positive, metavar="N", help="use the first N rows of each dev file")
    add_model_name(parser, "base model")
    parser.add_argument("--preset", choices=["lora", "paper"], default="lora", help="settings to start from")
    parser.add_argument("--full", action="store_true", default=None, help="train all weights instead of an adapter")
    parser.add_argument(
        "--loss", choices=["answer", "distill"],
        help="answer (default): the row's answer; distill: the base model's answer from the gold passages only",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=["fixed", "prompt"], help="templates of the settings (default), or the chat template"
    )
    parser.add_argument("--evidence", action="store_true", default=None, help="train on the evidence sentence too")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", default=None,
        help="compute layers again in the backward pass, which needs less memory and more time",
    )  # fmt: skip
    parser.add_argument("--targets", nargs="+", metavar="MODULE", help="modules with an adapter (default: all linear)")
    for name in NUMBERS:
        kind = float if name in SHARES_AND_RATES else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help="see TrainingConfig")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="precision of the model; updates are made in float32")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss curve (png, svg, pdf)")
    parser.add_argument("--resume", action="store_true", help="resume from DIR/checkpoint if it exists")


def run(args: argparse.Namespace) -> int:
    require_paths([*args.rows, *args.dev])
    _require_plot(args.plot, resume=args.resume and (Path(args.output) / "checkpoint").exists())
    from accelerate import PartialState

    from ..training import preset, train

    given = {
        name: getattr(args, name)
        for name in (*NUMBERS, "full", "evidence", "gradient_checkpointing", "loss", "layout")
    }
    config = preset(args.preset, **given, targets=tuple(args.targets) if args.targets else None)
    rows = _read(args.rows, config.loss)
    dev = [row for path in args.dev for row in _read([path], None)[: args.dev_limit]]

    def report(progress: Progress) -> None:
        _plot(args, progress)
        if not args.json:
            _say_progress(progress)

    progress = train(
        rows, output=args.output, model=args.model, gguf_file=args.gguf_file, dev=dev, config=config,
        device=args.device, dtype=args.dtype, resume=args.resume, files=_files(args), report=report,
    )  # fmt: skip
    processes = PartialState()
    if processes.is_main_process:
        _say_end(args, config, progress)
    if processes.num_processes > 1:  # without waiting, the last processes abort because their peers are gone
        processes.wait_for_everyone()
        processes.destroy_process_group()
    return 0


def _say_end(args: argparse.Namespace, config: TrainingConfig, progress: Progress) -> None:
    if args.json:
        say_json({"output": args.output, "config": asdict(config), **asdict(progress), "best": progress.best})
    else:
        say(f"{progress.step} steps; the best decoder is in {shown_path(args.output)}/best")


def _require_plot(path: Path | None, *, resume: bool) -> None:
    """Check, before a long run, that the plot can be drawn."""
    if path is None:
        return
    from ..evaluation.plots import require_plotting

    require_plotting(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidInputError(f"--plot is {str(path)!r}, but it must be a file in an existing folder.")
    if path.exists() and not resume:
        raise InvalidInputError(f"--plot is {str(path)!r}, which exists; name another file, or remove it.")


def _read(paths: list[str], loss: Loss | None) -> list[QARow]:
    """Read all rows of the files, and check that they can be trained on with ``loss`` unless it is None."""
    from ..data.rows import read_placed_rows
    from ..training.examples import require_trainable

    rows: list[QARow] = []
    for path in paths:
        for where, row in read_placed_rows(path):
            if loss is not None:
                require_trainable(row, where, loss)
            rows.append(row)
    return rows


def _files(args: argparse.Namespace) -> dict[str, Any]:
    """Return names and digests of all files with rows."""
    from ..evaluation.report import file_digest

    def facts(paths: list[str]) -> list[dict[str, str]]:
        return [{"name": Path(path).name, "sha256": file_digest(Path(path))} for path in paths]

    return {"rows": facts(args.rows), "dev": facts(args.dev), "dev_limit": args.dev_limit}


def _plot(args: argparse.Namespace, progress: Progress) -> None:
    if args.plot is None:
        return
    from ..model.location import DEFAULT_MODEL
    from ..training.curve import plot_losses

    names = ", ".join(Path(path).name for path in args.rows)
    plot_losses(progress, args.plot, title=f"{args.model or DEFAULT_MODEL}, trained on {names}")


def _say_progress(progress: Progress) -> None:
    recent = [loss for _, loss in progress.losses[-20:]]
    score = ""
    if progress.scores:
        score = f", exact match on dev {progress.scores[-1][1]:.1f} %"
        score += f" (best {progress.best:.1f} % at step {progress.best_step})"
    say(f"step {progress.step}: loss {sum(recent) / len(recent):.3f} nats per token{score}")
