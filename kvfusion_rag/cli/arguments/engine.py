"""Arguments that choose what computes: torch, llama.cpp or vLLM."""

from __future__ import annotations

import argparse
from typing import Any

from .values import arguments, count, positive

ENGINES = ("torch", "llama.cpp", "vllm", "auto")  # repeated here, because importing them would import torch
CACHE_TYPES = ("f16", "q8_0")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine``, and options that only one engine has."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="torch",
        help="engine: torch, llama.cpp for GGUF files (extra llama-cpp), auto for the faster of these two in a short "
        "measurement, or vllm for many users at once; see docs/engines.md (default: torch)",
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
    parser.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="maximum tokens of documents, question and answer of one request on vLLM (default: the model's context "
        "window)",
    )
    parser.add_argument(
        "--vllm-args",
        type=arguments,
        metavar="TEXT",
        help="further arguments of vllm serve, such as '--tensor-parallel-size 2 --gpu-memory-utilization 0.7' "
        "(default: none)",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that differ from their defaults."""
    names = ("gpu_layers", "cache_type", "max_model_len", "vllm_args")
    options = {name: getattr(args, name) for name in names}
    found = {name: value for name, value in options.items() if value is not None}
    return found if args.engine == "torch" else {"engine": args.engine, **found}
