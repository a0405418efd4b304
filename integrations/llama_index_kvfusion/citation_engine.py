"""`KVFusionCitationQueryEngine`: numbered sources without numbers in their texts.

LlamaIndex's engine writes "Source 2:" into the text of a chunk. The same chunk then has another text at each rank, and
its stored KV is not found.
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
    """A `CitationQueryEngine` that does not change texts. Source 1 is ``response.source_nodes[0]``, and so on.

    `source_numbers` returns the sources that contain the answer. Chunks of a node have the ids ``"<node id>:1"``,
    ``"<node id>:2"``. A node that is a single chunk keeps its id.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: KVFusionLlamaIndexLLM | None = None,
        response_synthesizer: KVFusionSynthesizer | None = None,
        **options: Any,
    ) -> None:
        """Takes a KVFusionLlamaIndexLLM or a KVFusionSynthesizer, and the parent's options, such as text_splitter."""
        synthesizer = _own_synthesizer(llm, response_synthesizer)
        if options.get("multimodal"):
            raise InvalidInputError("multimodal is True, but it must be False, because the model reads only text.")
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
        """Call the parent's from_args. Raises InvalidInputError for its templates, which expect numbers in texts."""
        if templates := sorted(name for name in options if name.endswith("_template")):
            raise InvalidInputError(
                f"{templates[0]!r} expects numbers in the sources' texts, but here they have none; pass "
                "response_synthesizer=KVFusionSynthesizer(llm, text_qa_template=...)."
            )
        synthesizer = _own_synthesizer(llm, response_synthesizer, streaming=streaming)
        engine: Any = super().from_args(index, llm=synthesizer.llm, response_synthesizer=synthesizer, **options)
        return engine

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        return [chunk for node in nodes for chunk in self._chunks(node)]

    def _chunks(self, node: NodeWithScore) -> list[NodeWithScore]:
        """Return the parent's chunks of one node, without numbers in their texts and with stable ids."""
        chunks = super()._create_citation_nodes([node])
        for number, chunk in enumerate(chunks, start=1):
            numbered: Any = chunk.node  # the parent creates text nodes
            numbered.set_content(numbered.text.removeprefix(f"Source {number}:\n").removesuffix("\n"))
            numbered.id_ = node.node.node_id if len(chunks) == 1 else f"{node.node.node_id}:{number}"
        return chunks


def source_numbers(response: RESPONSE_TYPE) -> list[int]:
    """Return the numbers of the sources that contain the answer: ``f"{response} {source_numbers(response)}"``.

    Source n is ``response.source_nodes[n - 1]``. In streams, call it after the last piece. The list is empty for an
    answer in the model's own words.
    """
    record = (response.metadata or {}).get(METADATA_KEY, {})
    cited = {citation["document_id"] for citation in record.get("citations", [])}
    return [number for number, source in enumerate(record.get("sources", []), start=1) if source["id"] in cited]


def _own_synthesizer(
    llm: KVFusionLlamaIndexLLM | None, given: KVFusionSynthesizer | None, **options: Any
) -> KVFusionSynthesizer:
    if given is None:
        return KVFusionSynthesizer(llm, **options)  # pyright: ignore[reportArgumentType] - it rejects None
    if not isinstance(given, KVFusionSynthesizer):
        raise InvalidInputError(
            f"response_synthesizer is a {type(given).__name__}, but it must be a KVFusionSynthesizer, because others "
            "join all sources into one text."
        )
    return given
