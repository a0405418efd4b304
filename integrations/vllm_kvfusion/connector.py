"""The connector that vLLM makes twice: once beside its scheduler, and once in each of its workers.

A request with fused documents waits until its documents are in vLLM's blocks, while other requests continue. If a
document is missing, or the request is malformed, only that request fails.

vLLM does not ask connectors about requests with ``prompt_logprobs``, so those read documents as ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger

from kvfusion_rag import FusedPrompt, InvalidInputError, UnsupportedModelError, require_supported_vllm

from .loader import Load, Loader

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")  # vLLM prints only its own loggers


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler asks of the workers in one step."""

    loads: list[Load] = field(default_factory=list)


class KVFusionConnector(KVConnectorBase_V1):
    """Loads fused documents, and saves nothing.

    ``kv_connector_extra_config`` contains the options of ``kvfusion_rag.FusedReader``.

    Raises:
        MissingDependencyError: this version of vLLM is not supported.
        UnsupportedModelError: the keys of this model cannot be moved, or vLLM divides its cache into groups.
        StoreError: the store cannot be opened.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        require_supported_vllm(vllm.__version__)
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedModelError(
                f"vLLM keeps the layers of this model in {len(groups)} groups, but fusion needs layers of one kind."
            )
        self._block_size = groups[0].kv_cache_spec.block_size
        self._prompts: dict[str, FusedPrompt | None] = {}  # None means a malformed request
        self._loads: list[Load] = []
        self._loader = Loader(vllm_config, self._block_size) if role == KVConnectorRole.WORKER else None

    # In the scheduler's process

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens of documents are left to load, and that the request waits for them.

        At least one token of a malformed request is said to be loaded, so that it fails like a missing document.
        """
        try:
            prompt = FusedPrompt.read(
                request.kv_transfer_params, salt=request.cache_salt, prompt_tokens=request.num_prompt_tokens
            )
        except InvalidInputError as error:
            logger.error("request %s: %s", request.request_id, error)
            self._prompts[request.request_id] = None
            return request.num_tokens - num_computed_tokens, True
        if prompt is None or num_computed_tokens >= prompt.tokens:
            return 0, False
        self._prompts[request.request_id] = prompt
        return prompt.tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note which blocks the documents get."""
        if num_external_tokens == 0:  # the second call of a request, when its documents are loaded
            return
        name = request.request_id
        prompt = self._prompts.pop(name)
        if prompt is None:
            self._loads.append(Load(name, None, [], [], 0))
            return
        ids = list(request.prompt_token_ids or ())[: prompt.tokens]
        self._loads.append(Load(name, prompt, ids, blocks.get_block_ids()[0], prompt.tokens - num_external_tokens))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        """Return the loads that were decided on since the last step."""
        loads, self._loads = self._loads, []
        return Loads(loads)

    # In the workers

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin to load the documents of this step's requests in other threads."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads) and self._loader is not None
        for load in metadata.loads:
            self._loader.start(load, forward_context.no_compile_layers)

    def get_transfer_results(self, finished_req_ids: Iterable[str]) -> KVConnectorTransferResults:
        """Return the requests whose loads have ended, and those of them that failed."""
        assert self._loader is not None
        ended, failed = self._loader.take_ended()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def shutdown(self) -> None:
        """Wait for unfinished loads."""
        if self._loader is not None:
            self._loader.close()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: requests are not computed before all their layers are loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: documents are prefilled elsewhere."""

    def wait_for_save(self) -> None:
        """Do nothing, like :meth:`save_kv_layer`."""
