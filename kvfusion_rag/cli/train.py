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

from ..training.config import PRESETS, TrainingConfig, preset
from .arguments.fields import add_fields
from .arguments.paths import existing, output_folder, plot_file
from .arguments.values import positive
from .console import say, say_json, shown_path
from .options import add_device, add_model_name

if TYPE_CHECKING:
    from ..data.rows import QARow
    from ..training import Progress
    from ..training.config import Loss

SETTINGS = (  # fields of TrainingConfig
    "full", "loss", "layout", "evidence", "gradient_checkpointing", "shard_weights", "targets", "rank", "alpha",
    "dropout", "epochs", "max_steps", "batch_size", "accumulation", "learning_rate", "warmup", "weight_decay",
    "max_grad_norm", "joined_share", "eval_every", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("rows", nargs="+", type=existing, metavar="ROWS", help="JSON lines made by build-data (.gz too)")
    output = "folder for best/, checkpoint/ and losses.json"
    add("--output", type=output_folder, required=True, metavar="DIR", help=output)
    dev = "rows for choosing the best checkpoint (default: none, the last one is kept)"
    add("--dev", nargs="+", type=existing, default=[], metavar="ROWS", help=dev)
    add("--dev-limit", type=positive, metavar="N", help="use the first N rows of each dev file (default: all)")
    add_model_name(parser, "base model")
    add("--preset", choices=list(PRESETS), default="lora", help="settings to start from (default: lora)")
    add_fields(parser, TrainingConfig, SETTINGS, PRESETS)
    add_device(parser)
    add(
        "--dtype", choices=["float32", "bfloat16"],
        help="precision of the model; updates are made in float32 (default: float32 on CPU, otherwise the "
        "checkpoint's)",
    )  # fmt: skip
    add("--plot", type=plot_file, metavar="FILE", help="draw the loss curve (png, svg, pdf; default: not drawn)")
    add("--resume", action="store_true", help="resume from DIR/checkpoint if it exists")


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in SETTINGS}
    config = preset(args.preset, **given | {"targets": tuple(args.targets) if args.targets else None})
    _require_plot(args)
    from accelerate import PartialState

    from ..training import train

    rows = _read(args.rows, config.loss)
    dev = [row for path in args.dev for row in _read([path], None)[: args.dev_limit]]

    def report(progress: Progress) -> None:
        _plot(args, progress)
        if not args.json:
            _say_progress(progress)

    progress = train(
        rows, output=args.output, model=args.model, gguf_file=args.gguf_file, dev=dev, config=config,
        device=args.device, dtype=args.dtype, resume=args.resume, files=_files(args), report=report,
        progress=args.verbosity >= 0,
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
        say_json({"output": str(args.output), "config": asdict(config), **asdict(progress), "best": progress.best})
    else:
        say(f"{progress.step} steps; the best decoder is in {shown_path(args.output)}/best")


def _require_plot(args: argparse.Namespace) -> None:
    """Check, before a long run, that the plot can be drawn, and that it replaces only that of a resumed run."""
    if args.plot is None:
        return
    from ..data.writing import check_output
    from ..evaluation.plots import require_plotting

    require_plotting(args.plot)
    resumed = args.resume and (args.output / "checkpoint").exists()
    check_output(args.plot, force=resumed, inputs=map(Path, (*args.rows, *args.dev)))


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
