"""Work done before a question is asked: nodes are prefilled at ingestion, and loaded while a reranker runs.

Both read nodes as the synthesizer does, because a document is found again only by the same tokens behind the same
prefix. The generator computes and stores documents.
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
    """Computes the keys and values of nodes and keeps them in the generator's store; the nodes come out unchanged.

    ``IngestionPipeline(transformations=[SentenceSplitter(), KVFusionPrefill(llm), embedding])``. Put it behind every
    step that changes texts or metadata. A pipeline's cache skips it for nodes that this model has prefilled into this
    store before, in the same wording. What the store has dropped since then is computed by the first question that
    needs it. It does not run with ``num_workers``, because each process would load the model; documents are batched
    already.

    Prefilled documents are for modes "fusion" and "ape". Mode "concat" computes its joined prompt anew.
    """

    metadata_mode: MetadataMode = Field(description="The synthesizer's.")
    prefilled: dict[str, Any] = Field(description="Model, wording and store, which a pipeline's cache tells apart.")

    _synthesizer: KVFusionSynthesizer = PrivateAttr()

    def __init__(
        self,
        llm: KVFusionLlamaIndexLLM,
        *,
        synthesizer: KVFusionSynthesizer | None = None,
        metadata_mode: MetadataMode | None = None,
    ) -> None:
        """An `llm` whose generator has a store.

        synthesizer: the one that answers from these nodes; a chat engine has one in its attribute `synthesizer`. The
            fixed text of its template in front of the documents is part of what is stored. The default is
            ``KVFusionSynthesizer(llm)``.
        metadata_mode: the synthesizer's, if none is given here.

        Raises InvalidInputError for another LLM, for a generator that was made with store=None, and for a synthesizer
        of another LLM.
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
        """The same in a worker thread, while the event loop stays free."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __getstate__(self) -> NoReturn:
        raise InvalidInputError(
            "KVFusionPrefill cannot go to another process, which would need a model of its own; run the pipeline "
            "without num_workers, or prefill what it returns: KVFusionPrefill(llm)(nodes)."
        )


class KVFusionPrefetch(BaseNodePostprocessor):
    """Begins to load the retrieved nodes that are stored, and returns all nodes at once.

    ``node_postprocessors=[KVFusionPrefetch(llm), reranker]``: files are read while the reranker chooses. Nodes that
    are not stored are not computed.
    """

    metadata_mode: MetadataMode = Field(description="The synthesizer's.")

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


def _synthesizer_of(
    llm: KVFusionLlamaIndexLLM, given: KVFusionSynthesizer | None, metadata_mode: MetadataMode | None
) -> KVFusionSynthesizer:
    if given is None:
        return KVFusionSynthesizer(llm, metadata_mode=metadata_mode)
    if given.llm.generator is not llm.generator:
        raise InvalidInputError("the synthesizer has another generator than the LLM, so it would not find the nodes.")
    if metadata_mode is not None:
        raise InvalidInputError("metadata_mode is the synthesizer's if a synthesizer is given; leave it out.")
    return given


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as JSON data."""
    prompt: str | list[Message] | None = arguments["prompt"]
    return {**arguments, "prompt": [asdict(message) for message in prompt] if isinstance(prompt, list) else prompt}


def _place(store: DocumentStore) -> str:
    """A name of what keeps documents. Memory alone ends with its process, so no other one may count on it."""
    return uuid.uuid4().hex if store.disk is None else str(store.disk.path.resolve())
