"""Work done before a question is asked: nodes prefilled at ingestion, stored ones loaded while a reranker runs.

Both render nodes as the synthesizer will, since a document is found again by exactly what the model read of it.
How documents are computed and kept is the generator's business.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle, TransformComponent

from kvfusion_rag import InvalidInputError, OverloadError

from .documents import to_documents
from .llm import KVFusionLlamaIndexLLM
from .synthesizer import require_own_llm

if TYPE_CHECKING:
    from kvfusion_rag import DocumentStore, KVFusionGenerator

logger = logging.getLogger(__name__)


class KVFusionPrefill(TransformComponent):
    """Computes the keys and values of nodes and keeps them in the generator's store; the nodes come out unchanged.

    ``IngestionPipeline(transformations=[SentenceSplitter(), KVFusionPrefill(llm), embedding])``. It stands behind
    every step that changes texts or titles, and takes the `metadata_mode` of the synthesizer. A pipeline's cache
    skips it for nodes that this model has prefilled into this store before; what the store has dropped since then
    is computed by the first question that needs it. It does not run with ``num_workers``, since each process would
    load the model: documents are batched already.
    """

    metadata_mode: MetadataMode = Field(default=MetadataMode.NONE, description="As the synthesizer's.")
    prefilled: dict[str, Any] = Field(description="Model and store, which a pipeline's cache has to tell apart.")

    _generator: KVFusionGenerator = PrivateAttr()

    def __init__(self, llm: KVFusionLlamaIndexLLM, *, metadata_mode: MetadataMode = MetadataMode.NONE) -> None:
        """Raises InvalidInputError for another LLM, or a generator that was made with store=None."""
        store = _require_store(llm, type(self).__name__)
        prefilled = {**llm.generator.identity(), "store": _place(store), "namespace": llm.generator.namespace}
        super().__init__(metadata_mode=metadata_mode, prefilled=prefilled)  # pyright: ignore[reportCallIssue]
        self._generator = llm.generator

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionPrefill"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Prefill `nodes` and return them."""
        self._generator.prefill(to_documents(nodes, self.metadata_mode))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in a worker thread, while the event loop stays free."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __getstate__(self) -> NoReturn:
        raise InvalidInputError(
            "KVFusionPrefill cannot go to another process, which would need a model of its own; run the pipeline "
            "without num_workers, or prefill what it returns: KVFusionPrefill(llm)(nodes)."
        )


class KVFusionPrefetch(BaseNodePostprocessor):
    """Begins to load what the store has of the retrieved nodes, and hands them on at once.

    ``node_postprocessors=[KVFusionPrefetch(llm), reranker]``: files are read while the reranker chooses. Nothing is
    computed for nodes that the store has not.
    """

    metadata_mode: MetadataMode = Field(default=MetadataMode.NONE, description="As the synthesizer's.")

    _generator: KVFusionGenerator = PrivateAttr()

    def __init__(self, llm: KVFusionLlamaIndexLLM, *, metadata_mode: MetadataMode = MetadataMode.NONE) -> None:
        """Raises InvalidInputError for another LLM, or a generator that was made with store=None."""
        _require_store(llm, type(self).__name__)
        super().__init__(metadata_mode=metadata_mode)  # pyright: ignore[reportCallIssue]
        self._generator = llm.generator

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionPrefetch"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        try:
            self._generator.prefetch(to_documents(nodes, self.metadata_mode))
        except OverloadError as error:  # loading early is a help, never a reason to fail a query
            logger.info("not loaded ahead: %s", error)
        return nodes


def _require_store(llm: KVFusionLlamaIndexLLM, user: str) -> DocumentStore:
    require_own_llm(llm, user)
    store = llm.generator.store
    if store is None:
        raise InvalidInputError(
            f"{user} works on the generator's store, but this generator was made with store=None; give it one."
        )
    return store


def _place(store: DocumentStore) -> str:
    """A name of what keeps documents. Memory alone ends with its process, so no other one may count on it."""
    return uuid.uuid4().hex if store.disk is None else str(store.disk.path.resolve())
