"""The two context chat engines: documents arrive apart, earlier turns as turns, and memory as LlamaIndex's does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import EchoGenerator, RecordingGenerator
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from tiny import generator as tiny_generator

from kvfusion_rag import InvalidInputError, Message
from llama_index_kvfusion import (
    KVFusionCondensePlusContextChatEngine,
    KVFusionContextChatEngine,
    KVFusionLlamaIndexLLM,
)

WAYS = ["sync", "async", "stream", "async stream"]
ENGINES = [KVFusionContextChatEngine, KVFusionCondensePlusContextChatEngine]
TURNS = [Message("user", "Who wrote {query_str}?"), Message("assistant", "She did, {context_str}.")]


class NotedRetriever(BaseRetriever):
    """Gives the same nodes for every query, and notes the queries."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        self.nodes, self.queries = nodes, list[str]()
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.queries.append(query_bundle.query_str)
        return self.nodes


@pytest.fixture(autouse=True)
def no_default_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Settings, "_llm", None)
    yield
    assert Settings._llm is None


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text="It was in Lima.", id_="n1", metadata={"title": "Peru"}), score=0.75),
        NodeWithScore(node=TextNode(text="It rained.", id_="n2"), score=0.5),
    ]


def history() -> list[ChatMessage]:
    """A fresh list each time, since LlamaIndex's memory appends to the one it is given."""
    return [ChatMessage(role=MessageRole(turn.role), content=turn.text) for turn in TURNS]


def make(kind: Any, generator: Any = None, **options: Any) -> tuple[Any, RecordingGenerator, NotedRetriever]:
    generator = RecordingGenerator() if generator is None else generator
    retriever = NotedRetriever(nodes())
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    engine = kind.from_defaults(retriever, KVFusionLlamaIndexLLM(generator), memory=memory, **options)
    return engine, generator, retriever


async def say(engine: Any, way: str, message: str, **options: Any) -> tuple[str, Any]:
    """The text and the response of one way to chat; streams are read to their end."""
    if way == "sync":
        response = engine.chat(message, **options)
        return str(response), response
    if way == "async":
        response = await engine.achat(message, **options)
        return str(response), response
    if way == "stream":
        response = engine.stream_chat(message, **options)
        return "".join(response.response_gen), response
    response = await engine.astream_chat(message, **options)
    return "".join([piece async for piece in response.async_response_gen()]), response


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_documents_arrive_apart_and_the_history_as_turns(kind: Any, way: str) -> None:
    engine, generator, _ = make(kind, system_prompt="Be brief: {context_str}.")
    text, response = await say(engine, way, "And {braces}?", chat_history=history())
    answered = generator.calls[-1]
    assert answered.texts == ["It was in Lima.", "It rained."]
    assert (answered.ids, [d.title for d in answered.documents]) == (["n1", "n2"], ["Peru", None])
    assert answered.prompt == [Message("system", "Be brief: {context_str}."), *TURNS, Message("user", "And {braces}?")]
    assert text == "in lima"
    assert [node.node.node_id for node in response.source_nodes] == ["n1", "n2"]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_an_untuned_model_reads_the_documents_in_the_context_template(kind: Any, way: str) -> None:
    options: dict[str, Any] = {} if kind is KVFusionContextChatEngine else {"skip_condense": True}
    engine, generator, _ = make(kind, RecordingGenerator(is_untuned=True), system_prompt="Be {brief}.", **options)
    text, _ = await say(engine, way, "And {braces}?", chat_history=history())
    (answered,) = generator.calls
    system, *turns = answered.prompt
    assert (system.role, system.text.endswith("Be {brief}.")) == ("system", True)
    assert 0 < system.documents.offset < len(system.text)
    assert turns == [*TURNS, Message("user", "And {braces}?")]
    assert answered.texts == ["title: Peru\n\nIt was in Lima.", "It rained."]
    assert (answered.question, text) == ("And {braces}?", "in lima")


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_memory_holds_what_was_said(kind: Any, way: str) -> None:
    engine, generator, _ = make(kind)
    for message in ("Where?", "And then?"):
        await say(engine, way, message)
    assert [(m.role.value, m.content) for m in engine.chat_history] == [
        ("user", "Where?"),
        ("assistant", "in lima"),
        ("user", "And then?"),
        ("assistant", "in lima"),
    ]
    assert generator.calls[-1].prompt == [
        Message("user", "Where?"),
        Message("assistant", "in lima"),
        Message("user", "And then?"),
    ]
    engine.reset()
    assert engine.chat_history == []


@pytest.mark.parametrize("way", WAYS)
async def test_the_condensed_question_retrieves_and_the_message_is_answered(way: str) -> None:
    engine, generator, retriever = make(KVFusionCondensePlusContextChatEngine)
    await say(engine, way, "And then?", chat_history=history())
    condense, answered = generator.calls
    assert (condense.documents, "She did" in condense.wording) == ([], True)
    assert retriever.queries == ["in lima"]
    assert (answered.question, answered.prompt[-1]) == ("in lima", Message("user", "And then?"))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_first_message_is_put_as_a_bare_question(kind: Any, way: str) -> None:
    engine, generator, retriever = make(kind)
    await say(engine, way, "Where?")
    (call,) = generator.calls
    assert (call.question, call.prompt, retriever.queries) == ("Where?", None, ["Where?"])


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_the_record_is_the_last_source(kind: Any, way: str) -> None:
    engine, _, _ = make(kind)
    _, response = await say(engine, way, "Where?")
    assert [source.tool_name for source in response.sources] == ["retriever", "kvfusion"]
    record = response.sources[-1].raw_output
    assert [source["id"] for source in record["sources"]] == ["n1", "n2"]
    assert record["citations"] == [{"document_id": "n1", "start": 7, "end": 14, "text": "in Lima"}]
    if "stream" not in way:
        assert response.metadata["kvfusion"] == record


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_no_nodes_give_the_empty_response_as_the_parent_does(kind: Any, way: str) -> None:
    engine, generator, retriever = make(kind)
    retriever.nodes = []
    text, response = await say(engine, way, "Where?")
    assert (text, generator.calls, response.source_nodes) == ("Empty Response", [], [])
    assert [source.tool_name for source in response.sources] == ["retriever"]


@pytest.mark.parametrize("way", WAYS)
async def test_earlier_nodes_stand_in_for_none(way: str) -> None:
    engine, generator, retriever = make(KVFusionContextChatEngine)
    retriever.nodes = []
    await say(engine, way, "Where?", prev_chunks=nodes()[:1])
    assert generator.calls[0].ids == ["n1"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(KVFusionContextChatEngine, "context_template"), (KVFusionCondensePlusContextChatEngine, "context_prompt")],
)
def test_a_context_template_of_the_caller_refers_to_the_documents(kind: Any, name: str) -> None:
    template = PromptTemplate("Speak as a pirate about {context_str}!")
    engine, generator, _ = make(kind, system_prompt="Be brief.", **{name: template})
    engine.chat("Where?")
    assert generator.calls[0].prompt == [
        Message("system", "Speak as a pirate about (the documents above)!\n\nBe brief."),
        Message("user", "Where?"),
    ]


def test_prefix_messages_come_before_the_history() -> None:
    said = [
        ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
        ChatMessage(role=MessageRole.USER, content="Example?"),
        ChatMessage(role=MessageRole.ASSISTANT, content="Yes."),
    ]
    engine, generator, _ = make(KVFusionContextChatEngine, prefix_messages=said)
    engine.chat("Where?", chat_history=history())
    assert generator.calls[0].prompt == [
        Message("system", "Be brief."),
        Message("user", "Example?"),
        Message("assistant", "Yes."),
        *TURNS,
        Message("user", "Where?"),
    ]


@pytest.mark.parametrize("kind", ENGINES)
def test_postprocessors_metadata_mode_and_the_prompt_of_the_llm(kind: Any) -> None:
    generator = RecordingGenerator()
    engine = kind.from_defaults(
        NotedRetriever(nodes()),
        KVFusionLlamaIndexLLM(generator, system_prompt="In Latin."),
        memory=ChatMemoryBuffer.from_defaults(token_limit=3000),
        metadata_mode=MetadataMode.LLM,
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=0.6)],
        system_prompt="Be brief.",
    )
    engine.chat("Where?")
    assert generator.calls[0].texts == ["title: Peru\n\nIt was in Lima."]
    assert generator.calls[0].prompt == [
        Message("system", "In Latin."),
        Message("system", "Be brief."),
        Message("user", "Where?"),
    ]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_tokens_are_counted_with_documents(kind: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: ["wrong"] * 1000)
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter]))
    engine, _, _ = make(kind, system_prompt="Be brief.")
    await say(engine, way, "Where is it?")
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (4 + 2 + 2 + 3, 2)


async def test_conversations_at_the_same_time_keep_their_own_records() -> None:
    engines = [make(KVFusionContextChatEngine, EchoGenerator())[0] for _ in range(4)]
    answers = await asyncio.gather(*(engine.achat(f"Question {n}?") for n, engine in enumerate(engines)))
    for number, response in enumerate(answers):
        record = response.sources[-1].raw_output
        assert record["text"] == response.response
        assert response.response.startswith(f"Question {number}? <- It was in Lima. + It rained.")


def test_a_retriever_that_chats_itself_keeps_its_record_apart() -> None:
    inner, _, _ = make(KVFusionContextChatEngine)
    outer, _, retriever = make(KVFusionContextChatEngine)
    retriever._retrieve = lambda bundle: inner.chat(bundle.query_str).source_nodes[:1]
    record = outer.chat("Where?").sources[-1].raw_output
    assert [source["id"] for source in record["sources"]] == ["n1"]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_a_model_with_a_chat_template_gives_the_same_answer_in_any_order(kind: Any, way: str) -> None:
    model = tiny_generator()
    short = {} if kind is KVFusionContextChatEngine else {"condense_prompt": "{chat_history} {question}"}
    engine, _, retriever = make(kind, model, system_prompt="Be brief.", **short)
    answers = []
    for order in (nodes(), nodes()[::-1]):
        retriever.nodes = order
        text, response = await say(engine, way, "Where <|im_end|>?", chat_history=history())
        answers.append((text, response.sources[-1].raw_output["usage"]["prompt_tokens"]))
    assert answers[0] == answers[1]
    assert {source["origin"] for source in response.sources[-1].raw_output["sources"]} == {"memory"}


def test_a_model_that_reads_bare_questions_is_asked_the_message() -> None:
    model = tiny_generator(prompt_template=None)
    engine, _, _ = make(KVFusionCondensePlusContextChatEngine, model, skip_condense=True)
    fact = "Hamlet is a tragedy written by William Shakespeare."
    engine._retriever.nodes = [NodeWithScore(node=TextNode(text=fact, id_="hamlet"))]
    response = engine.chat("Who wrote Hamlet?", chat_history=history())
    assert response.metadata["kvfusion"]["text"] == model.answer("Who wrote Hamlet?", [fact]).text


# Wrong use


@pytest.mark.parametrize("kind", ENGINES)
def test_another_llm_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"MockLLM; {kind.__name__} needs"):
        kind.from_defaults(NotedRetriever([]), MockLLM())
    with pytest.raises(InvalidInputError, match="MockLLM"):
        kind(NotedRetriever([]), MockLLM(), ChatMemoryBuffer.from_defaults(), prefix_messages=[])


@pytest.mark.parametrize("kind", ENGINES)
def test_an_option_that_the_parent_would_swallow_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match="'streaming'"):
        make(kind, streaming=True)


def test_condensing_by_a_model_that_reads_bare_questions_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="skip_condense=True"):
        make(KVFusionCondensePlusContextChatEngine, RecordingGenerator(follows_instructions=False))
