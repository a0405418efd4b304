"""``engine="auto"``: the faster engine for a GGUF file, by a short measurement at load."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..fusion.fused_cache import fuse
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.interface import FusionModel, Question
from ..fusion.load_options import LoadKwargs, load_torch_model
from ..fusion.sampling import DecodingOptions
from ..model.gguf.convert import storage_dtype
from ..model.gguf.header import read_header
from ..model.location import locate_model
from ..text.settings import ModelSettings
from .library import PACKAGE
from .loading import LLAMA_CPP_ONLY, TORCH_ONLY, load_llama_cpp_model

logger = logging.getLogger(__name__)

DOCUMENT_TOKENS, ANSWER_TOKENS, REPEATS = 128, 8, 3
MEMORY_SHARE = 0.5  # share of the main memory that dense weights may take


def load_faster_model(model: str | Path | None, options: LoadKwargs) -> tuple[FusionModel, ModelSettings]:
    """Load a model on the engine that needs less time for a document of 128 tokens and 8 tokens of an answer.

    Without measuring, it is torch for a model that has no GGUF file, without llama-cpp-python, or with options that
    only torch has; and llama.cpp with options that only it has, or if dense weights would take more than half of the
    main memory.

    Raises:
        KVFusionError: as ``load_torch_model`` and ``load_llama_cpp_model`` do.
    """
    given: dict[str, Any] = dict(options)
    engine, reason = _known_engine(model, given)
    if engine == "torch":
        logger.info("engine torch: %s", reason)
        return load_torch_model(model, options)
    on_llama_cpp = load_llama_cpp_model(model, options)
    if engine == "llama.cpp":
        logger.info("engine llama.cpp: %s", reason)
        return on_llama_cpp
    on_torch = load_torch_model(model, options)
    seconds = {name: _seconds(loaded) for name, (loaded, _) in (("torch", on_torch), ("llama.cpp", on_llama_cpp))}
    faster = min(seconds, key=lambda name: seconds[name])
    logger.info("engine %s: %s", faster, ", ".join(f"{name} takes {took:.2f} s" for name, took in seconds.items()))
    return on_torch if faster == "torch" else on_llama_cpp


def _known_engine(model: str | Path | None, given: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the engine that needs no measurement and the reason, or None."""
    if named := next((name for name in TORCH_ONLY if given.get(name) is not None), None):
        return "torch", f"{named} is given"
    if named := next((name for name in LLAMA_CPP_ONLY if given.get(name) is not None), None):
        return "llama.cpp", f"{named} is given"
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return "torch", f"{PACKAGE} is not installed"
    hub = {"gguf_file": given.get("gguf_file"), "revision": given.get("revision")}
    location = locate_model(model, weights=False, **hub)
    if location.gguf is None:
        return "torch", "the model has no GGUF file"
    header = read_header(location.gguf)
    needed, memory = header.parameters * storage_dtype(header).itemsize, _main_memory()
    if memory is not None and needed > MEMORY_SHARE * memory:
        return "llama.cpp", f"dense weights would take {needed / 1e9:.1f} of {memory / 1e9:.1f} GB of memory"
    return None, ""


def _main_memory() -> int | None:
    """Return the bytes of this machine's memory, or None on Windows, which does not report them in this way."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def _seconds(model: FusionModel) -> float:
    """Return the shortest time of one document and one answer."""
    ids = tuple(range(1, DOCUMENT_TOKENS + 1))  # any tokens take the same time
    times: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        kvs = [kv for _, kv in model.prefill([ids], None)]
        context = fuse([kvs], model.device)
        answer = GrowingAnswer(lambda tokens: "", limit=ANSWER_TOKENS)
        plan = model.plan(context, [0], tuned=False, ape=None)
        question, options = Question(ids[:8], DOCUMENT_TOKENS), DecodingOptions(ANSWER_TOKENS)
        for _ in model.decode(plan, context, [question], [answer], options):
            pass
        times.append(time.perf_counter() - began)
    return min(times)
