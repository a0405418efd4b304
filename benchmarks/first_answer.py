"""Time the phases of ``kvfusion ask`` on an indexed folder, each run in its own process.

    python benchmarks/first_answer.py MODEL DOCS [--question TEXT] [--repeats 5] [--json results.json]

DOCS is indexed first. Prints medians of wall and CPU seconds. On a busy machine only CPU seconds are reproducible. The
time of an inner phase is not included in that of the outer one.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvfusion_rag.cli import main as command
from kvfusion_rag.cli.console import collection_paused

QUESTION = "Who was the last keeper of the Harrow Point Lighthouse?"
IMPORTED = ("torch", "transformers.modeling_utils", "kvfusion_rag.generator", "sentence_transformers")
TIMED = (  # phase, module, class or "", function
    ("tokenizer", "transformers", "AutoTokenizer", "from_pretrained"),
    ("tokenizer without control tokens", "kvfusion_rag.text.encoder", "PlainEncoder", "__init__"),
    ("weights", "transformers", "AutoModelForCausalLM", "from_pretrained"),
    ("digest of weights", "kvfusion_rag.model.backbone", "", "digest_tensors"),
    ("gate", "kvfusion_rag.fusion.torch_model", "", "run_gate"),
    ("embedding model", "kvfusion_rag.retrieval", "SentenceTransformerEmbedder", "__init__"),
    ("index: open, update, search", "kvfusion_rag.retrieval", "DocumentIndex", "__init__"),
    ("index: open, update, search", "kvfusion_rag.retrieval", "DocumentIndex", "update"),
    ("index: open, update, search", "kvfusion_rag.retrieval", "DocumentIndex", "search"),
    ("answer", "kvfusion_rag", "KVFusionGenerator", "answer"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("docs", help="folder of documents")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--repeats", type=int, default=5, help="number of runs, after one that does not count")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asking = ["ask", args.question, "--docs", args.docs, "--model", args.model, "--no-server"]
    if args.child:
        print(json.dumps(phases(asking)))
        return
    subprocess.run(
        [sys.executable, "-m", "kvfusion_rag.cli", "index", args.docs, "--model", args.model],
        check=True, capture_output=True,
    )  # fmt: skip
    runs = [run(sys.argv[1:]) for _ in range(args.repeats + 1)][1:]
    figures = {
        phase: {name: round(statistics.median(one[phase][name] for one in runs), 3) for name in ("wall", "cpu")}
        for phase in runs[0]
    }
    for phase, seconds in figures.items():
        print(f"{phase:36} {seconds['wall']:6.2f} s {seconds['cpu']:6.2f} s CPU")
    if args.json:
        from kvfusion_rag.evaluation.report import run_facts

        args.json.write_text(json.dumps({"seconds": figures, "run": run_facts()}, indent=2) + "\n")


def run(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Return the seconds of each phase of one new process, of everything else, and in total."""
    began, before = time.perf_counter(), os.times()
    command = [sys.executable, __file__, *arguments, "--child"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    after = os.times()
    whole = {
        "wall": time.perf_counter() - began,
        "cpu": after.children_user + after.children_system - before.children_user - before.children_system,
    }
    found = json.loads(done.stdout)
    rest = {name: whole[name] - sum(phase[name] for phase in found.values()) for name in whole}
    return {**found, "all else": rest, "in all": whole}


def phases(asking: list[str]) -> dict[str, dict[str, float]]:
    """Return the seconds of each phase of the command in this process, with its imports first."""
    clock = Clock()
    atexit.register(gc.freeze)  # as at the end of a command
    with collection_paused():
        for name in IMPORTED:
            with clock.phase(f"import {name.partition('.')[0]}"):
                importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        for phase, module, owner, function in TIMED:
            place = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            stack.enter_context(patch.object(place, function, clock.timed(phase, getattr(place, function))))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if code := command(asking):
            raise SystemExit(code)
    return dict(clock.found)


class Clock:
    """Sums wall and CPU seconds of phases, without their inner phases."""

    def __init__(self) -> None:
        self.found: defaultdict[str, dict[str, float]] = defaultdict(lambda: {"wall": 0.0, "cpu": 0.0})
        self._inner = [0.0, 0.0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self._inner = self._inner, [0.0, 0.0]
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            self.found[name]["wall"] += wall - self._inner[0]
            self.found[name]["cpu"] += cpu - self._inner[1]
            self._inner = [outer[0] + wall, outer[1] + cpu]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


if __name__ == "__main__":
    main()
