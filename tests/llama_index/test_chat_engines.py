"""The two context chat engines: separate documents, history, memory and records."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import EchoGenerator, RecordingGenerator
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index_helpers import FixedRetriever
from tiny import generator as tiny_generator

from kvfusion_rag import InvalidInputError, Message
from llama_index_kvfusion import (
    KVFusionCondensePlusContextChatEngine,
    KVFusionContextChatEngine,
    KVFusionLlamaIndexLLM,
)

pytestmark = pytest.mark.usefixtures("no_default_llm")

WAYS = ["sync", "async", "stream", "async stream"]
ENGINES = [KVFusionContextChatEngine, KVFusionCondensePlusContextChatEngine]
TURNS = [Message("user", "Who wrote {query_str}?"), Message("assistant", "She did, {context_str}.")]


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text="It was in Lima.", id_="n1", metadata={"title": "Peru"}), score=0.75),
        NodeWithScore(node=TextNode(text="It rained.", id_="n2"), score=0.5),
    ]


def history() -> list[ChatMessage]:
    """Return a new list, because LlamaIndex's memory appends to it."""
    return [ChatMessage(role=MessageRole(turn.role), content=turn.text) for turn in TURNS]


def make(kind: Any, generator: Any = None, **options: Any) -> tuple[Any, RecordingGenerator, FixedRetriever]:
    generator = RecordingGenerator() if generator is None else generator
    retriever = FixedRetriever(nodes())
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    engine = kind.from_defaults(retriever, KVFusionLlamaIndexLLM(generator), memory=memory, **options)
    return engine, generator, retriever


async def say(engine: Any, way: str, message: str, **options: Any) -> tuple[str, Any]:
    """Return text and response of one method. Streams are read to the end."""
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
async def test_documents_are_separate_and_the_history_is_kept(kind: Any, way: str) -> None:
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
async def test_untuned_model_reads_documents_in_the_context_template(kind: Any, way: str) -> None:
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
async def test_memory_contains_the_conversation(kind: Any, way: str) -> None:
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
async def test_condensed_question_retrieves_and_message_is_answered(way: str) -> None:
    engine, generator, retriever = make(KVFusionCondensePlusContextChatEngine)
    await say(engine, way, "And then?", chat_history=history())
    condense, answered = generator.calls
    assert (condense.documents, "She did" in condense.wording) == ([], True)
    assert retriever.queries == ["in lima"]
    assert (answered.question, answered.prompt[-1]) == ("in lima", Message("user", "And then?"))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_first_message_is_a_bare_question(kind: Any, way: str) -> None:
    engine, generator, retriever = make(kind)
    await say(engine, way, "Where?")
    (call,) = generator.calls
    assert (call.question, call.prompt, retriever.queries) == ("Where?", None, ["Where?"])


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_record_is_the_last_source(kind: Any, way: str) -> None:
    engine, _, _ = make(kind)
    _, response = await say(engine, way, "Where?")
    assert [source.tool_name for source in response.sources] == ["retriever", "kvfusion"]
    record = response.sources[-1].raw_output
    assert [source["id"] for source in record["sources"]] == ["n1", "n2"]
    assert record["citations"] == [{"document_id": "n1", "start": 7, "end": 14, "text": "in Lima", "place": None}]
    if "stream" not in way:
        assert response.metadata["kvfusion"] == record


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_empty_response_without_nodes(kind: Any, way: str) -> None:
    engine, generator, retriever = make(kind)
    retriever.nodes = []
    text, response = await say(engine, way, "Where?")
    assert (text, generator.calls, response.source_nodes) == ("Empty Response", [], [])
    assert [source.tool_name for source in response.sources] == ["retriever"]


@pytest.mark.parametrize("way", WAYS)
async def test_previous_nodes_replace_missing_ones(way: str) -> None:
    engine, generator, retriever = make(KVFusionContextChatEngine)
    retriever.nodes = []
    await say(engine, way, "Where?", prev_chunks=nodes()[:1])
    assert generator.calls[0].ids == ["n1"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(KVFusionContextChatEngine, "context_template"), (KVFusionCondensePlusContextChatEngine, "context_prompt")],
)
def test_custom_context_template_refers_to_the_documents(kind: Any, name: str) -> None:
    template = PromptTemplate("Speak as a pirate about {context_str}!")
    engine, generator, _ = make(kind, system_prompt="Be brief.", **{name: template})
    engine.chat("Where?")
    assert generator.calls[0].prompt == [
        Message("system", "Speak as a pirate about (the documents above)!\n\nBe brief."),
        Message("user", "Where?"),
    ]


def test_prefix_messages_precede_the_history() -> None:
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
def test_postprocessors_metadata_mode_and_system_prompt(kind: Any) -> None:
    generator = RecordingGenerator()
    engine = kind.from_defaults(
        FixedRetriever(nodes()),
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
async def test_token_counts_include_documents(kind: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: ["wrong"] * 1000)
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([counter]))
    engine, _, _ = make(kind, system_prompt="Be brief.")
    await say(engine, way, "Where is it?")
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (4 + 2 + 2 + 3, 2)


async def test_concurrent_conversations_have_separate_records() -> None:
    engines = [make(KVFusionContextChatEngine, EchoGenerator())[0] for _ in range(4)]
    answers = await asyncio.gather(*(engine.achat(f"Question {n}?") for n, engine in enumerate(engines)))
    for number, response in enumerate(answers):
        record = response.sources[-1].raw_output
        assert record["text"] == response.response
        assert response.response.startswith(f"Question {number}? <- It was in Lima. + It rained.")


def test_nested_chat_engines_have_separate_records() -> None:
    inner, _, _ = make(KVFusionContextChatEngine)
    outer, _, retriever = make(KVFusionContextChatEngine)
    retriever._retrieve = lambda bundle: inner.chat(bundle.query_str).source_nodes[:1]
    record = outer.chat("Where?").sources[-1].raw_output
    assert [source["id"] for source in record["sources"]] == ["n1"]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("way", WAYS)
async def test_order_of_nodes_does_not_change_the_answer(kind: Any, way: str) -> None:
    model = tiny_generator().with_settings(max_new_tokens=3)
    short = {} if kind is KVFusionContextChatEngine else {"condense_prompt": "{chat_history} {question}"}
    engine, _, retriever = make(kind, model, system_prompt="Be brief.", **short)
    answers = []
    for order in (nodes(), nodes()[::-1]):
        retriever.nodes = order
        text, response = await say(engine, way, "Where <|im_end|>?", chat_history=history())
        answers.append((text, response.sources[-1].raw_output["usage"]["prompt_tokens"]))
    assert answers[0] == answers[1]
    assert {source["origin"] for source in response.sources[-1].raw_output["sources"]} == {"memory"}


def test_model_for_bare_questions_reads_the_message() -> None:
    model = tiny_generator(prompt_template=None).with_settings(max_new_tokens=6)
    engine, _, _ = make(KVFusionCondensePlusContextChatEngine, model, skip_condense=True)
    fact = "Hamlet is a tragedy written by William Shakespeare."
    engine._retriever.nodes = [NodeWithScore(node=TextNode(text=fact, id_="hamlet"))]
    response = engine.chat("Who wrote Hamlet?", chat_history=history())
    assert response.metadata["kvfusion"]["text"] == model.answer("Who wrote Hamlet?", [fact]).text


# Errors


@pytest.mark.parametrize("kind", ENGINES)
def test_another_llm_is_rejected(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"MockLLM, but {kind.__name__} needs"):
        kind.from_defaults(FixedRetriever([]), MockLLM())
    with pytest.raises(InvalidInputError, match="MockLLM"):
        kind(FixedRetriever([]), MockLLM(), ChatMemoryBuffer.from_defaults(), prefix_messages=[])


@pytest.mark.parametrize("kind", ENGINES)
def test_unknown_option_is_rejected(kind: Any) -> None:
    with pytest.raises(InvalidInputError, match="'streaming'"):
        make(kind, streaming=True)


def test_model_for_bare_questions_cannot_condense() -> None:
    with pytest.raises(InvalidInputError, match="skip_condense=True"):
        make(KVFusionCondensePlusContextChatEngine, RecordingGenerator(follows_instructions=False))
