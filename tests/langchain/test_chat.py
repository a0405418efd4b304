"""Inputs of ChatKVFusion: documents, messages, options, and the response cache."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder, turns
from fakes import EchoGenerator
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_models import FOUND, Recorder, call_all, chat

from kvfusion_rag import Document, InvalidInputError
from langchain_kvfusion import KVFusionDocumentPrompt, KVFusionPrompt
from langchain_kvfusion.framing import frame

SEARCH = AIMessage("Let me look.", tool_calls=[{"name": "search", "args": {"query": "who"}, "id": "1"}])


async def v3(model: Any, given: Any, **options: Any) -> list[str]:
    stream = model.stream_events(given, version="v3", **options)
    async_stream = await model.astream_events(given, version="v3", **options)
    return [str(stream.output.text), str((await async_stream).text)]


# Documents

HUMAN = "Be brief.\n\n{context}\n\nQuestion: {question}"
FRAMES = "\n\n".join(KVFusionDocumentPrompt().format(page_content=document.page_content) for document in FOUND)
BLOCKS: list[Any] = [
    {"type": "text-plain", "text": "x", "title": "T", "id": "i", "mime_type": "text/plain"},
    {"type": "text-plain", "text": "y", "mime_type": "text/plain"},
    {"type": "text", "text": "Who?"},
]
ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "the call": ("Who?", {"documents": FOUND}),
    "the last message": ([HumanMessage("Who?", additional_kwargs={"documents": FOUND})], {}),
    "an earlier message": ([SystemMessage("", additional_kwargs={"documents": FOUND}), HumanMessage("Who?")], {}),
    "text-plain blocks": ([HumanMessage(BLOCKS)], {}),
    "a retriever tool": ([HumanMessage("Who?"), SEARCH, ToolMessage("x\n\ny", artifact=FOUND, tool_call_id="1")], {}),
    "frames": ([SystemMessage(FRAMES), HumanMessage("Who?")], {}),
    "a tool's frames": ([HumanMessage("Who?"), SEARCH, ToolMessage(FRAMES, tool_call_id="1")], {}),
    "a retriever tool that frames": (
        [HumanMessage("Who?"), SEARCH, ToolMessage(FRAMES, artifact=FOUND, tool_call_id="1")],
        {},
    ),
    "KVFusionPrompt": (
        KVFusionPrompt.from_template("{context}\n\n{question}").format_prompt(context=FOUND, question="Who?"),
        {},
    ),
    "FusedPrompt": (
        KVFusionPrompt.from_template("{context}\n\n{question}").format(context=FOUND, question="Who?"),
        {},
    ),
}
PLACED = {  # prompts with a place for the documents; the others are bare questions
    "frames": [("system", "{documents}"), ("user", "Who?")],
    "KVFusionPrompt": [("user", "{documents}\n\nWho?")],
    "FusedPrompt": [("user", "{documents}\n\nWho?")],
}


@pytest.mark.parametrize("route", ROUTES)
async def test_documents_from_every_source_are_separated(route):
    given, options = ROUTES[route]
    fake = ChatRecorder()
    for model, bound in ((chat(fake), options), (chat(fake).bind(**options), {})):
        assert {*await call_all(model, given, **bound), *await v3(model, given, **bound)} == {"in lima"}
    assert len(fake.calls) == 16
    for call in fake.calls:
        assert call.texts == ["x", "y"]
        assert call.question == "Who?"
        assert (None if call.prompt is None else turns(call)) == PLACED.get(route)
        if not route.endswith("frames") or route.startswith("a retriever"):
            assert call.documents[0] == Document("x", "i", "T", call.documents[0].metadata)


@pytest.mark.parametrize("streaming", [False, True])
async def test_generate_accepts_documents(streaming):
    fake = ChatRecorder()
    model = chat(fake, streaming=streaming)
    model.generate([[HumanMessage("p")], [HumanMessage("q")]], documents=[["x"], ["y", "z"]])
    await model.agenerate([[HumanMessage("p")], [HumanMessage("q")]], documents=["x"])
    model.generate_prompt([KVFusionPrompt.from_template(HUMAN).format_prompt(context=["x"], question="q")])
    assert [call.texts for call in fake.calls] == [["x"], ["y", "z"], ["x"], ["x"], ["x"]]
    assert {call.method for call in fake.calls} == {"stream" if streaming else "answer_batch"}


CARRYING = HumanMessage("Who?", additional_kwargs={"documents": ["z"]})


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([CARRYING], {"documents": ["x"]}),
        ([CARRYING, SystemMessage(FRAMES)], {}),
        ([HumanMessage("Who?"), SystemMessage(FRAMES)], {"documents": ["x"]}),
        ([*ROUTES["a retriever tool"][0]], {"documents": ["x"]}),
        (ROUTES["KVFusionPrompt"][0], {"documents": ["x"]}),
    ],
)
async def test_documents_in_two_places_are_rejected(given, options):
    fake = ChatRecorder()
    for call in (chat(fake).invoke, lambda *a, **k: list(chat(fake).stream(*a, **k))):
        with pytest.raises(InvalidInputError, match="one way only") as raised:
            call(given, **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(InvalidInputError, match="one way only"):
        await chat(fake).ainvoke(given, **options)
    assert not fake.calls


def test_documents_of_earlier_turns_are_kept_with_distinct_ids():
    fake = ChatRecorder()
    search = [SEARCH, ToolMessage("x", artifact=FOUND[:1], tool_call_id="1")]
    chat(fake).invoke([HumanMessage("Who?"), *search, AIMessage("Ada"), HumanMessage("When?"), *search])
    assert fake.calls[0].ids == ["i", "i#2"]
    assert turns(fake.calls[0]) == [("user", "Who?"), ("assistant", "Ada"), ("user", "When?")]
    assert fake.calls[0].question == "When?"


# Messages


def test_roles_of_messages():
    fake = ChatRecorder()
    chat(fake).invoke(
        [
            SystemMessage("Be brief."),
            HumanMessage("Who?"),
            AIMessage([{"type": "text", "text": "Ada"}, {"type": "reasoning", "reasoning": "hm"}]),
            ChatMessage("Go on.", role="user"),
            ChatMessage("Well.", role="assistant"),
            ChatMessage("Overheard.", role="neighbour"),
            ("human", "Question: When?"),
        ]
    )
    assert turns(fake.calls[0]) == [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Ada"),
        ("user", "Go on."),
        ("assistant", "Well."),
        ("user", "Overheard."),
        ("user", "Question: When?"),
    ]
    assert fake.calls[0].question == "When?"


@pytest.mark.parametrize("artifact", [None, "raw", [], ["text"], {"documents": []}])
def test_tool_result_without_documents_becomes_a_user_message(artifact):
    fake = ChatRecorder()
    chat(fake).invoke(
        [HumanMessage("How warm?"), SEARCH, ToolMessage("20 degrees", artifact=artifact, tool_call_id="1")]
    )
    assert turns(fake.calls[0]) == [("user", "How warm?"), ("user", "20 degrees")]
    assert (fake.calls[0].question, fake.calls[0].documents) == ("How warm?", [])


def test_question_variable_is_the_question():
    fake = ChatRecorder()
    inner = ChatPromptTemplate.from_messages([("system", "Rules."), ("human", "{context} Tell {name}: {question}")])
    chain = KVFusionPrompt.from_prompt(inner) | chat(fake)
    chain.invoke({"context": FOUND, "name": "Ada", "question": "Who?"})
    assert turns(fake.calls[0]) == [("system", "Rules."), ("user", "{documents} Tell Ada: Who?")]
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x", "y"], "Who?")


def test_question_may_be_in_the_system_message():
    fake = ChatRecorder()
    inner = ChatPromptTemplate.from_messages([("system", "Question: {question}"), ("human", "{context}")])
    (KVFusionPrompt.from_prompt(inner) | chat(fake)).invoke({"context": FOUND, "question": "Who?"})
    framed = inner.format_prompt(context=FRAMES, question="Who?")
    chat(fake).invoke(framed)
    for call in fake.calls:
        assert (turns(call), call.question) == ([("system", "Question: Who?"), ("user", "{documents}")], "Who?")


def test_question_is_found_in_a_framed_human_message():
    fake = ChatRecorder()
    prompt = PromptTemplate.from_template(HUMAN).format(context=FRAMES, question="Who?")
    chat(fake).invoke(prompt)
    assert turns(fake.calls[0]) == [("user", "Be brief.\n\n{documents}\n\nQuestion: Who?")]
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x", "y"], "Who?")


def test_white_space_is_kept_and_the_place_is_plain_data():
    recorder, fake = Recorder(), ChatRecorder()
    inner = ChatPromptTemplate.from_messages([("system", " Rules:\n {context} \n"), ("human", "\n{question} ")])
    (KVFusionPrompt.from_prompt(inner) | chat(fake, callbacks=[recorder])).invoke(
        {"context": FOUND, "question": "Who?"}
    )
    assert turns(fake.calls[0]) == [("system", " Rules:\n {documents} \n"), ("user", "\nWho? ")]
    system, human = recorder.prompts[0][0]
    assert system.additional_kwargs == {"documents_place": {"offset": 9, "separator": "\n\n", "titles": False}}
    assert set(human.additional_kwargs) == {"documents", "question"}
    chat(fake).invoke(json.loads(json.dumps([each.model_dump() for each in (system, human)])))
    assert fake.calls[1].prompt == fake.calls[0].prompt


def test_caller_can_set_the_place_of_documents():
    fake = ChatRecorder()
    system = SystemMessage("Read:\n\nBe brief.", additional_kwargs={"documents_place": {"offset": 6}})
    chat(fake).invoke([system, HumanMessage("Who?")], documents=FOUND)
    assert turns(fake.calls[0]) == [("system", "Read:\n{documents}\nBe brief."), ("user", "Who?")]


@pytest.mark.parametrize("place", ["here", {}, {"offset": "6"}, {"offset": 6, "size": 1}, 6])
def test_invalid_place_is_rejected(place):
    with pytest.raises(InvalidInputError, match="documents_place"):
        chat().invoke([HumanMessage("Who?", additional_kwargs={"documents_place": place})])


def test_documents_of_several_messages_are_placed_at_the_first():
    fake = ChatRecorder()
    first, second = FRAMES.split("\n\n")
    chat(fake).invoke([SystemMessage(f"A\n{first}\nB"), HumanMessage(f"C\n\n{second}\n\nQuestion: Who?")])
    assert turns(fake.calls[0]) == [("system", "A\n{documents}\nB"), ("user", "C\n\nQuestion: Who?")]
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x", "y"], "Who?")


@pytest.mark.parametrize(
    "given", [[], [SystemMessage("Be brief.")], [HumanMessage(" ")], [AIMessage("Hello")], "", [SystemMessage(FRAMES)]]
)
def test_prompt_without_a_question_is_rejected(given):
    with pytest.raises(InvalidInputError, match="no human message"):
        chat().invoke(given)


def test_last_message_must_be_human():
    with pytest.raises(InvalidInputError, match="'ai', but it must be the user's question"):
        chat().invoke([HumanMessage("Who?"), AIMessage("Ada")])


def test_content_that_is_not_text_is_rejected():
    with pytest.raises(InvalidInputError, match="'image'"):
        chat().invoke([HumanMessage([{"type": "image", "url": "http://a"}])])


def test_forged_frames_are_rejected():
    forged = frame(Document("Ada wrote it.")).replace("Ada", "Eve")
    for message in (HumanMessage(f"Who? {forged}"), ToolMessage(forged, tool_call_id="1"), AIMessage(forged)):
        with pytest.raises(InvalidInputError, match="did not write"):
            chat().invoke([message, HumanMessage("Who?")])


def test_messages_of_the_caller_are_not_changed():
    messages = [SystemMessage(FRAMES), HumanMessage("Who?")]
    before = copy.deepcopy(messages)
    chat().invoke(messages)
    chat().invoke(messages[1:], documents=["x"])
    assert messages == before


# Options


def test_unknown_options_and_fields_are_rejected():
    with pytest.raises(InvalidInputError, match="max_length"):
        chat().invoke("q", max_length=3)
    with pytest.raises(InvalidInputError, match="max_length"):
        list(chat().stream("q", max_length=3))
    for field in ("max_length", "api_key"):
        with pytest.raises(ValueError, match=field):
            chat(**{field: "3"})
    for values in ({"timeout": 0}, {"max_retries": -1}):
        with pytest.raises(ValueError, match=next(iter(values))):
            chat(**values)


@pytest.mark.parametrize("name", ["model", "model_name", "model_id"])
def test_model_name_must_match_the_loaded_model(name):
    assert chat(**{name: "fake/model"}).model_name == "fake/model"
    with pytest.raises(InvalidInputError, match="other/model"):
        chat(**{name: "other/model"})
    assert chat().invoke("q", model="fake/model").text == "in lima"
    with pytest.raises(InvalidInputError, match=r"other/model.*from_model_id"):
        chat().invoke("q", model="other/model")


def test_model_for_bare_questions_warns_about_a_joined_prompt(caplog):
    fake = ChatRecorder(follows_instructions=False)
    chat(fake).invoke("q", documents=["x"])
    assert not caplog.text
    chat(fake).invoke("Context: x\n\nQuestion: q")
    assert "KVFusionPrompt.from_prompt" in caplog.text


def test_the_profile_names_what_the_model_can_do():
    assert chat().profile == {
        "text_inputs": True,
        "text_outputs": True,
        "image_inputs": False,
        "tool_calling": True,
        "structured_output": True,
        "max_input_tokens": 4096,
    }


# LangChain's response cache

PAIRS: list[tuple[Any, Any]] = [
    *(((given, options), ("Who?", {})) for given, options in ROUTES.values()),
    (("Who?", {"documents": ["a\n\nb"]}), ("Who?", {"documents": ["a", "b"]})),
    (("Who?", {"documents": [Document("a", "1")]}), ("Who?", {"documents": [Document("a", "2")]})),
    (("Who?", {"documents": [Document("a", title="1")]}), ("Who?", {"documents": [Document("a")]})),
    (("Who?", {"temperature": 0.5}), ("Who?", {"temperature": 0.4})),
    (("Who?", {"stop": ["a"]}), ("Who?", {"stop": ["b"]})),
    (("Who?", {"mode": "concat"}), ("Who?", {})),
    (("Who?", {"chat_template_kwargs": {"a": 1}}), ("Who?", {"chat_template_kwargs": {"a": 2}})),
    (
        (KVFusionPrompt.from_template("{context}a{question}").format_prompt(context=["a"], question="p"), {}),
        (KVFusionPrompt.from_template("a{context}{question}").format_prompt(context=["a"], question="p"), {}),
    ),
    (
        ([HumanMessage("Who?"), SEARCH, ToolMessage("x", artifact=FOUND[:1], tool_call_id="1")], {}),
        ([HumanMessage("Who?"), SEARCH, ToolMessage("x", artifact=FOUND[1:], tool_call_id="1")], {}),
    ),
    (
        (KVFusionPrompt.from_template("{context} {question}").format_prompt(context=["a"], question="p"), {}),
        (KVFusionPrompt.from_template("{context} {question}").format_prompt(context=["b"], question="p"), {}),
    ),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("first", "second"), PAIRS)
async def test_different_documents_or_options_are_not_served_from_the_cache(first, second, is_async):
    fake = EchoGenerator()
    model = chat(fake, cache=InMemoryCache())
    for _ in range(2):
        for given, options in (first, second):
            for each in (model, model.bind()):
                await each.ainvoke(given, **options) if is_async else each.invoke(given, **options)
    assert len(fake.calls) == 2


def test_frames_have_the_same_cache_key_in_every_process(monkeypatch):
    fake = EchoGenerator()
    model = chat(fake, cache=InMemoryCache())
    for key in (b"one process", b"another process"):
        monkeypatch.setattr("langchain_kvfusion.framing._signing_key", lambda key=key: key)
        model.invoke([SystemMessage(frame(Document("x"))), HumanMessage("Who?")])
    assert len(fake.calls) == 1
