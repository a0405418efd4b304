"""Writes documents into the blocks of a vLLM worker, in threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from kvfusion_rag import FusedPrompt, FusedReader, StoreError, own_heads

logger = init_logger(f"vllm.{__name__}")  # vLLM prints only its own loggers

Cache = tuple[int, Any]  # number and module of a layer

THREADS = 4  # requests whose documents are read at once


@dataclass(frozen=True)
class Load:
    """The documents of one request, and where they belong.

    Attributes:
        prompt: the documents, or None if the request is malformed and has to fail.
        token_ids: ids of all documents.
        blocks: vLLM's blocks of the request, in order.
        skip: tokens at the beginning that are in their blocks already.
    """

    request_id: str
    prompt: FusedPrompt | None
    token_ids: list[int]
    blocks: list[int]
    skip: int


class Loader:
    """Loads documents for one worker.

    Args:
        block_size: tokens of a block.

    Raises:
        UnsupportedModelError: the keys of this model cannot be moved.
        StoreError: the store cannot be opened.
    """

    def __init__(self, vllm_config: VllmConfig, block_size: int) -> None:
        assert vllm_config.kv_transfer_config is not None
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._reader = FusedReader(options, vllm_config.model_config.hf_text_config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self._heads = own_heads(options["heads"], ranks, get_tensor_model_parallel_rank())
        self._block_size, self._dtype = block_size, vllm_config.model_config.dtype
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kvfusion-load")
        self._lock = threading.Lock()  # guards the two sets
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    def start(self, load: Load, layers: Mapping[str, Any]) -> None:
        """Begin to load. ``layers`` are the worker's modules by name, of which those with attention have a cache."""
        caches = list(_caches(layers))
        self._pool.submit(self._run, load, caches, _now(caches[0][1].kv_cache.device))

    def take_ended(self) -> tuple[set[str], set[str]]:
        """Return the requests whose loads have ended since the last call, and those of them that failed."""
        with self._lock:
            ended, self._ended = self._ended, set()
            failed, self._failed = self._failed, set()
        return ended, failed

    def close(self) -> None:
        """Wait for loads that have begun, and drop the others."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, load: Load, caches: Sequence[Cache], before: torch.Event | None) -> None:
        failed = True
        try:
            if load.prompt is not None:
                self._write(load.prompt, load, caches, before)
                failed = False
        except StoreError as error:
            logger.error("request %s: %s", load.request_id, error)
        except Exception:  # whatever it is, the request must end, and vLLM must continue
            logger.exception("cannot load the documents of request %s", load.request_id)
        with self._lock:
            self._ended.add(load.request_id)
            if failed:
                self._failed.add(load.request_id)

    @torch.inference_mode()
    def _write(self, prompt: FusedPrompt, load: Load, caches: Sequence[Cache], before: torch.Event | None) -> None:
        keys, values = self._reader.read(prompt, load.token_ids, skip=load.skip)  # (L, H_kv, T, d), (L, H_kv, T, d_v)
        at = torch.arange(load.skip, prompt.tokens)
        slots = torch.tensor(load.blocks)[at // self._block_size] * self._block_size + at % self._block_size
        device = caches[0][1].kv_cache.device
        stream = None if before is None else torch.Stream(device)
        with stream or nullcontext():
            if stream is not None and before is not None:
                stream.wait_event(before)
            slots = slots.to(device)
            for number, layer in caches:
                ours = (part[number, self._heads].transpose(0, 1) for part in (keys, values))
                rows = (part.to(device, self._dtype).contiguous() for part in ours)  # (T, H_kv, d), (T, H_kv, d_v)
                layer.impl.do_kv_cache_update(layer, *rows, layer.kv_cache, slots)
            if stream is not None:
                stream.synchronize()


def _now(device: torch.device) -> torch.Event | None:
    """Return an event after everything that an accelerator was asked to compute, since blocks may still be in use."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()


def _caches(layers: Mapping[str, Any]) -> Iterator[Cache]:
    """Yield number and module of the layers whose keys and values vLLM keeps in blocks."""
    for name, layer in layers.items():
        if getattr(layer, "kv_cache", None) is not None:
            yield extract_layer_index(name), layer
