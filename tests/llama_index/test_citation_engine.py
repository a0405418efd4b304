"""Numbered sources with unchanged texts, compared with LlamaIndex's citation engine."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import RecordingGenerator
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_helpers import FixedRetriever
from tiny import generator as tiny_generator

from kvfusion_rag import InvalidInputError
from llama_index_kvfusion import (
    KVFusionCitationQueryEngine,
    KVFusionLlamaIndexLLM,
    KVFusionSynthesizer,
    source_numbers,
)

pytestmark = pytest.mark.usefixtures("no_default_llm")

QUESTION = "Where was it?"
LONG = "It rained all day. Nobody was on the road. It was in Lima. The miller counted his sacks of flour."


def nodes() -> list[NodeWithScore]:
    short = TextNode(text="Nobody knows.", id_="short", metadata={"title": "Peru"})
    return [NodeWithScore(node=short, score=0.9), NodeWithScore(node=TextNode(text=LONG, id_="long"), score=0.5)]


def split(**options: Any) -> dict[str, Any]:
    return {"citation_chunk_size": 12, "citation_chunk_overlap": 0, **options}


@pytest.mark.parametrize("way", ["sync", "async", "stream", "async stream"])
async def test_chunks_have_no_numbers_in_their_texts(way: str) -> None:
    generator = RecordingGenerator()
    synthesizer = KVFusionSynthesizer(KVFusionLlamaIndexLLM(generator), streaming="stream" in way)
    engine = KVFusionCitationQueryEngine(FixedRetriever(nodes()), response_synthesizer=synthesizer, **split())
    response = engine.query(QUESTION) if way in ("sync", "stream") else await engine.aquery(QUESTION)
    if way == "async stream":
        assert "".join([piece async for piece in response.response_gen]) == "in lima"
    elif way == "stream":
        assert "".join(response.response_gen) == "in lima"
    call = generator.calls[0]
    assert (call.ids[0], call.documents[0].title) == ("short", "Peru")
    assert call.ids[1:] == [f"long:{number}" for number in range(1, len(call.ids))]
    assert len(call.ids) > 2
    assert " ".join(call.texts[1:]) == LONG
    (number,) = source_numbers(response)
    assert "in Lima" in response.source_nodes[number - 1].node.get_content()


def test_chunks_equal_those_of_the_parent() -> None:
    texts = []
    for kind in (CitationQueryEngine, KVFusionCitationQueryEngine):
        generator = RecordingGenerator()
        synthesizer = KVFusionSynthesizer(KVFusionLlamaIndexLLM(generator))
        engine = kind(FixedRetriever(nodes()), llm=synthesizer.llm, response_synthesizer=synthesizer, **split())
        engine.query(QUESTION)
        texts.append(generator.calls[0].texts)
    stock, ours = texts
    assert stock == [f"Source {number}:\n{text}\n" for number, text in enumerate(ours, start=1)]


def test_chunk_at_another_rank_is_found_in_the_store() -> None:
    origins = {}
    for kind in (CitationQueryEngine, KVFusionCitationQueryEngine):
        synthesizer = KVFusionSynthesizer(KVFusionLlamaIndexLLM(tiny_generator(), max_new_tokens=1))
        for order in (nodes(), nodes()[::-1]):
            engine = kind(FixedRetriever(order), llm=synthesizer.llm, response_synthesizer=synthesizer, **split())
            record = engine.query(QUESTION).metadata["kvfusion"]
        origins[kind] = {source["origin"] for source in record["sources"]}
    assert origins == {CitationQueryEngine: {"computed"}, KVFusionCitationQueryEngine: {"memory"}}


@pytest.mark.parametrize("streaming", [False, True])
def test_engine_over_an_index_with_an_llm(streaming: bool) -> None:
    generator = RecordingGenerator()
    index = VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=4))
    engine = KVFusionCitationQueryEngine.from_args(
        index, llm=KVFusionLlamaIndexLLM(generator), streaming=streaming, similarity_top_k=2
    )
    response = engine.query(QUESTION)
    assert source_numbers(response) == ([] if streaming else [generator.calls[0].ids.index("long") + 1])
    assert (str(response), sorted(generator.calls[0].texts)) == ("in lima", sorted([LONG, "Nobody knows."]))
    assert generator.calls[0].method == ("stream" if streaming else "answer")


def test_answer_without_citations_has_no_source_numbers() -> None:
    generator = RecordingGenerator(pieces=("in Rome",))
    engine = KVFusionCitationQueryEngine(FixedRetriever(nodes()), KVFusionLlamaIndexLLM(generator))
    assert source_numbers(engine.query(QUESTION)) == []
    empty = KVFusionCitationQueryEngine(FixedRetriever([]), KVFusionLlamaIndexLLM(generator)).query(QUESTION)
    assert (str(empty), source_numbers(empty)) == ("Empty Response", [])


# Errors


def test_invalid_arguments_are_rejected() -> None:
    llm, index = KVFusionLlamaIndexLLM(RecordingGenerator()), VectorStoreIndex([], embed_model=MockEmbedding(4))
    with pytest.raises(InvalidInputError, match="NoneType"):
        KVFusionCitationQueryEngine(FixedRetriever([]))
    with pytest.raises(InvalidInputError, match="MockLLM"):
        KVFusionCitationQueryEngine.from_args(index, llm=MockLLM())
    with pytest.raises(InvalidInputError, match="CompactAndRefine"):
        KVFusionCitationQueryEngine(FixedRetriever([]), llm, CompactAndRefine(llm=llm))
    with pytest.raises(InvalidInputError, match="multimodal"):
        KVFusionCitationQueryEngine(FixedRetriever([]), llm, multimodal=True)
    with pytest.raises(InvalidInputError, match=r"'citation_qa_template'.*text_qa_template"):
        KVFusionCitationQueryEngine.from_args(index, llm=llm, citation_qa_template="{context_str}")
