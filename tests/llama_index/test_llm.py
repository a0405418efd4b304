"""Arguments and results of `KVFusionLlamaIndexLLM` in LlamaIndex's eight methods."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document as LlamaDocument
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_helpers import CHAT, COMPLETE, USER, call, make

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, Message

DEFAULT_OPTIONS = {
    "temperature": 0.0,
    "max_new_tokens": None,
    "max_reasoning_tokens": None,
    "top_p": 1.0,
    "top_k": None,
    "stop": (),
    "seed": None,
    "mode": None,
    "focus": "auto",
    "attribution": None,
    "min_support": None,
    "chat_template_kwargs": None,
}


@pytest.mark.parametrize("way", COMPLETE)
async def test_documents_reach_the_generator_in_order(way: str) -> None:
    llm, generator = make()
    node = NodeWithScore(node=TextNode(text="c", id_="n3", metadata={"title": "T"}), score=0.5)
    await call(
        llm, way, "Where?", documents=["a", Document("b", id="two"), node, LlamaDocument(text="d", doc_id="n4")]
    )
    (received,) = generator.calls
    assert received.texts == ["a", "b", "c", "d"]
    assert received.ids == [None, "two", "n3", "n4"]
    assert [d.title for d in received.documents] == [None, None, "T", None]
    assert received.question == "Where?"
    assert received.options == DEFAULT_OPTIONS


@pytest.mark.parametrize("way", COMPLETE)
async def test_response_has_text_counts_and_record(way: str) -> None:
    llm, _ = make()
    chunks = await call(llm, way, "Where is it?", documents=[Document("It was in Lima.", id="x", metadata={"d": 1})])
    last = chunks[-1]
    assert last.text == "in lima"
    assert last.additional_kwargs == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert json.loads(json.dumps(last.raw)) == last.raw
    assert last.raw["mode"] == "fusion"
    assert last.raw["cited_text"] == "in Lima"
    assert last.raw["citations"] == [{"document_id": "x", "start": 7, "end": 14, "text": "in Lima", "place": None}]
    (source,) = last.raw["sources"]
    assert (source["id"], source["origin"], source["metadata"]) == ("x", "computed", {"d": 1})
    if "stream" in way:
        assert [c.delta for c in chunks] == ["in", " lima", ""]
        assert [c.text for c in chunks] == ["in", "in lima", "in lima"]
        assert all(not c.additional_kwargs and c.raw is None for c in chunks[:-1])


@pytest.mark.parametrize("way", ["stream_complete", "astream_complete"])
async def test_empty_answer_streams_one_chunk(way: str) -> None:
    llm, generator = make()
    generator.pieces = ()
    (only,) = await call(llm, way, "Where?")
    assert (only.text, only.delta, only.additional_kwargs["completion_tokens"]) == ("", "", 0)


@pytest.mark.parametrize("way", CHAT)
async def test_chat_answers_the_last_user_message(way: str) -> None:
    llm, generator = make()
    messages = [
        ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
        ChatMessage(role=MessageRole.USER, content="Who?"),
        ChatMessage(role=MessageRole.ASSISTANT, content="She."),
        ChatMessage(role=MessageRole.USER, content="Where?"),
    ]
    chunks = await call(llm, way, messages, documents=["a"], seed=3)
    (received,) = generator.calls
    assert received.question == "Where?"
    assert received.prompt == [
        Message("system", "Be brief."),
        Message("user", "Who?"),
        Message("assistant", "She."),
        Message("user", "Where?"),
    ]
    assert received.texts == ["a"]
    assert received.options == DEFAULT_OPTIONS | {"seed": 3}
    last = chunks[-1]
    assert (last.message.role, last.message.content) == (MessageRole.ASSISTANT, "in lima")
    assert last.additional_kwargs["completion_tokens"] == 2
    assert last.raw["mode"] == "fusion"
    if "stream" in way:
        assert "".join(c.delta for c in chunks) == "in lima"


def test_token_counts_do_not_reach_the_next_prompt() -> None:
    llm, generator = make()
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults())
    engine.chat("Who?")
    engine.chat("Where?")
    assert generator.calls[-1].prompt == [
        Message("user", "Who?"),
        Message("assistant", "in lima"),
        Message("user", "Where?"),
    ]


def test_lone_system_message_is_answered() -> None:
    llm, generator = make()
    llm.chat([ChatMessage(role=MessageRole.SYSTEM, content="Sum up.")])
    assert (generator.calls[-1].question, generator.calls[-1].prompt) == ("Sum up.", [Message("user", "Sum up.")])


@pytest.mark.parametrize("way", CHAT)
async def test_custom_messages_to_prompt_is_used(way: str) -> None:
    llm, generator = make(messages_to_prompt=lambda messages: "|".join(message.content for message in messages))
    await call(llm, way, [ChatMessage(role=MessageRole.SYSTEM, content="Be brief."), *USER], documents=["a"])
    assert (generator.calls[-1].question, generator.calls[-1].prompt) == ("Where?", "Be brief.|Where?")


def test_every_role_is_converted() -> None:
    llm, generator = make()
    roles = [role for role in MessageRole if role is not MessageRole.USER]
    llm.chat([*(ChatMessage(role=role, content=role.value) for role in roles), *USER])
    spoken = {message.text: message.role for message in generator.calls[-1].prompt[:-1]}
    assert spoken == {
        "system": "system",
        "developer": "system",
        "assistant": "assistant",
        "chatbot": "assistant",
        "model": "assistant",
        "function": "user",
        "tool": "user",
    }
    assert generator.calls[-1].question == "Where?"


@pytest.mark.parametrize(
    ("documents", "follows", "prompt"),
    [(["a"], True, None), ([], False, None), ([], True, [Message("user", "Where?")])],
)
def test_single_message_is_a_bare_question(documents: list[str], follows: bool, prompt: list[Message] | None) -> None:
    llm, generator = make()
    generator.follows_instructions = follows
    llm.chat(USER, documents=documents)
    assert (generator.calls[-1].question, generator.calls[-1].prompt) == ("Where?", prompt)


@pytest.mark.parametrize("way", CHAT)
@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        ([*USER, ChatMessage(role=MessageRole.USER, blocks=[ImageBlock(image=b"x")])], r"messages\[1\].*ImageBlock"),
    ],
)
async def test_invalid_messages_are_rejected(way: str, messages: list[ChatMessage], error: str) -> None:
    llm, generator = make()
    with pytest.raises(InvalidInputError, match=error):
        await call(llm, way, messages)
    assert generator.calls == []


@pytest.mark.parametrize(
    ("kwargs", "follows", "question", "prompt"),
    [
        ({}, True, "Where?", "Where?"),
        ({}, False, "Where?", None),
        ({"documents": ["a"]}, True, "Where?", None),
        ({"documents": ["a"], "question": "Bare?"}, True, "Bare?", "Where?"),
        ({"documents": ["a"], "question": "Bare?", "formatted": True}, True, "Bare?", "Where?"),
        ({"documents": []}, True, "Where?", "Where?"),
        ({"documents": None}, True, "Where?", "Where?"),
    ],
)
def test_prompt_is_passed_if_it_differs_from_the_question(
    kwargs: dict[str, Any], follows: bool, question: str, prompt: str | None
) -> None:
    llm, generator = make()
    generator.follows_instructions = follows
    llm.complete("Where?", **kwargs)
    assert (generator.calls[-1].question, generator.calls[-1].prompt) == (question, prompt)


@pytest.mark.parametrize("documents", [None, ["a"]])
def test_untuned_model_reads_prompts_and_messages_unchanged(documents: list[str] | None) -> None:
    llm, generator = make()
    generator.is_untuned = True
    llm.complete("Where?", documents=documents)
    llm.chat(USER, documents=documents)
    assert [call.prompt for call in generator.calls] == ["Where?", [Message("user", "Where?")]]


@pytest.mark.parametrize("way", COMPLETE + CHAT)
async def test_place_of_documents_is_passed_on(way: str) -> None:
    llm, generator = make(completion_to_prompt=lambda text: f"<{text}>") if "complete" in way else make()
    place = DocumentsPlace(3, "; ")
    given = {"documents_place": place} if "complete" in way else {"documents_place": (0, place)}
    await call(llm, way, USER if way in CHAT else "Where?", documents=["a", "b"], question="Bare?", **given)
    assert generator.calls[-1].prompt == [Message("user", "Where?", place)]
    assert (generator.calls[-1].question, generator.calls[-1].texts) == ("Bare?", ["a", "b"])


def test_place_with_messages_to_prompt_is_rejected() -> None:
    llm, _ = make(messages_to_prompt=lambda messages: "one text")
    with pytest.raises(InvalidInputError, match="messages_to_prompt"):
        llm.chat(USER, documents=["a"], documents_place=(0, DocumentsPlace(0)))


def test_template_variables_of_call_and_llm_are_merged() -> None:
    llm, generator = make(chat_template_kwargs={"mood": "calm", "tone": "low"})
    llm.complete("Where?")
    llm.complete("Where?", chat_template_kwargs={"tone": "high"})
    found = [call.options["chat_template_kwargs"] for call in generator.calls]
    assert found == [{"mood": "calm", "tone": "low"}, {"mood": "calm", "tone": "high"}]


def test_completion_to_prompt_wraps_only_unformatted_prompts() -> None:
    llm, generator = make(completion_to_prompt=lambda text: f"<{text}>")
    llm.complete("Where?", documents=["a"])
    llm.complete("Where?", formatted=True)
    assert [(c.question, c.prompt) for c in generator.calls] == [("Where?", "<Where?>"), ("Where?", "Where?")]


def test_predict_with_a_template_and_a_system_prompt() -> None:
    llm, generator = make(system_prompt="Be brief.")
    assert llm.predict(PromptTemplate("Sum up {text}"), text="it") == "in lima"
    assert generator.calls[-1].prompt == [Message("system", "Be brief."), Message("user", "Sum up it")]


def test_predict_with_completion_to_prompt() -> None:
    llm, generator = make(system_prompt="Be brief.", completion_to_prompt=lambda text: f"<{text}>")
    assert llm.predict(PromptTemplate("Sum up {text}"), text="it") == "in lima"
    assert generator.calls[-1].prompt == "Be brief.\n\n<Sum up it>"


def test_options_of_the_llm_and_of_the_call() -> None:
    llm, generator = make(temperature=0.5, max_new_tokens=7, stop="END", top_k=4)
    llm.complete("Where?")
    llm.complete(
        "Where?",
        temperature=0.0,
        max_tokens=9,
        max_reasoning_tokens=6,
        stop=["\n", "."],
        top_p=0.9,
        seed=1,
        mode="concat",
        focus=2,
        attribution="effects",
        min_support="auto",
        chat_template_kwargs={"enable_thinking": False},
        top_k=None,
    )
    first, second = (c.options for c in generator.calls)
    assert first == DEFAULT_OPTIONS | {"temperature": 0.5, "max_new_tokens": 7, "stop": ("END",), "top_k": 4}
    assert second == {
        "temperature": 0.0,
        "max_new_tokens": 9,
        "max_reasoning_tokens": 6,
        "top_p": 0.9,
        "top_k": 4,
        "stop": ["\n", "."],
        "seed": 1,
        "mode": "concat",
        "focus": 2,
        "attribution": "effects",
        "min_support": "auto",
        "chat_template_kwargs": {"enable_thinking": False},
    }


@pytest.mark.parametrize("way", COMPLETE + CHAT)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_lenght": 3}, "max_lenght"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "same option"),
        ({"temperature": -1.0}, "temperature"),
        ({"documents": "one joined context"}, "must be a list"),
        ({"documents": ["a", {"text": "b"}]}, r"documents\[1\] is a dict"),
    ],
)
async def test_invalid_arguments_raise_before_work_starts(way: str, kwargs: dict[str, Any], message: str) -> None:
    llm, generator = make()
    with pytest.raises(InvalidInputError, match=message):
        result = getattr(llm, way)(USER if way in CHAT else "Where?", **kwargs)
        await result  # only async methods get here
    assert generator.threads == []


def test_unknown_constructor_option() -> None:
    with pytest.raises(InvalidInputError, match="'max_token'"):
        make(max_token=3)


def test_metadata_contains_model_and_limits() -> None:
    llm, generator = make()
    assert (llm.metadata.model_name, llm.metadata.context_window, llm.metadata.num_output) == ("fake/model", 4096, 48)
    assert make(max_new_tokens=5)[0].metadata.num_output == 5
    assert llm.generator is generator


@pytest.mark.parametrize(
    ("follows", "fields", "chat"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"messages_to_prompt": lambda messages: "x"}, False),
        (True, {"completion_to_prompt": lambda text: text.upper()}, False),
    ],
)
def test_is_chat_model_unless_prompts_are_wrapped(follows: bool, fields: dict[str, Any], chat: bool) -> None:
    llm, generator = make(**fields)
    generator.follows_instructions = follows
    assert llm.metadata.is_chat_model is chat


def test_llm_can_be_the_default_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    llm, _ = make()
    Settings.llm = llm
    assert Settings.llm is llm
