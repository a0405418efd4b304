"""Check this machine, or whether a model can read fused documents exactly and in which mode it answers best.

Without MODEL, facts about the machine are printed, and no model is loaded. The default model is checked by its name,
SmolLM2-135M-Instruct, or by any option of a model. The checks of the configuration come first, with the rows of the
compatibility table. They need only config.json. The exit code is 0 if all checks passed, and 1 if the model is not
supported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...errors import MissingDependencyError, UnsupportedModelError
from ..console import print_error, say, say_json, shows_progress
from ..options import add_model_arguments, add_model_position, load_generator, load_whole_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ...evaluation.modes import ModeResult
    from ...generator import KVFusionGenerator
    from ...schema import Check


DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # repeated here, because importing it would import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_position(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--config-only",
        action="store_true",
        help="read only the model's configuration: print its row of the compatibility table, and load no weights",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="answer 40 questions in each mode, print the table, and make the best mode this model's default",
    )


def run(args: argparse.Namespace) -> int:
    return _check_machine(args) if _asks_for_machine(args) else _check_model(args)


def _asks_for_machine(args: argparse.Namespace) -> bool:
    """Return whether the command names no model and has no option of one."""
    if args.model == DEFAULT_MODEL:
        args.model = None
        return False
    own = (args.measure, args.config_only, args.adapter != "shipped", args.decoder, args.gguf_file, args.model)
    return not any(own)


def _check_machine(args: argparse.Namespace) -> int:
    from ...machine.report import inspect_machine
    from .machine import say_machine

    report = inspect_machine()
    if args.json:
        say_json(report.to_dict())
    else:
        say_machine(report)
    return 0


def _check_model(args: argparse.Namespace) -> int:
    from ...model.families.table import rows_of, structure_of
    from ...model.text_part import text_part

    config = load_whole_config(args)
    text = text_part(config)
    rows = rows_of(config) or rows_of(text)
    if not args.json:
        for row in rows:
            say(f"small models of {row.family} ({row.model_type}, {row.structure}): {row.verdict}")
        if not rows:
            say(f"not measured: {text.model_type} ({structure_of(text)})")
    listed = [row.to_dict() for row in rows]
    if args.config_only:
        return _report_configuration(args, config, listed)
    try:
        generator = load_generator(args)
    except UnsupportedModelError as error:
        if args.json:
            say_json({"model": args.model, "passed": False, "checks": [], "error": str(error), "table": listed})
        print_error(str(error))
        return 1
    results = _measure(generator, progress=shows_progress(args)) if args.measure else None
    gate = generator.gate
    mode, reason = generator.default_mode()
    focus = generator.default_focus()
    if args.json:
        say_json({
            "model": gate.model_id,
            "passed": gate.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in gate.checks],
            "error": None, "table": listed, "mode": mode, "mode_reason": reason, "focus": focus,
            "measured": None if results is None else [result.to_dict() for result in results],
        })  # fmt: skip
        return 0
    say(gate.model_id)
    _say_checks(gate.checks)
    say("passed: documents can be fused exactly")
    if results is not None:
        _say_table(results)
    say(f"default mode: {mode} ({reason}){'' if focus is None else f', focus {focus}'}")
    if results is None:
        say("These checks do not measure the quality of answers; --measure answers 40 questions in each mode.")
    return 0


def _report_configuration(args: argparse.Namespace, config: PretrainedConfig, rows: Sequence[dict[str, Any]]) -> int:
    from ...model.support import configuration_checks

    checks = configuration_checks(config)
    error = None if checks[-1].passed else checks[-1].detail
    if error is None and rows and not any(row["accepted"] for row in rows):
        error = rows[0]["reason"]  # measured, because the configuration does not show it
    if args.json:
        say_json({
            "model": args.model, "passed": error is None, "checks": [asdict(check) for check in checks],
            "error": error, "table": rows,
        })  # fmt: skip
        return 0 if error is None else 1
    _say_checks(checks)
    if error is None:
        say(
            "passed: nothing in the configuration prevents fusion; without --config-only, the model itself is measured"
        )
    return 0 if error is None else 1


def _say_checks(checks: Sequence[Check]) -> None:
    for check in checks:
        say(f"  {'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")


def _measure(generator: KVFusionGenerator, *, progress: bool) -> list[ModeResult]:
    from ...evaluation.modes import best_measured, measure_modes, shipped_questions, with_scores
    from ...retrieval import SentenceTransformerEmbedder

    questions = shipped_questions()
    with suppress(MissingDependencyError):  # without an embedding model, documents have no scores
        questions = with_scores(questions, SentenceTransformerEmbedder())
    results, weight = measure_modes(generator, questions, progress=progress)
    generator.keep_measurement(best_measured(results, weight), [result.to_dict() for result in results])
    return results


def _say_table(results: list[ModeResult]) -> None:
    say()
    say(f"{'mode':8} {'focus':>5} {'right':>7} {'F1':>6} {'first token':>12} {'answer':>8}")
    for result in results:
        focus = result.focus or ""
        if result.right is None:
            say(f"{result.mode:8} {focus:>5} cannot be used: {result.reason}")
        else:
            columns: list[Any] = [focus, result.right, result.f1, result.first_token, result.total]
            say("{:8} {:>5} {:5.1f} % {:6.1f} {:10.2f} s {:6.2f} s".format(result.mode, *columns))
    say("40 questions over five documents each; right: the answer contains an accepted answer; focus: documents kept")
    say()
