"""ChatKVFusion as a LangChain chat model: where documents come from, turns, options, results, streams, limits."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
import time
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder, turns
from fakes import EchoGenerator
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as LangChainDocument
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField

from kvfusion_rag import Document, InvalidInputError, OverloadError
from langchain_kvfusion import (
    AnswerTimeoutError,
    ChatKVFusion,
    KVFusionDocumentPrompt,
    KVFusionPrompt,
    UnsupportedFeatureError,
)
from langchain_kvfusion.framing import frame

FOUND = [LangChainDocument("x", id="i", metadata={"title": "T"}), LangChainDocument("y")]
SEARCH = AIMessage("Let me look.", tool_calls=[{"name": "search", "args": {"query": "who"}, "id": "1"}])


def chat(fake: Any = None, **fields: Any) -> ChatKVFusion:
    return ChatKVFusion(generator=fake or ChatRecorder(), **fields)


class Recorder(BaseCallbackHandler):
    """Notes what LangChain tells callbacks, in order."""

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.prompts: list[list[list[BaseMessage]]] = []
        self.tokens: list[str] = []
        self.errors: list[BaseException] = []

    def on_chat_model_start(self, serialized: Any, messages: list[list[BaseMessage]], **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, **kwargs})
        self.prompts.append(messages)

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


async def v3(model: Any, given: Any, **options: Any) -> list[str]:
    stream = model.stream_events(given, version="v3", **options)
    async_stream = await model.astream_events(given, version="v3", **options)
    return [str(stream.output.text), str((await async_stream).text)]


async def every_way(model: Any, given: Any, **options: Any) -> list[str]:
    """The answers that all ways of calling give."""
    return [
        model.invoke(given, **options).text,
        (await model.ainvoke(given, **options)).text,
        "".join(piece.text for piece in model.stream(given, **options)),
        "".join([piece.text async for piece in model.astream(given, **options)]),
        *(answer.text for answer in model.batch([given], **options)),
        *(answer.text for answer in await model.abatch([given], **options)),
        *await v3(model, given, **options),
    ]


# Where documents come from

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
PLACED = {  # the prompts that show where the documents stand; the others are bare questions
    "frames": [("system", "{documents}"), ("user", "Who?")],
    "KVFusionPrompt": [("user", "{documents}\n\nWho?")],
    "FusedPrompt": [("user", "{documents}\n\nWho?")],
}


@pytest.mark.parametrize("route", ROUTES)
async def test_documents_from_every_source_are_separated(route):
    given, options = ROUTES[route]
    fake = ChatRecorder()
    assert set(await every_way(chat(fake), given, **options)) == {"in lima"}
    assert set(await every_way(chat(fake).bind(**options), given)) == {"in lima"}
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


async def test_nested_documents_belong_to_the_inputs_of_a_batch():
    model = chat(EchoGenerator())
    expected = ["p <- a at 0.0", "q <- b + c at 0.0"]
    nested = {"documents": [["a"], ["b", "c"]]}
    assert [answer.text for answer in model.batch(["p", "q"], **nested)] == expected
    assert [answer.text for answer in await model.abatch(["p", "q"], **nested)] == expected
    assert [answer.text for answer in model.bind(**nested).batch(["p", "q"])] == expected
    assert [answer.text for answer in model.batch(["p", "q"], documents=["d"])] == ["p <- d at 0.0", "q <- d at 0.0"]
    with pytest.raises(InvalidInputError, match="one list per prompt"):
        model.batch(["p", "q"], documents=[["a"]])
    failed = model.batch(["p", "q"], documents=[["a"]], return_exceptions=True)
    failed += await model.abatch(["p", "q"], documents=[["a"]], return_exceptions=True)
    assert [type(error) for error in failed] == [InvalidInputError] * 4


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


# Turns


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


async def test_options_of_a_call_override_those_of_the_model():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "mode": "concat",
        "focus": 2,
        "attribution": "effects",
        "stop": ["and so on"],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    fake = ChatRecorder()
    model = chat(fake, max_new_tokens=7, stop=["."], temperature=0.1, seed=9)
    await every_way(model, "q", **given, max_tokens=3)
    await every_way(model.bind(**given, max_new_tokens=3), "q")
    assert all(call.options == {**given, "max_new_tokens": 3} for call in fake.calls)
    model.invoke("q", temperature=None)
    assert fake.calls[-1].options == {
        "temperature": 0.1,
        "max_new_tokens": 7,
        "top_p": 1.0,
        "top_k": None,
        "seed": 9,
        "mode": None,
        "focus": "auto",
        "attribution": None,
        "chat_template_kwargs": None,
        "stop": ["."],
    }


def test_template_variables_of_call_and_model_are_merged():
    fake = ChatRecorder()
    model = chat(fake, chat_template_kwargs={"a": 1, "b": 1})
    model.invoke("q", chat_template_kwargs={"b": 2})
    model.invoke("q", mode="auto")
    assert [call.options["chat_template_kwargs"] for call in fake.calls] == [{"a": 1, "b": 2}, {"a": 1, "b": 1}]
    assert fake.calls[1].options["mode"] == "auto"
    assert model._identifying_params["chat_template_kwargs"] == {"a": 1, "b": 1}


def test_show_prompt_has_the_arguments_of_invoke():
    fake = ChatRecorder()
    model = chat(fake, mode="concat", chat_template_kwargs={"a": 1})
    prompt = KVFusionPrompt.from_template("{context}\n\n{question}")
    variables = {"context": FOUND, "question": "Who?"}
    (prompt | model).invoke(variables)
    assert (prompt | model.show_prompt).invoke(variables).text == "\n\nWho?"
    model.invoke("Who?", documents=FOUND)
    model.show_prompt("Who?", documents=FOUND, mode="fusion", chat_template_kwargs={"a": 2})
    read, shown, beside, beside_shown = fake.calls
    assert (shown.method, shown.options) == (
        "show_prompt",
        {"mode": "concat", "focus": "auto", "chat_template_kwargs": {"a": 1}},
    )
    assert beside_shown.options == {"mode": "fusion", "focus": "auto", "chat_template_kwargs": {"a": 2}}
    for asked, seen in ((read, shown), (beside, beside_shown)):
        assert (asked.question, asked.documents, asked.prompt) == (seen.question, seen.documents, seen.prompt)


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


def test_settings_are_configurable():
    fake = ChatRecorder()
    model = chat(fake).configurable_fields(temperature=ConfigurableField(id="t"))
    model.with_config(configurable={"t": 0.7}).invoke("q")
    assert fake.calls[0].options["temperature"] == 0.7


def test_strict_rejects_prompts_without_documents():
    assert chat(strict=True).invoke("q", documents=["x"]).text == "in lima"
    with pytest.raises(InvalidInputError, match="ChatKVFusion is strict"):
        chat(strict=True).invoke("q")


def test_model_for_bare_questions_warns_about_a_joined_prompt(caplog):
    fake = ChatRecorder(follows_instructions=False)
    chat(fake).invoke("q", documents=["x"])
    assert not caplog.text
    chat(fake).invoke("Context: x\n\nQuestion: q")
    assert "KVFusionPrompt.from_prompt" in caplog.text


def test_tools_and_schemas_are_rejected_with_an_alternative():
    with pytest.raises(UnsupportedFeatureError, match="content_and_artifact"):
        chat().bind_tools([lambda x: x])
    with pytest.raises(UnsupportedFeatureError, match="output parser"):
        chat().with_structured_output({"title": "x"})
    assert issubclass(UnsupportedFeatureError, NotImplementedError)
    assert chat().profile == {
        "text_inputs": True,
        "text_outputs": True,
        "image_inputs": False,
        "tool_calling": False,
        "structured_output": False,
        "max_input_tokens": 4096,
    }


# Results


async def test_messages_contain_sources_and_token_counts():
    documents = [Document("born In Lima", "a", "T"), Document("born In Lima", "b")]
    model = chat()
    streamed = list(model.stream("Where?", documents=documents))
    astreamed = [piece async for piece in model.astream("Where?", documents=documents)]
    assert [piece.chunk_position for piece in streamed] == [None, None, "last"]
    assert [piece.usage_metadata is None for piece in streamed] == [True, True, False]
    v3 = model.stream_events("Where?", version="v3", documents=documents).output
    for message in (
        model.invoke("Where?", documents=documents),
        await model.ainvoke("Where?", documents=documents),
        streamed[0] + streamed[1] + streamed[2],
        astreamed[0] + astreamed[1] + astreamed[2],
        v3,
    ):
        assert message.text == "in lima"
        assert message.usage_metadata == {
            "input_tokens": 7,
            "output_tokens": 2,
            "total_tokens": 9,
            "input_token_details": {"cache_read": 0},
        }
        said = message.response_metadata
        assert (said["model_name"], said["model_provider"]) == ("fake/model", "kvfusion")
        assert (said["mode"], said["finish_reason"], said["cited_text"]) == ("fusion", "stop", "In Lima")
        assert [(s["id"], s["title"], s["duplicate_of"]) for s in said["sources"]] == [
            ("a", "T", None),
            ("b", None, "a"),
        ]
        assert said["citations"][0] == {"document_id": "a", "start": 5, "end": 12, "text": "In Lima"}
        json.dumps(said)


async def test_callbacks_and_events_receive_pieces():
    recorder = Recorder()
    model = chat(callbacks=[recorder])
    assert [piece.text for piece in model.stream("q")] == recorder.tokens == ["in", " lima", ""]
    assert [piece.text async for piece in model.astream("q")] == recorder.tokens[3:]
    events = [event async for event in model.astream_events("q", version="v2")]
    pieces = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(pieces) == "in lima"
    assert events[-1]["data"]["output"].usage_metadata["output_tokens"] == 2
    chat(streaming=True, callbacks=[fresh := Recorder()]).invoke("q")
    assert fresh.tokens == ["in", " lima", ""]


async def test_traces_show_documents_only_in_messages():
    recorder = Recorder()
    model = chat(callbacks=[recorder], temperature=0.5)
    model.invoke("q", documents=FOUND, temperature=0.1, stop=["."])
    await model.ainvoke("q", documents=FOUND, temperature=0.1, stop=["."])
    list(model.stream("q", documents=FOUND, temperature=0.1, stop=["."]))
    for start, prompts in zip(recorder.starts, recorder.prompts, strict=True):
        params = start["invocation_params"]
        assert (params["_type"], params["temperature"], params["stop"]) == ("kvfusion-chat", 0.1, ["."])
        assert params["generator"] == ChatRecorder().identity()
        assert "documents" not in params and "documents" not in start["metadata"]
        assert (start["metadata"]["ls_model_name"], start["metadata"]["ls_temperature"]) == ("fake/model", 0.1)
        assert [d["text"] for d in prompts[0][0].additional_kwargs["documents"]] == ["x", "y"]
        json.dumps(prompts[0][0].additional_kwargs)


def test_langsmith_parameters():
    model = chat(max_tokens=7, temperature=0.5, stop=["."])
    assert model._get_ls_params() == {
        "ls_provider": "kvfusion",
        "ls_model_type": "chat",
        "ls_model_name": "fake/model",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["."],
    }
    assert model._get_ls_params(max_new_tokens=3).get("ls_max_tokens") == 3
    assert "ls_max_tokens" not in chat()._get_ls_params()


def test_identifying_parameters_contain_everything_that_affects_an_answer():
    params = chat()._identifying_params
    assert params["generator"] == ChatRecorder().identity()
    assert {"temperature", "max_tokens", "top_p", "top_k", "seed", "mode", "stop"} <= set(params)
    json.dumps(params)


def test_token_ids_come_from_the_generator():
    assert chat().get_token_ids("one three five") == [3, 5, 4]
    assert chat().get_num_tokens_from_messages([HumanMessage("one three")]) == 3  # "Human: one three"


def test_generator_is_never_serialized():
    model = chat(ChatRecorder(pieces=("hidden words",)))
    for text in (repr(model), dumps(model), model.model_dump_json(), repr(model._serialized), repr(model.asdict())):
        assert "hidden words" not in text and "ChatRecorder" not in text
    restored = pickle.loads(pickle.dumps(model))
    with pytest.raises(InvalidInputError, match="ChatKVFusion has no generator"):
        restored.invoke("q")
    assert copy.deepcopy(model).generator is model.generator


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


# Async, limits of time, overload


async def test_event_loop_is_not_blocked():
    for call in ("ainvoke", "astream"):
        fake = ChatRecorder(hold=threading.Event())
        result = getattr(chat(fake), call)("q")
        task = asyncio.ensure_future(anext(result) if call == "astream" else result)
        while not fake.threads:
            await asyncio.sleep(0.001)
        fake.hold.set()  # only a loop that is free gets here
        await task
        assert threading.get_ident() not in fake.threads


async def test_streams_stopped_early_are_closed():
    fake = ChatRecorder()
    stream = chat(fake).stream("q")
    next(stream)
    stream.close()
    astream = chat(fake).astream("q")
    await anext(astream)
    await astream.aclose()
    await asyncio.sleep(0)
    assert [stream.closed for stream in fake.streams] == [True, True]


@pytest.mark.parametrize("call", ["invoke", "ainvoke", "astream"])
async def test_answer_is_stopped_after_the_timeout(call):
    fake = ChatRecorder(hold=threading.Event())
    model, recorder = chat(fake, timeout=0.05), Recorder()
    config: Any = {"callbacks": [recorder]}
    releasing = threading.Timer(0.5, fake.hold.set)  # the fake cannot be cancelled in the midst of a step
    releasing.start()
    begun = time.monotonic()
    with pytest.raises(AnswerTimeoutError, match=r"timeout=0.05 s"):
        if call == "invoke":
            await asyncio.to_thread(model.invoke, "q", config)
        elif call == "ainvoke":
            await model.ainvoke("q", config)
        else:
            await anext(model.astream("q", config))
    if call != "invoke":
        assert time.monotonic() - begun < 0.4
    assert [type(error) for error in recorder.errors] == [AnswerTimeoutError]
    releasing.join()


def test_stream_is_stopped_between_pieces_after_the_timeout():
    class Slow(ChatRecorder):
        def step(self) -> None:
            time.sleep(0.05)

    fake = Slow()
    assert [piece.text for piece in chat(fake, timeout=10).stream("q")] == ["in", " lima", ""]
    with pytest.raises(AnswerTimeoutError):
        list(chat(fake, timeout=0.08).stream("q"))
    assert fake.streams[-1].closed
    slow_reader = chat(ChatRecorder(), timeout=0.08).stream("q")
    next(slow_reader)
    time.sleep(0.1)
    assert [piece.text for piece in slow_reader] == [" lima", ""]  # its reader's time is not the model's


async def test_sync_calls_with_a_timeout_work_inside_an_event_loop():
    assert chat(timeout=5).invoke("q").text == "in lima"


@pytest.mark.parametrize("is_async", [False, True])
async def test_overload_is_retried_max_retries_times(is_async, monkeypatch):
    async def no_wait(seconds: float) -> None: ...

    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr("asyncio.sleep", no_wait)
    for retries in (0, 2):
        fake = ChatRecorder(error=OverloadError("too many"))
        with pytest.raises(OverloadError):
            model = chat(fake, max_retries=retries)
            await model.ainvoke("q") if is_async else model.invoke("q")
        assert len(fake.calls) == retries + 1
    fake = ChatRecorder(error=RuntimeError("broken"))
    with pytest.raises(RuntimeError):
        chat(fake, max_retries=2).invoke("q")
    assert len(fake.calls) == 1
