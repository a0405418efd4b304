"""Compares engines on the same questions: time to the first token, further tokens, and memory.

Each engine runs in a process of its own, with documents of random words whose ids all engines share. Its own joined
prompt (mode "concat") is measured too, and for llama.cpp also the stock way: ``llama_cpp.Llama``, which reuses the
KVs of the longest common beginning of two prompts.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.calls import read_call
from ..engine.requests import Batch
from ..errors import InvalidInputError, KVFusionError
from ..generator import KVFusionGenerator
from ..llama_cpp.library import library
from ..model.location import locate_model
from ..schema import Document

ENGINES: dict[str, dict[str, Any]] = {
    "torch-float32": {"dtype": "float32"},
    "torch-bfloat16": {"dtype": "bfloat16"},
    "llama.cpp-f16": {"engine": "llama.cpp", "cache_type": "f16"},
    "llama.cpp-q8_0": {"engine": "llama.cpp", "cache_type": "q8_0"},
}
STOCK = "llama.cpp-stock"
WORDS = ("river", "mill", "lamp", "pier", "boat", "evening", "letter", "garden", "window", "stone", "bridge", "winter")


@dataclass(frozen=True, slots=True)
class EngineCase:
    """What is measured.

    Attributes:
        model, gguf_file: as ``from_pretrained`` takes them.
        documents, document_tokens: number of documents, and their tokens (within one word).
        answer_tokens: tokens of an answer, from 2.
        repeats: warm and shuffled questions.
        threads: torch's and llama.cpp's threads. Default: torch's own choice.
    """

    model: str | None
    gguf_file: str | None = None
    documents: int = 20
    document_tokens: int = 150
    answer_tokens: int = 32
    repeats: int = 5
    threads: int | None = None


def measure_engines(case: EngineCase, engines: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row of figures per engine.

    Raises:
        InvalidInputError: an engine is unknown.
        KVFusionError: an engine's process failed.
    """
    known = (*ENGINES, STOCK)
    if unknown := [name for name in engines if name not in known]:
        raise InvalidInputError(f"engine {unknown[0]!r} is unknown; the engines are {', '.join(known)}.")
    return [_in_process(case, name) for name in engines]


def _in_process(case: EngineCase, engine: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, json.dumps({"engine": engine, **asdict(case)})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KVFusionError(f"measuring {engine} failed with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


# In the process of one engine


def documents_of(case: EngineCase, count_tokens: Callable[[str], int]) -> list[Document]:
    """Return documents of random words with the given number of tokens, the same for every engine of a model."""
    rng = random.Random(0)
    found = []
    for _ in range(case.documents):
        words = [rng.choice(WORDS)]
        while count_tokens(" ".join(words)) < case.document_tokens:
            words.append(rng.choice(WORDS))
        found.append(Document(" ".join(words)))
    return found


def _measure(case: EngineCase, engine: str) -> dict[str, Any]:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    is_stock = engine == STOCK
    options = ENGINES["llama.cpp-f16" if is_stock else engine]
    generator = KVFusionGenerator.from_pretrained(
        case.model, gguf_file=case.gguf_file, adapter=None, store="memory", **options
    )
    documents = documents_of(case, generator.count_tokens)
    orders = [random.Random(number).sample(documents, len(documents)) for number in range(case.repeats)]
    ask = _stock(generator, case) if is_stock else _asking(generator, case, mode="fusion")
    row = {"engine": engine, "threads": torch.get_num_threads(), **_times(ask, documents, orders)}
    if not is_stock:
        joined = _times(_asking(generator, case, mode="concat"), documents, orders[:1])
        row["joined prompt"] = {name: joined[name] for name in ("cold", "shuffled")}
    row["peak MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return row


Ask = Callable[[Sequence[Document]], tuple[float, float]]


def _times(ask: Ask, documents: Sequence[Document], orders: Sequence[Sequence[Document]]) -> dict[str, Any]:
    """Return seconds to the first token, and tokens per second behind it."""
    cold, _ = ask(documents)
    warm = [ask(documents) for _ in orders]
    shuffled = [ask(order) for order in orders]
    speeds = [speed for _, speed in (*warm, *shuffled)]
    return {
        "cold": round(cold, 5),
        "warm": round(statistics.median(first for first, _ in warm), 5),
        "shuffled": round(statistics.median(first for first, _ in shuffled), 5),
        "tokens per second": round(statistics.median(speeds), 1),
    }


QUESTION = "Repeat the documents word for word."


def _asking(generator: KVFusionGenerator, case: EngineCase, *, mode: Any) -> Ask:
    """Return a function that lets the engine write all tokens of an answer, even if the model would end it."""
    engine, options = generator._engine, {"mode": mode, "focus": None, "max_new_tokens": case.answer_tokens}
    ends = sorted(engine.model.end_ids)

    def forbid_end(logits: torch.Tensor) -> None:
        logits[:, ends] = -torch.inf

    def ask(documents: Sequence[Document]) -> tuple[float, float]:
        began = time.perf_counter()
        call = read_call(engine, QUESTION, documents, options)
        run = engine.runner.start(Batch.of(engine.runner.prepare(call.requests[0], call.decoding)))
        times = [time.perf_counter() for _ in engine.runner.decode(run, call.decoding, on_logits=forbid_end)]
        return times[0] - began, (len(times) - 1) / (times[-1] - times[0])

    return ask


def _stock(generator: KVFusionGenerator, case: EngineCase) -> Ask:
    """Return a function that asks ``llama_cpp.Llama``, with the ids of the joined prompt."""
    file = locate_model(case.model, gguf_file=case.gguf_file, weights=False).gguf
    assert file is not None
    threads = torch.get_num_threads()
    cells = case.documents * (case.document_tokens + 16) + 512
    stock: Any = library().Llama(str(file), n_ctx=cells, n_threads=threads, n_threads_batch=threads, verbose=False)
    engine = generator._engine

    def ask(documents: Sequence[Document]) -> tuple[float, float]:
        ids = read_call(engine, QUESTION, documents, {"mode": "concat", "focus": None}).requests[0].question.ids
        began = time.perf_counter()
        tokens = stock.generate(list(ids), temp=0.0, top_k=1)
        next(tokens)
        first = time.perf_counter()
        for _ in range(case.answer_tokens - 1):
            next(tokens)
        return first - began, (case.answer_tokens - 1) / (time.perf_counter() - first)

    return ask


def main() -> None:
    """Measure the engine that the command line describes, and print its figures as one line of JSON."""
    given = json.loads(sys.argv[1])
    engine = given.pop("engine")
    print(json.dumps(_measure(EngineCase(**given), engine)))


if __name__ == "__main__":
    main()
