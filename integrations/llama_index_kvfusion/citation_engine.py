"""`KVFusionCitationQueryEngine`: numbered sources whose numbers stand beside the texts and not in them.

The stock engine writes "Source 2:" into the text of a chunk, so that the same chunk is another document at every rank
and its stored keys and values are never found again. Splitting into chunks stays LlamaIndex's.
"""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.indices.base import BaseIndex
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import NodeWithScore

from kvfusion_rag import InvalidInputError

from .llm import KVFusionLlamaIndexLLM
from .synthesizer import METADATA_KEY, KVFusionSynthesizer


class KVFusionCitationQueryEngine(CitationQueryEngine):
    """`CitationQueryEngine` that leaves texts as they are: source 1 is ``response.source_nodes[0]``, and so on.

    `source_numbers` tells which of them an answer stands in. Chunks of a node are named ``"<node id>:1"``,
    ``"<node id>:2"``; a node that is one chunk keeps its id.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: KVFusionLlamaIndexLLM | None = None,
        response_synthesizer: KVFusionSynthesizer | None = None,
        **options: Any,
    ) -> None:
        """An `llm` or a synthesizer of ours; `options` are the parent's (citation_chunk_size, text_splitter, ...)."""
        synthesizer = _own_synthesizer(llm, response_synthesizer)
        if options.get("multimodal"):
            raise InvalidInputError("multimodal is True, but the model reads text alone; leave it out.")
        super().__init__(retriever, llm=synthesizer.llm, response_synthesizer=synthesizer, **options)

    @classmethod
    def from_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        index: BaseIndex[Any],
        llm: KVFusionLlamaIndexLLM | None = None,
        response_synthesizer: KVFusionSynthesizer | None = None,
        *,
        streaming: bool = False,
        **options: Any,
    ) -> Self:
        """The parent's from_args. Raises InvalidInputError for its templates, which speak of numbers in the texts."""
        if templates := sorted(name for name in options if name.endswith("_template")):
            raise InvalidInputError(
                f"{templates[0]!r} is for sources with numbers in their texts, but here the texts have none; give "
                "response_synthesizer=KVFusionSynthesizer(llm, text_qa_template=...)."
            )
        synthesizer = _own_synthesizer(llm, response_synthesizer, streaming=streaming)
        made: Any = super().from_args(index, llm=synthesizer.llm, response_synthesizer=synthesizer, **options)
        return made

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return [chunk for node in nodes for chunk in self._chunks(node)]

    def _chunks(self, node: NodeWithScore) -> list[NodeWithScore]:
        """The parent's chunks of one node, without the numbers in their texts, and with ids that last."""
        chunks = super()._create_citation_nodes([node])
        for number, chunk in enumerate(chunks, start=1):
            numbered: Any = chunk.node  # the parent makes text nodes
            numbered.set_content(numbered.text.removeprefix(f"Source {number}:\n").removesuffix("\n"))
            numbered.id_ = node.node.node_id if len(chunks) == 1 else f"{node.node.node_id}:{number}"
        return chunks


def source_numbers(response: RESPONSE_TYPE) -> list[int]:
    """Numbers of the sources in which the answer stands: ``f"{response} {source_numbers(response)}"``.

    Source n is ``response.source_nodes[n - 1]``. In streams this is known after the last piece. An answer in the
    model's own words stands in no source.
    """
    record = (response.metadata or {}).get(METADATA_KEY, {})
    cited = {citation["document_id"] for citation in record.get("citations", [])}
    return [number for number, source in enumerate(record.get("sources", []), start=1) if source["id"] in cited]


def _own_synthesizer(
    llm: KVFusionLlamaIndexLLM | None, given: KVFusionSynthesizer | None, **options: Any
) -> KVFusionSynthesizer:
    if given is None:
        return KVFusionSynthesizer(llm, **options)  # pyright: ignore[reportArgumentType] - which refuses None
    if not isinstance(given, KVFusionSynthesizer):
        raise InvalidInputError(
            f"response_synthesizer is a {type(given).__name__}; it must be a KVFusionSynthesizer, because others join "
            "all sources into one text."
        )
    return given
