"""What oneDNN is worth for linear layers in float32 on this CPU, beside torch's own product: see ``linear.py``.

    python benchmarks/linear_layers.py [--shape qwen2.5-0.5b] [--json results.json]

Each layer is measured over several copies of its weights, so that they come from memory as in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import linear

from kvfusion_rag.benchmark.shapes import SHAPES, shape_named
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.model.linear import has_onednn, onednn

ROWS = (1, 2, 4, 16, 64, 128, 256, 1024)
BYTES = 1 << 28  # of all copies of a layer's weights: more than caches hold
TRIES = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if not has_onednn():
        raise SystemExit("this torch has no oneDNN, or not the operator that linear.py calls.")
    shape = shape_named(args.shape)
    layers = {
        "gate, up": (shape.hidden_size, shape.intermediate_size),
        "down": (shape.intermediate_size, shape.hidden_size),
        "query, output": (shape.hidden_size, shape.hidden_size),
        "key, value": (shape.hidden_size, shape.hidden_size // shape.heads * shape.kv_heads),
        "head": (shape.hidden_size, shape.vocabulary),
    }
    figures = [row for name, sizes in layers.items() for row in measure(name, *sizes)]
    if args.json:
        args.json.write_text(
            json.dumps({"shape": args.shape, "figures": figures, "run": run_facts()}, indent=2) + "\n"
        )


@torch.inference_mode()
def measure(name: str, inputs: int, outputs: int) -> list[dict[str, object]]:
    """Milliseconds of one layer by either way, for each number of rows."""
    weights = [torch.randn(outputs, inputs) for _ in range(max(1, BYTES // (4 * inputs * outputs)))]
    found: list[dict[str, object]] = []
    for rows in ROWS:
        if name == "head" and rows > 64:  # which is asked for the last tokens alone
            continue
        torchs, onednns = seconds(weights, torch.randn(1, rows, inputs))
        ratio = torchs / onednns
        found.append(
            {"layer": name, "inputs": inputs, "outputs": outputs, "rows": rows, "torch_ms": round(1e3 * torchs, 3),
             "onednn_ms": round(1e3 * onednns, 3), "times_faster": round(ratio, 2)}
        )  # fmt: skip
        print(f"{name:13} {inputs:>5} -> {outputs:<6} {rows:>4} rows: {1e3 * torchs:8.3f} ms by torch, "
              f"{1e3 * onednns:8.3f} by oneDNN, {ratio:.2f} x")  # fmt: skip
    return found


def seconds(weights: Sequence[torch.Tensor], given: torch.Tensor) -> list[float]:
    """Of one layer by torch and by oneDNN in turn: the median of several tries, after two that do not count."""
    found: list[list[float]] = [[], []]
    for _ in range(TRIES + 2):
        for times, product in zip(found, (linear, onednn), strict=True):
            began = time.perf_counter()
            for weight in weights:
                product(given, weight, None)
            times.append((time.perf_counter() - began) / len(weights))
    return [statistics.median(times[2:]) for times in found]


if __name__ == "__main__":
    main()
