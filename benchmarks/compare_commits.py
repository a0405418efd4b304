"""Compare the CPU time of this checkout with that of another commit: prefill, first token and each further token.

    python benchmarks/compare_commits.py COMMIT [--models default,llama,qwen3] [--rounds 3] [--repeats 12]

Each round starts one process per commit, both on one thread. They measure the same new documents in turn, in the order
old, new, new, old, so that neither a slow minute nor a fixed place in the pair favours one of them. Times are CPU
times. "llama" and "qwen3" are random models of about 60 million parameters, "default" is the default model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("prefill", "first token", "further token")
DOCUMENTS, WORDS, TOKENS = 5, 30, 17
RANDOM_SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--models", default="default,llama,qwen3", help="models, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes per model (default: 3)")
    parser.add_argument("--repeats", type=int, default=12, help="measurements of each per round (default: 12)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name, _checkout(args.commit, Path(name) / "old") as old:
        for model in args.models.split(","):
            path = _model_folder(model, Path(name))
            times = [_round(path, old, args.repeats, first) for first in range(args.rounds)]
            results[model] = _figures(times)
            for part, figures in results[model].items():
                print(
                    f"{model:8} {part:14}", "  ".join(f"{name} {value}" for name, value in figures.items()), flush=True
                )
    if args.json:
        run = {"old": _commit(args.commit), "new": _commit("HEAD"), "rounds": args.rounds, "repeats": args.repeats}
        args.json.write_text(json.dumps({"run": run, "models": results}, indent=2) + "\n")


def _commit(name: str) -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def _checkout(commit: str, folder: Path) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _model_folder(name: str, parent: Path) -> str:
    """Return the name of a model. A random one is saved with the default model's tokenizer."""
    if name == "default":
        return name
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvfusion_rag.model.location import locate_model
    from kvfusion_rag.model.repository import read_tokenizer

    tokenizer = read_tokenizer(locate_model(None))
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), tie_word_embeddings=True, **RANDOM_SHAPE)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    folder = str(parent / name)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _round(model: str, old: Path, repeats: int, number: int) -> list[dict[str, list[float]]]:
    """Return one measurement of both commits per repeat, as CPU seconds of each part."""
    workers = {name: _worker(model, tree) for name, tree in (("old", old), ("new", ROOT))}
    try:
        measured = []
        for repeat in range(-2, repeats):  # the first two warm up
            pair = {}
            for name in ("old", "new") if repeat % 2 == number % 2 else ("new", "old"):
                pair[name] = _ask(workers[name], f"{number} {repeat}")
            if pair["old"]["tokens"] != pair["new"]["tokens"]:
                print(f"{model}: the answers differ in repeat {repeat}.", file=sys.stderr)
            if repeat >= 0:
                measured.append({name: figures["seconds"] for name, figures in pair.items()})
    finally:
        for worker in workers.values():
            worker.communicate()
    return measured


def _worker(model: str, tree: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                                "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r})\n"
               f"import compare_commits; compare_commits.work({model!r})"]  # fmt: skip
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
    )


def _ask(worker: subprocess.Popen[str], seed: str) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(seed + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(model: str) -> None:
    """Measure once per line of standard input, which is the seed of the documents."""
    import torch

    from kvfusion_rag import Document, KVFusionGenerator

    torch.set_num_threads(1)
    generator = KVFusionGenerator.from_pretrained(None if model == "default" else model, device="cpu", dtype="float32")
    options = {"mode": "fusion", "focus": None}
    for line in sys.stdin:
        rng = random.Random(line)
        documents = [Document(_text(rng)) for _ in range(DOCUMENTS)]
        question = "Which words are in the documents? Write all of them."
        start = time.process_time()
        generator.prefill(documents)
        prefilled = time.process_time()
        generator.answer(question, documents, max_new_tokens=1, **options)
        first = time.process_time()
        answer = generator.answer(question, documents, max_new_tokens=TOKENS, **options)
        seconds = [prefilled - start, first - prefilled, time.process_time() - first - (first - prefilled)]
        seconds[2] /= max(1, len(answer.token_ids) - 1)
        print(json.dumps({"seconds": seconds, "tokens": list(answer.token_ids)}), flush=True)


def _text(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(WORDS))


def _figures(rounds: list[list[dict[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """Return for each part the medians in milliseconds, their ratio, and the ratio of each round."""
    figures: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(PARTS):
        medians = [
            {name: statistics.median(pair[name][number] for pair in one) for name in ("old", "new")} for one in rounds
        ]
        old, new = (statistics.median(m[name] for m in medians) for name in ("old", "new"))
        pairs = [pair["new"][number] / pair["old"][number] for one in rounds for pair in one]
        figures[part] = {"old ms": round(1e3 * old, 2), "new ms": round(1e3 * new, 2),
                         "ratio": round(statistics.median(pairs), 3),
                         "of rounds": [round(m["new"] / m["old"], 3) for m in medians]}  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
