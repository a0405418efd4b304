"""Prefills nodes at ingestion, and loads stored nodes while a reranker runs.

Both convert nodes as the synthesizer does, because a stored document is found only by equal tokens and prefix.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle, TransformComponent

from kvfusion_rag import InvalidInputError, Message, OverloadError

from .llm import KVFusionLlamaIndexLLM
from .synthesizer import KVFusionSynthesizer, require_own_llm

if TYPE_CHECKING:
    from kvfusion_rag import DocumentStore

logger = logging.getLogger(__name__)


class KVFusionPrefill(TransformComponent):
    """Computes the KV of nodes and keeps it in the generator's store. The nodes are returned unchanged.

    ``IngestionPipeline(transformations=[SentenceSplitter(), KVFusionPrefill(llm), embedding])``. Add it after every
    step that changes texts or metadata. A pipeline's cache skips nodes that were prefilled by the same model with the
    same prompt into the same store. If the store has evicted a document since then, the first question that needs it
    computes it. Do not use ``num_workers``, because each process would load the model.

    Modes "fusion" and "ape" use prefilled documents. Mode "concat" computes its joined prompt again.
    """

    metadata_mode: MetadataMode = Field(description="The metadata mode of the synthesizer.")
    prefilled: dict[str, Any] = Field(description="Model, prompt and store, which are part of a pipeline's cache key.")

    _synthesizer: KVFusionSynthesizer = PrivateAttr()

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        *,
        synthesizer: KVFusionSynthesizer | None = None,
        metadata_mode: MetadataMode | None = None,
    ) -> None:
        """Takes an `llm` whose generator has a store.

        synthesizer: the synthesizer that will answer from the nodes, such as the attribute `synthesizer` of a chat
            engine. The text before the documents in its template affects their KV. The default is
            ``KVFusionSynthesizer(llm)``.
        metadata_mode: the metadata mode of the default synthesizer.

        Raises InvalidInputError for another LLM, for a generator with store=None, and for a synthesizer of another
        LLM.
        """
        store = _require_store(llm, type(self).__name__)
        synthesizer = _synthesizer_of(llm, synthesizer, metadata_mode)
        prefilled = {
            **llm.generator.identity(),
            **_plain(synthesizer.prefill_arguments()),
            "store": _place(store),
            "namespace": llm.generator.namespace,
        }
        super().__init__(metadata_mode=synthesizer.metadata_mode, prefilled=prefilled)  # pyright: ignore[reportCallIssue]
        self._synthesizer = synthesizer

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionPrefill"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Prefill `nodes` and return them."""
        synthesizer = self._synthesizer
        synthesizer.llm.generator.prefill(synthesizer.to_documents(nodes), **synthesizer.prefill_arguments())
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Like a call, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __getstate__(self) -> NoReturn:
        raise InvalidInputError(
            "KVFusionPrefill cannot be sent to another process, which would have to load the model again; run the "
            "pipeline without num_workers, or prefill its result with KVFusionPrefill(llm)(nodes)."
        )


class KVFusionPrefetch(BaseNodePostprocessor):
    """Starts to load retrieved nodes from the store, and returns all nodes immediately.

    ``node_postprocessors=[KVFusionPrefetch(llm), reranker]`` loads files while the reranker runs. Nodes that are not
    stored are not computed.
    """

    metadata_mode: MetadataMode = Field(description="The metadata mode of the synthesizer.")

    _synthesizer: KVFusionSynthesizer = PrivateAttr()

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        *,
        synthesizer: KVFusionSynthesizer | None = None,
        metadata_mode: MetadataMode | None = None,
    ) -> None:
        """Arguments and errors are those of `KVFusionPrefill`."""
        _require_store(llm, type(self).__name__)
        synthesizer = _synthesizer_of(llm, synthesizer, metadata_mode)
        super().__init__(metadata_mode=synthesizer.metadata_mode)  # pyright: ignore[reportCallIssue]
        self._synthesizer = synthesizer

    @classmethod
    def class_name(cls) -> str:
        return "KVFusionPrefetch"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        synthesizer = self._synthesizer
        try:
            synthesizer.llm.generator.prefetch(synthesizer.to_documents(nodes), **synthesizer.prefill_arguments())
        except OverloadError as error:  # prefetching is optional, so it must not fail a query
            logger.info("nodes were not prefetched: %s", error)
        return nodes

    def __getstate__(self) -> NoReturn:
        raise InvalidInputError(
            "KVFusionPrefetch cannot be sent to another process, which would have to load the model again; create "
            "one in each process."
        )


def _require_store(llm: KVFusionLlamaIndexLLM, user: str) -> DocumentStore:
    require_own_llm(llm, user)
    store = llm.generator.store
    if store is None:
        raise InvalidInputError(
            f"{user} needs the generator's store, but this generator was created with store=None; give it a store."
        )
    return store


def _synthesizer_of(
    llm: KVFusionLlamaIndexLLM, given: KVFusionSynthesizer | None, metadata_mode: MetadataMode | None
) -> KVFusionSynthesizer:
    if given is None:
        return KVFusionSynthesizer(llm, metadata_mode=metadata_mode)
    if given.llm.generator is not llm.generator:
        raise InvalidInputError(
            "the synthesizer must have the LLM's generator, because otherwise the prefilled nodes are not found."
        )
    if metadata_mode is not None:
        raise InvalidInputError("metadata_mode and synthesizer are both given; set the mode of the synthesizer only.")
    return given


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as JSON data."""
    prompt: str | list[Message] | None = arguments["prompt"]
    return {**arguments, "prompt": [asdict(message) for message in prompt] if isinstance(prompt, list) else prompt}


def _place(store: DocumentStore) -> str:
    """Return a name of the store. A store in memory is private to its process, so its name is random."""
    return uuid.uuid4().hex if store.disk is None else str(store.disk.path.resolve())
