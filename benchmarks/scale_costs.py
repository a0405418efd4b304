"""Compute what a corpus costs: bytes, prefill hours, money, and limits of the design. Prints tables of docs/scale.md.

    python benchmarks/scale_costs.py [--table sizes] [--gpu-price 3.5] [--utilisation 0.4] ...

Sizes follow from the shapes of the models, and limits from benchmarks/results/growth_time.json. The rate of the CPU
was measured (commit and hardware in benchmarks/results/answer_speed_qwen2.5-0.5b_float32_avx2.json, row "cold"); that
of the GPU is its published peak times an assumed utilisation. Prices are assumptions, not quotes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from kvfusion_rag.benchmark.hardware_limits import Costs
from kvfusion_rag.benchmark.shapes import SHAPES, Shape
from kvfusion_rag.model.kv import KVShape
from kvfusion_rag.store.format import layout

RESULTS = Path(__file__).parent / "results"
MEASURED_CPU = RESULTS / "answer_speed_qwen2.5-0.5b_float32_avx2.json"
MEASURED_GROWTH = RESULTS / "growth_time.json"
CORPORA = (10**6, 10**8, 10**10)  # passages
TOKENS = 150  # of a passage
MODELS = {
    "SmolLM2-135M": Shape(LlamaConfig, 576, 1536, 30, 9, 3, 49_152),
    "Qwen2.5-7B": SHAPES["qwen2.5-7b"],
    "Llama-3.1-8B": SHAPES["llama-3.1-8b"],
}
H200_PEAK = 989e12  # operations per second in bfloat16 without sparsity, as published
HOURS_PER_MONTH = 730
LIST_KEYS = 1000  # keys per request of S3's ListObjectsV2
UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")
KEY = "0" * 130  # of the length of a store key
Table = list[list[str]]


class Machine(NamedTuple):
    """Hardware that prefills.

    Attributes:
        rate: operations per second that prefill reaches, two for each weight of the layers and token.
        price: dollars per hour.
    """

    name: str
    rate: float
    price: float


def main() -> None:
    args = parse()
    for name in [args.table] if args.table else TABLES:
        print(markdown(TABLES[name](args)), end="\n\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", choices=list(TABLES), help="table to print (default: all)")
    add("--gpu-price", type=float, default=3.5, help="dollars per hour of an H200 (default: 3.5)")
    add("--cpu-price", type=float, default=0.1, help="dollars per hour of two CPU threads (default: 0.1)")
    add("--utilisation", type=float, default=0.4, help="share of the H200's peak that prefill reaches (default: 0.4)")
    add("--bucket-price", type=float, default=23.0, help="dollars per TB and month in a bucket (default: 23)")
    add("--disk-price", type=float, default=2.8, help="dollars per TB and month on a local disk (default: 2.8)")
    add("--get-price", type=float, default=0.4, help="dollars per million reads from a bucket (default: 0.4)")
    add("--network", type=float, default=25.0, help="Gbit/s between a machine and the bucket (default: 25)")
    return parser.parse_args(arguments)


def machines(args: argparse.Namespace) -> list[Machine]:
    rows = json.loads(MEASURED_CPU.read_text())["rows"]
    row = next(row for row in rows if row["system"] == "cold")
    tokens = row["documents"] * row["document_tokens"]
    operations = operations_per_token(SHAPES["qwen2.5-0.5b"]) * tokens
    cpu = Machine("2 threads of an EPYC", operations / row["seconds_to_first_token"]["median"], args.cpu_price)
    return [cpu, Machine("H200", H200_PEAK * args.utilisation, args.gpu_price)]


def operations_per_token(shape: Shape) -> float:
    return 2.0 * Costs.of(shape, torch.bfloat16).body


def passages_per_second(shape: Shape, machine: Machine) -> float:
    return machine.rate / operations_per_token(shape) / TOKENS


def passage_bytes(shape: Shape, codec: str, tokens: int = TOKENS) -> int:
    """Return the size of a passage's file in bfloat16, which ``kvfusion store estimate`` shows too."""
    width = shape.hidden_size // shape.heads
    kv = KVShape(shape.layers, shape.kv_heads, width, width, torch.bfloat16)
    return layout(KEY, tokens, kv, codec).total  # type: ignore[arg-type]


def sizes(args: argparse.Namespace) -> Table:
    totals = [f"{amount(n)} passages" for n in CORPORA]
    rows = [["model, codec", "file bytes per token", "bytes per passage", *totals]]
    for name, shape in MODELS.items():
        for codec in ("raw", "v8"):
            size = passage_bytes(shape, codec)
            per_token = (passage_bytes(shape, codec, 1000 + TOKENS) - size) / 1000
            rows.append([f"{name}, {codec}", f"{per_token:,.0f}", f"{size:,}", *(scaled(size * n) for n in CORPORA)])
    return rows


def prefill(args: argparse.Namespace) -> Table:
    """Hours of one machine, and the passages that the network takes in a second."""
    totals = [f"hours for {amount(n)}" for n in CORPORA]
    rows = [["model on machine", "passages/s", "network, passages/s", *totals]]
    for name, shape in MODELS.items():
        upload = args.network * 1e9 / 8 / passage_bytes(shape, "raw")
        for machine in machines(args):
            rate = passages_per_second(shape, machine)
            hours = [short(n / rate / 3600) for n in CORPORA]
            rows.append([f"{name}, {machine.name}", short(rate), short(upload), *hours])
    return rows


def money(args: argparse.Namespace) -> Table:
    """Dollars for a million passages, and how often each must be used so that storing them is cheaper."""
    million = 1_000_000
    rows = [["model on machine", "compute", "bucket, month", "disk, month", "uses, bucket", "uses, disk"]]
    for name, shape in MODELS.items():
        terabytes = passage_bytes(shape, "raw") * million / 1e12
        bucket, disk = terabytes * args.bucket_price, terabytes * args.disk_price
        for machine in machines(args):
            compute = million / passages_per_second(shape, machine) / 3600 * machine.price
            saved = compute - args.get_price
            uses = short(bucket / saved) if saved > 0 else "never"
            rows.append([f"{name}, {machine.name}", *map(short, (compute, bucket, disk)), uses, short(disk / compute)])
    return rows


def bandwidth(args: argparse.Namespace) -> Table:
    """The bandwidth in GB/s above which reading a KV is faster than computing it."""
    rows = [["model on machine", "raw, GB/s", "v8, GB/s"]]
    for name, shape in MODELS.items():
        for machine in machines(args):
            rate = passages_per_second(shape, machine)
            rows.append(
                [f"{name}, {machine.name}", *(short(rate * passage_bytes(shape, c) / 1e9) for c in ("raw", "v8"))]
            )
    return rows


def limits(args: argparse.Namespace) -> Table:
    """Linear extrapolation of the largest measured sizes. Measured sizes are printed as measured."""
    figures: dict[str, list[dict[str, Any]]] = json.loads(MEASURED_GROWTH.read_text())["figures"]
    rows = [["passages", "search", "open index", "index file", "vectors in memory", "open store folder",
             "list requests of a bucket", "manifest"]]  # fmt: skip
    counts = sorted({row["passages"] for row in figures["index"]} | set(CORPORA))
    line = len(json.dumps({"id": "folder/file.txt#12", "keys": [KEY]})) + 1
    for count in counts:
        times = [grown(figures["index"], count, name) for name in ("search_seconds", "open_seconds")]
        rows.append([amount(count), *map(duration, times), scaled(grown(figures["index"], count, "bytes")),
                     scaled(count * 384 * 4), duration(grown(figures["folder"], count, "open_seconds")),
                     f"{-(-count // LIST_KEYS):,}", scaled(count * line)])  # fmt: skip
    return rows


TABLES: dict[str, Callable[[argparse.Namespace], Table]] = {
    "sizes": sizes, "prefill": prefill, "money": money, "bandwidth": bandwidth, "limits": limits
}  # fmt: skip


def grown(rows: Sequence[dict[str, Any]], passages: int, name: str) -> float:
    """Return a figure for a number of passages: the measured one, or in proportion to the largest measured."""
    nearest = next((row for row in rows if row["passages"] == passages), rows[-1])
    return nearest[name] * passages / nearest["passages"]


def amount(passages: int) -> str:
    """Return a power of ten as such, and any other number with separators."""
    power = len(str(passages)) - 1
    return f"10^{power}" if passages == 10**power else f"{passages:,}"


def markdown(rows: Table) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(value: float) -> str:
    """Return a number with two digits that count, or all before the point."""
    if value >= 100:
        return f"{float(f'{value:.2e}'):,.0f}"
    return f"{float(f'{value:.1e}'):g}"


def scaled(size: float) -> str:
    """Return bytes in decimal units."""
    power = next((power for power in range(1, len(UNITS)) if size < 1000 ** (power + 1)), len(UNITS))
    return f"{short(size / 1000**power)} {UNITS[power - 1]}"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{short(seconds / size)} {unit}"
    return f"{short(seconds * 1000)} ms"


if __name__ == "__main__":
    main()
