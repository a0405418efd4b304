"""`KVFusionSynthesizer` in LlamaIndex's engines: arguments of the generator, responses, events and errors."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import RecordingGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index_helpers import EventLog, FixedRetriever, ask

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, Message
from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer

pytestmark = pytest.mark.usefixtures("no_default_llm")

QUESTION = "Where was it?"
EXPECTED = [
    Document("It was in Lima.", id="n1", title="Peru", metadata={"score": 0.75}, score=0.75),
    Document("It rained.", id="n2", title=None, metadata={"score": 0.5}, score=0.5),
    Document("Nobody knows.", id="n3", title=None, metadata={}),
]
WAYS = ["sync", "async", "stream", "async stream"]


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text="It was in Lima.", id_="n1", metadata={"title": "Peru"}), score=0.75),
        NodeWithScore(node=TextNode(text="It rained.", id_="n2", metadata={"page": 3}), score=0.5),
        NodeWithScore(node=TextNode(text="Nobody knows.", id_="n3")),
    ]


def make(*, is_untuned: bool = False, **kwargs: Any) -> tuple[KVFusionSynthesizer, RecordingGenerator]:
    generator = RecordingGenerator(is_untuned=is_untuned)
    return KVFusionSynthesizer(KVFusionLlamaIndexLLM(generator), **kwargs), generator


async def query(synthesizer: KVFusionSynthesizer, way: str) -> tuple[str, Any]:
    return await ask(RetrieverQueryEngine(FixedRetriever(nodes()), synthesizer), way, QUESTION)


# Arguments of the generator


@pytest.mark.parametrize("way", WAYS)
async def test_each_node_is_one_document(way: str) -> None:
    synthesizer, generator = make()
    text, response = await query(synthesizer, way)
    (received,) = generator.calls
    assert received.documents == EXPECTED
    assert (received.question, received.prompt) == (QUESTION, None)
    assert received.method == ("stream" if "stream" in way else "answer")
    assert text == "in lima"
    assert [n.node.node_id for n in response.source_nodes] == ["n1", "n2", "n3"]


@pytest.mark.parametrize("way", WAYS)
async def test_query_template_wraps_the_question(way: str) -> None:
    synthesizer, generator = make(query_template="In one word: {query_str}")
    await query(synthesizer, way)
    assert (generator.calls[0].question, generator.calls[0].prompt) == (QUESTION, f"In one word: {QUESTION}")
    assert generator.calls[0].documents == EXPECTED


@pytest.mark.parametrize("way", WAYS)
async def test_untuned_model_reads_the_default_template(way: str) -> None:
    synthesizer, generator = make(is_untuned=True)
    text, response = await query(synthesizer, way)
    (received,) = generator.calls
    system, user = received.prompt
    assert (system.role, system.documents, user.role) == ("system", None, "user")
    assert user.text.startswith("Context information is below.\n---------------------\n\n---------------------\n")
    assert user.documents == DocumentsPlace(len("Context information is below.\n---------------------\n"), "\n\n")
    assert received.texts == ["title: Peru\n\nIt was in Lima.", "page: 3\n\nIt rained.", "Nobody knows."]
    assert (received.question, received.ids, text) == (QUESTION, ["n1", "n2", "n3"], "in lima")
    assert [source["title"] for source in response.metadata["kvfusion"]["sources"]] == ["Peru", None, None]


@pytest.mark.parametrize("is_untuned", [True, False])
def test_text_qa_template_contains_the_documents(is_untuned: bool) -> None:
    synthesizer, generator = make(is_untuned=is_untuned, text_qa_template="Of {context_str}, {tone}: {query_str}")
    synthesizer.get_response(QUESTION, [" a ", "b"], tone="briefly")
    expected = Message.around("user", "Of ", f", briefly: {QUESTION}")
    assert (generator.calls[0].question, generator.calls[0].prompt) == (QUESTION, [expected])
    assert generator.calls[0].texts == (["a", "b"] if is_untuned else [" a ", "b"])


@pytest.mark.parametrize("is_chat", [True, False])
def test_custom_wrappers_apply_to_the_template(is_chat: bool) -> None:
    generator = RecordingGenerator(is_untuned=True)
    wrappers: dict[str, Any] = {"completion_to_prompt": lambda text: f"<{text}>"}
    if is_chat:
        wrappers = {"messages_to_prompt": lambda messages: "|".join(f"<{message.content}>" for message in messages)}
    said = [ChatMessage(role="system", content="Be brief.")] if is_chat else []
    llm = KVFusionLlamaIndexLLM(generator, **wrappers)
    KVFusionSynthesizer(llm, text_qa_template="{context_str} {query_str}", chat_history=said).get_response(
        "Who?", ["a"]
    )
    before = "<Be brief.>|<" if is_chat else "<"
    assert generator.calls[0].prompt == [Message.around("user", before, " Who?>")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own_helper", [True, False])
async def test_over_an_index(way: str, own_helper: bool) -> None:
    synthesizer, generator = make()
    index = VectorStoreIndex([n.node for n in nodes()], embed_model=MockEmbedding(embed_dim=4))
    if own_helper:
        engine = synthesizer.as_query_engine(index, similarity_top_k=3)
    else:
        engine = index.as_query_engine(response_synthesizer=synthesizer, llm=synthesizer.llm, similarity_top_k=3)
    text, _ = await ask(engine, way, QUESTION)
    assert sorted(generator.calls[0].ids) == ["n1", "n2", "n3"]
    assert sorted(generator.calls[0].texts) == sorted(d.text for d in EXPECTED)
    assert (generator.calls[0].question, text) == (QUESTION, "in lima")


def test_metadata_header() -> None:
    synthesizer, generator = make(metadata_mode=MetadataMode.LLM)
    synthesizer.synthesize(QUESTION, nodes())
    assert generator.calls[0].texts == ["title: Peru\n\nIt was in Lima.", "page: 3\n\nIt rained.", "Nobody knows."]
    assert [d.title for d in generator.calls[0].documents] == [None, None, None]


@settings(max_examples=25)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_texts_are_passed_on_unchanged(texts: list[str]) -> None:
    synthesizer, generator = make()
    given_nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(texts)]
    synthesizer.synthesize(QUESTION, given_nodes)
    assert generator.calls[0].texts == texts
    assert generator.calls[0].ids == [str(i) for i in range(len(texts))]


def test_duplicate_nodes_get_distinct_ids() -> None:
    synthesizer, generator = make()
    twice = [*nodes()[:1], *nodes()[:1]]
    response = synthesizer.synthesize(QUESTION, twice)
    assert generator.calls[0].ids == ["n1", "n1#2"]
    sources = response.metadata["kvfusion"]["sources"]
    assert [s["duplicate_of"] for s in sources] == [None, "n1"]


def test_additional_source_nodes_are_not_read() -> None:
    synthesizer, generator = make()
    response = synthesizer.synthesize(QUESTION, nodes()[:1], additional_source_nodes=nodes()[1:])
    assert generator.calls[0].ids == ["n1"]
    assert [n.node.node_id for n in response.source_nodes] == ["n1", "n2", "n3"]


def test_get_response_accepts_texts_and_template_values() -> None:
    synthesizer, generator = make(query_template="{tone}: {query_str}")
    assert synthesizer.get_response(QUESTION, ["a", "b"], tone="Calmly") == "in lima"
    assert generator.calls[0].documents == [Document("a"), Document("b")]
    assert generator.calls[0].prompt == f"Calmly: {QUESTION}"


def test_postprocessors_select_the_documents() -> None:
    synthesizer, generator = make()
    cutoff = SimilarityPostprocessor(similarity_cutoff=0.6)
    synthesizer.as_query_engine(FixedRetriever(nodes()), node_postprocessors=[cutoff]).query(QUESTION)
    assert generator.calls[0].ids == ["n1"]


# Responses


@pytest.mark.parametrize("way", WAYS)
async def test_record_contains_node_ids(way: str) -> None:
    synthesizer, _ = make()
    _, response = await query(synthesizer, way)
    record = response.metadata["kvfusion"]
    assert response.metadata["n1"] == {"title": "Peru"}
    assert [(s["id"], s["title"], s["metadata"]) for s in record["sources"]] == [
        ("n1", "Peru", {"score": 0.75}),
        ("n2", None, {"score": 0.5}),
        ("n3", None, {}),
    ]
    assert record["citations"] == [{"document_id": "n1", "start": 7, "end": 14, "text": "in Lima", "place": None}]
    assert (record["mode"], record["cited_text"]) == ("fusion", "in Lima")


def test_record_of_a_stream_is_filled_at_the_end() -> None:
    synthesizer, _ = make(streaming=True)
    response = synthesizer.synthesize(QUESTION, nodes())
    assert response.metadata["kvfusion"] == {}
    whole = response.get_response()
    assert whole.metadata["kvfusion"]["text"] == str(whole) == "in lima"


@pytest.mark.parametrize("way", WAYS)
async def test_empty_response_without_nodes(way: str) -> None:
    synthesizer, generator = make(empty_response="Nothing found.")
    text, response = await ask(RetrieverQueryEngine(FixedRetriever([]), synthesizer), way, QUESTION)
    assert text == "Nothing found."
    assert generator.calls == []
    assert response.source_nodes == []


@pytest.mark.parametrize("way", WAYS)
async def test_errors_are_raised(way: str) -> None:
    synthesizer, generator = make()
    generator.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        await query(synthesizer, way)


async def test_async_stream_stopped_early_stops_the_generator() -> None:
    synthesizer, generator = make(streaming=True)
    pieces = (await synthesizer.asynthesize(QUESTION, nodes())).response_gen
    assert await anext(pieces) == "in"
    await pieces.aclose()
    for _ in range(1000):  # a worker thread may close the stream
        if generator.streams[0].closed:
            break
        await asyncio.sleep(0.005)
    assert generator.streams[0].closed
    assert len(generator.threads) == 1


def test_stream_stopped_early_stops_the_generator() -> None:
    synthesizer, generator = make(streaming=True)
    pieces = synthesizer.synthesize(QUESTION, nodes()).response_gen
    assert next(pieces) == "in"
    pieces.close()
    assert generator.streams[0].closed


async def test_event_loop_is_not_blocked() -> None:
    synthesizer, generator = make()
    generator.hold = threading.Event()
    task = asyncio.create_task(synthesizer.asynthesize(QUESTION, nodes()))
    while not generator.threads:
        await asyncio.sleep(0.001)
    ticks = 0
    for _ in range(5):
        await asyncio.sleep(0)
        ticks += 1
    assert not task.done()
    generator.hold.set()
    assert (str(await task), ticks) == ("in lima", 5)


def test_concurrent_queries_have_separate_records() -> None:
    synthesizer, _ = make(streaming=True)
    first = synthesizer.synthesize(QUESTION, nodes()[:1])
    second = synthesizer.synthesize(QUESTION, nodes()[1:])
    readers = [first, second]
    random.Random(0).shuffle(readers)
    for response in readers:
        str(response)
    assert [s["id"] for s in first.metadata["kvfusion"]["sources"]] == ["n1"]
    assert [s["id"] for s in second.metadata["kvfusion"]["sources"]] == ["n2", "n3"]


# Events, callbacks, counts, prompts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_untuned", [True, False])
async def test_event_sequence(way: str, is_untuned: bool, events: EventLog) -> None:
    synthesizer, generator = make(is_untuned=is_untuned)
    kind = "LLMChat" if is_untuned else "LLMCompletion"
    await query(synthesizer, way)
    opening = ["QueryStart", "RetrievalStart", "RetrievalEnd", "SynthesizeStart", f"{kind}Start"]
    if "stream" in way:
        progress = [f"{kind}InProgress"] * 3
        assert events.names() == [*opening, "SynthesizeEnd", "QueryEnd", *progress, f"{kind}End"]
    else:
        assert events.names() == [*opening, f"{kind}End", "SynthesizeEnd", "QueryEnd"]
    (start,) = [event for event in events.seen if type(event).__name__ == f"{kind}StartEvent"]
    assert start.additional_kwargs["documents"] == generator.calls[0].documents
    assert isinstance(start.model_dump_json(), str)


@pytest.mark.parametrize("way", WAYS)
async def test_callbacks_and_counts_from_settings(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: ["wrong"] * 1000)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = KVFusionLlamaIndexLLM(RecordingGenerator())
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter, debug]))
    synthesizer = KVFusionSynthesizer(llm)
    await query(synthesizer, way)
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (4 + 2 + 2 + 3, 2)
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE, CBEventType.LLM):
        assert len(debug.get_event_pairs(kind)) == 1, kind


def test_callback_handlers_of_the_llm_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([]))
    own = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    llm = KVFusionLlamaIndexLLM(RecordingGenerator(), callback_manager=own)
    KVFusionSynthesizer(llm)
    assert llm.callback_manager is own
    other = CallbackManager([])
    assert KVFusionSynthesizer(llm, callback_manager=other).callback_manager is llm.callback_manager is other


def test_prompts_can_be_changed_through_the_engine() -> None:
    synthesizer, generator = make()
    engine = synthesizer.as_query_engine(FixedRetriever(nodes()))
    assert engine.get_prompts()["response_synthesizer:query_template"].get_template() == "{query_str}"
    engine.update_prompts({"response_synthesizer:query_template": PromptTemplate("Tell: {query_str}")})
    engine.query(QUESTION)
    assert generator.calls[0].prompt == f"Tell: {QUESTION}"


def test_template_of_an_untuned_model_can_be_changed_through_the_engine() -> None:
    synthesizer, generator = make(is_untuned=True)
    engine = synthesizer.as_query_engine(FixedRetriever(nodes()))
    assert engine.get_prompts() == {"response_synthesizer:text_qa_template": DEFAULT_TEXT_QA_PROMPT_SEL}
    engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("Of {context_str}: {query_str}")})
    engine.query(QUESTION)
    engine.update_prompts({"response_synthesizer:query_template": PromptTemplate("Tell: {query_str}")})
    engine.query(QUESTION)
    assert list(engine.get_prompts()) == ["response_synthesizer:query_template"]
    around, without = (call.prompt for call in generator.calls)
    assert around == [Message.around("user", "Of ", f": {QUESTION}")]
    assert without == [Message("user", f"Tell: {QUESTION}")]


def test_query_template_may_be_a_template_object() -> None:
    synthesizer, generator = make(query_template=PromptTemplate("Say: {query_str}"))
    synthesizer.synthesize(QUESTION, nodes())
    assert generator.calls[0].prompt == f"Say: {QUESTION}"


# Other engines


def test_citation_query_engine() -> None:
    synthesizer, generator = make()
    engine = CitationQueryEngine(FixedRetriever(nodes()), llm=synthesizer.llm, response_synthesizer=synthesizer)
    response = engine.query(QUESTION)
    assert generator.calls[0].texts == [
        "Source 1:\nIt was in Lima.\n",
        "Source 2:\nIt rained.\n",
        "Source 3:\nNobody knows.\n",
    ]
    cited = response.metadata["kvfusion"]["citations"][0]["document_id"]
    assert cited == response.source_nodes[0].node.node_id


def chat_engine() -> tuple[CondenseQuestionChatEngine, RecordingGenerator]:
    synthesizer, generator = make()
    engine = synthesizer.as_query_engine(FixedRetriever(nodes()))
    return CondenseQuestionChatEngine.from_defaults(
        query_engine=engine, llm=synthesizer.llm, memory=ChatMemoryBuffer.from_defaults()
    ), generator


def test_condense_question_chat_engine() -> None:
    chat, generator = chat_engine()
    assert str(chat.chat(QUESTION)) == "in lima"
    assert str(chat.chat("And then?")) == "in lima"
    first, condense, second = generator.calls
    assert (first.question, first.documents) == (QUESTION, EXPECTED)
    assert (condense.documents, QUESTION in condense.wording) == ([], True)
    assert (second.question, second.documents) == ("in lima", EXPECTED)


async def test_condense_question_chat_engine_streams() -> None:
    chat, generator = chat_engine()
    assert "".join(chat.stream_chat(QUESTION).response_gen) == "in lima"
    response = await chat.astream_chat("And then?")
    assert "".join([piece async for piece in response.async_response_gen()]) == "in lima"
    assert [c.method for c in generator.calls] == ["stream", "answer", "stream"]
    assert chat._query_engine._response_synthesizer._streaming is False


# Errors


def test_another_llm_is_rejected() -> None:
    with pytest.raises(InvalidInputError, match="MockLLM"):
        KVFusionSynthesizer(MockLLM())  # type: ignore[arg-type]


def test_llm_is_required() -> None:
    with pytest.raises(TypeError, match="llm"):
        KVFusionSynthesizer()  # type: ignore[call-arg]


def test_retriever_options_need_an_index() -> None:
    synthesizer, _ = make()
    with pytest.raises(InvalidInputError, match="similarity_top_k"):
        synthesizer.as_query_engine(FixedRetriever([]), similarity_top_k=3)


def test_streaming_option_of_an_engine_is_rejected() -> None:
    synthesizer = KVFusionSynthesizer(KVFusionLlamaIndexLLM(RecordingGenerator()))
    with pytest.raises(InvalidInputError, match=r"KVFusionSynthesizer\(llm, streaming=True\)"):
        synthesizer.as_query_engine(None, streaming=True)  # type: ignore[arg-type]
