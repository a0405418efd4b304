"""Check whether a model can read fused documents exactly, and print what was checked.

Exit code 0 when all checks passed, 1 when the model is refused.
"""

from __future__ import annotations

import argparse

from ..errors import UnsupportedModelError
from .console import print_error, say, say_json
from .options import add_gguf_file, add_model_arguments, load_generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "hub name, folder or GGUF file (default: SmolLM2-135M-Instruct)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=names)
    add_gguf_file(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        generator = load_generator(args)
    except UnsupportedModelError as error:
        if args.json:
            say_json({"model": args.model, "passed": False, "checks": [], "error": str(error)})
        print_error(str(error))
        return 1
    gate = generator.gate
    if args.json:
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in gate.checks]
        say_json({"model": gate.model_id, "passed": gate.passed, "checks": checks, "error": None})
    else:
        say(gate.model_id)
        for check in gate.checks:
            say(f"  {'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
        say(f"passed: documents can be fused exactly, default mode {generator.mode}")
    return 0
