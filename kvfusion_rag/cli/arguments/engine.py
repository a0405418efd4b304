"""Arguments that choose what computes: torch or llama.cpp."""

from __future__ import annotations

import argparse
from typing import Any

from .values import count

ENGINES = ("torch", "llama.cpp", "auto")  # repeated here, because importing them would import torch
CACHE_TYPES = ("f16", "q8_0")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine``, ``--gpu-layers`` and ``--cache-type``."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="torch",
        help="what computes: torch, llama.cpp for GGUF files (extra llama-cpp), or auto, the faster of both in a "
        "short measurement (default: torch)",
    )
    parser.add_argument(
        "--gpu-layers",
        type=count,
        metavar="N",
        help="number of layers that llama.cpp puts on a GPU, 0 for none (default: all if its build can use one)",
    )
    parser.add_argument(
        "--cache-type",
        choices=CACHE_TYPES,
        help="precision of documents' KVs in llama.cpp: f16, or q8_0, which takes half the memory (default: f16)",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that differ from their defaults."""
    options = {"gpu_layers": args.gpu_layers, "cache_type": args.cache_type}
    found = {name: value for name, value in options.items() if value is not None}
    return found if args.engine == "torch" else {"engine": args.engine, **found}
