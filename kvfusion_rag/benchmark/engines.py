"""Compares engines on the same questions: first token, further tokens, memory, and answers after a shuffle.

Each engine runs in a process of its own, with documents of random words whose ids all engines share. Its joined
prompt (mode "concat") is measured too, which vLLM reads with its prefix cache. Stock llama.cpp is ``llama_cpp.Llama``,
which reuses the KVs of the longest common beginning of two prompts.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from ..engine.calls import read_call
from ..engine.requests import Batch, Request
from ..errors import InvalidInputError, KVFusionError, MissingDependencyError
from ..fusion.sampling import DecodingOptions
from ..generator import KVFusionGenerator
from ..llama_cpp.library import library
from ..model.location import locate_model
from ..schema import Document

ENGINES: dict[str, dict[str, Any]] = {
    "torch-float32": {"dtype": "float32"},
    "torch-bfloat16": {"dtype": "bfloat16"},
    "torch-int8": {"dtype": "float32"},  # weights of 8 bits, computed with in float32
    "llama.cpp-f16": {"engine": "llama.cpp", "cache_type": "f16"},
    "llama.cpp-q8_0": {"engine": "llama.cpp", "cache_type": "q8_0"},
    "llama.cpp-stock": {"engine": "llama.cpp", "cache_type": "f16"},
    "vllm": {"engine": "vllm"},
}
PACKAGES = {
    "torch-int8": "torchao",
    "vllm": "vllm",
    **{name: "llama_cpp" for name in ENGINES if name.startswith("llama.cpp")},
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


def installed_engines() -> list[str]:
    """Return the engines whose packages are installed."""
    return [name for name in ENGINES if not _is_missing(name)]


def measure_engines(case: EngineCase, engines: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row of figures per engine.

    Raises:
        InvalidInputError: an engine is unknown.
        MissingDependencyError: the package of an engine is not installed.
        KVFusionError: an engine's process failed.
    """
    if unknown := [name for name in engines if name not in ENGINES]:
        raise InvalidInputError(f"engine {unknown[0]!r} is unknown; the engines are {', '.join(ENGINES)}.")
    if missing := [name for name in engines if _is_missing(name)]:
        raise MissingDependencyError(
            f"engine {missing[0]!r} needs {PACKAGES[missing[0]]}, which is not installed; installed are "
            f"{', '.join(installed_engines())}."
        )
    return [_in_process(case, name) for name in engines]


def _is_missing(engine: str) -> bool:
    return engine in PACKAGES and find_spec(PACKAGES[engine]) is None


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
    generator = KVFusionGenerator.from_pretrained(
        case.model, gguf_file=case.gguf_file, adapter=None, store="memory", **ENGINES[engine], **_quantised(engine)
    )
    documents = documents_of(case, generator.count_tokens)
    orders = [random.Random(number).sample(documents, len(documents)) for number in range(case.repeats)]
    is_stock = engine == STOCK
    ask = _stock(generator, case) if is_stock else _asking(generator, case, engine, mode="fusion")
    row = {"engine": engine, "threads": torch.get_num_threads(), **_times(ask, documents, orders)}
    if not is_stock:
        row["joined prompt"] = _times(_asking(generator, case, engine, mode="concat"), documents, orders[:1])
    row["peak MiB"] = _peak_memory(generator) // 1024
    return row


def _quantised(engine: str) -> dict[str, Any]:
    """Return the options that load weights of 8 bits, for the engine that has them."""
    if engine != "torch-int8":
        return {}
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"model_kwargs": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}}


def _peak_memory(generator: KVFusionGenerator) -> int:
    """Return the peak memory of this process in KiB, plus that of vLLM's largest process. Ends vLLM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runner: Any = generator._engine.runner
    if (server := vars(runner).get("server")) is None:
        return peak
    server.close()
    return peak + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


@dataclass(frozen=True, slots=True)
class Asked:
    """The times and tokens of one question.

    Attributes:
        first: seconds to the first token.
        speed: tokens per second after it.
        tokens: ids of the answer.
    """

    first: float
    speed: float
    tokens: tuple[int, ...]


Ask = Callable[[str, Sequence[Document]], Asked]


def _times(ask: Ask, documents: Sequence[Document], orders: Sequence[Sequence[Document]]) -> dict[str, Any]:
    """Return seconds to the first token, tokens per second then, and how many answers stay the same after a shuffle.

    No question is asked twice over the same order, since engines may reuse what they have read of it.
    """
    cold = ask(_question(0), documents)
    warm = [ask(_question(number + 1), documents) for number in range(len(orders))]
    shuffled = [ask(_question(number + 1), order) for number, order in enumerate(orders)]
    return {
        "cold": round(cold.first, 5),
        "warm": round(statistics.median(one.first for one in warm), 5),
        "shuffled": round(statistics.median(one.first for one in shuffled), 5),
        "tokens per second": round(statistics.median(one.speed for one in (*warm, *shuffled)), 1),
        "same answers after a shuffle": sum(a.tokens == b.tokens for a, b in zip(warm, shuffled, strict=True)),
        "questions": len(orders),
    }


def _question(number: int) -> str:
    return f"What do the documents say about the {WORDS[number % len(WORDS)]}? Answer in {number + 20} words."


def _asking(generator: KVFusionGenerator, case: EngineCase, engine: str, *, mode: Any) -> Ask:
    """Return a function that lets the engine write all tokens of an answer, even if the model would end it."""
    inner = generator._engine
    runner: Any = inner.runner
    options = {"mode": mode, "focus": None, "max_new_tokens": case.answer_tokens, "max_reasoning_tokens": 0}
    ends = sorted(inner.model.end_ids)

    def forbid_end(logits: torch.Tensor) -> None:
        logits[:, ends] = -torch.inf

    def tokens_of(request: Request, decoding: DecodingOptions) -> Iterator[int]:
        if engine == "vllm":
            runner.begin(Batch.of(request))
            asked = replace(runner.token_request(request, (), decoding), max_tokens=case.answer_tokens, end_ids=())
            yield from (token.id for token in runner.server.tokens(asked))
            return
        run = runner.start(Batch.of(request))
        for _ in runner.decode(run, decoding, on_logits=forbid_end):
            yield run.answers[0].ids[-1]

    def ask(question: str, documents: Sequence[Document]) -> Asked:
        began = time.perf_counter()
        call = read_call(inner, question, documents, options)
        return _timed(began, tokens_of(runner.prepare(call.requests[0], call.decoding), call.decoding))

    return ask


def _timed(began: float, tokens: Iterable[int]) -> Asked:
    """Take all tokens of one answer, and return how long they took."""
    ids, times = zip(*((token, time.perf_counter()) for token in tokens), strict=True)
    return Asked(times[0] - began, (len(times) - 1) / (times[-1] - times[0]), ids)


def _stock(generator: KVFusionGenerator, case: EngineCase) -> Ask:
    """Return a function that asks ``llama_cpp.Llama``, with the ids of the joined prompt."""
    file = locate_model(case.model, gguf_file=case.gguf_file, weights=False).gguf
    assert file is not None
    threads = torch.get_num_threads()
    cells = case.documents * (case.document_tokens + 16) + 512
    stock: Any = library().Llama(str(file), n_ctx=cells, n_threads=threads, n_threads_batch=threads, verbose=False)
    engine = generator._engine

    def ask(question: str, documents: Sequence[Document]) -> Asked:
        ids = read_call(engine, question, documents, {"mode": "concat", "focus": None}).requests[0].question.ids
        began = time.perf_counter()
        tokens = stock.generate(list(ids), temp=0.0, top_k=1)
        written = [next(tokens)]
        first = time.perf_counter()
        written += [next(tokens) for _ in range(case.answer_tokens - 1)]
        return Asked(first - began, (case.answer_tokens - 1) / (time.perf_counter() - first), tuple(written))

    return ask


def main() -> None:
    """Measure the engine that the command line describes, and print its figures as one line of JSON."""
    given = json.loads(sys.argv[1])
    engine = given.pop("engine")
    print(json.dumps(_measure(EngineCase(**given), engine)))


if __name__ == "__main__":
    main()
