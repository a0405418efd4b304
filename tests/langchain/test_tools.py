"""ChatKVFusion calls tools and answers with objects: options, histories, streams and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("llguidance")

from conversation_fakes import ChatRecorder
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from tool_templates import tool_model
from typing_extensions import TypedDict

from kvfusion_rag import InvalidInputError, Message, Tool, ToolCall
from langchain_kvfusion import ChatKVFusion


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"12 degrees in {city}"


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=6)
    warm: bool


class PlaceDict(TypedDict):
    """A place."""

    warm: bool


CALL: Any = {"name": "weather", "args": {"city": "Lima"}, "id": "c1", "type": "tool_call"}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def chat(name: str = "tagged", **fields: Any) -> ChatKVFusion:
    return ChatKVFusion(generator=tool_model(name), max_tokens=90, **fields)


def test_bound_tools_reach_the_generator():
    fake = ChatRecorder()
    for given, expected in [(None, None), ("any", "required"), (True, "required"), ("weather", "weather"),
                            ({"type": "function", "function": {"name": "weather"}}, "weather")]:  # fmt: skip
        ChatKVFusion(generator=fake).bind_tools([weather], tool_choice=given).invoke("Where?", documents=["x"])
        options = fake.calls[-1].options
        assert options.get("tool_choice") == expected
        [bound] = options["tools"]
        assert isinstance(bound, Tool) and (bound.name, bound.description) == ("weather", "Tells the weather.")
        assert bound.parameters["required"] == ["city"] and fake.calls[-1].texts == ["x"]
    with pytest.raises(InvalidInputError, match=r"tool_choice is 'later'.*: weather"):
        ChatKVFusion(generator=fake).bind_tools([weather], tool_choice="later")


def test_no_tools_are_the_same_as_none_bound():
    fake = ChatRecorder()
    ChatKVFusion(generator=fake).bind_tools([]).invoke("Where?")
    ChatKVFusion(generator=fake).invoke("Where?")
    assert fake.calls[0] == fake.calls[1]


@pytest.mark.parametrize("name", ["tagged", "none"])
async def test_calls_are_equal_in_answers_and_streams(name):
    bound = chat(name).bind_tools(TOOLS, tool_choice="any")
    message = bound.invoke("Where?")
    assert isinstance(message, AIMessage)
    [call] = message.tool_calls
    assert (call["name"], call["args"]) == ("now", {}) and call["id"]
    assert message.response_metadata["finish_reason"] == "tool_calls" and message.content == ""
    chunks = list(bound.stream("Where?"))
    assert chunks[0].tool_call_chunks[0]["name"] == "now"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls == message.tool_calls
    assert (await bound.ainvoke("Where?")).tool_calls == message.tool_calls


def test_calls_and_results_are_messages_if_tools_are_bound():
    fake = ChatRecorder()
    history = [HumanMessage("Where?"), AIMessage("so", tool_calls=[CALL]), ToolMessage("12", tool_call_id="c1")]
    ChatKVFusion(generator=fake).bind_tools([weather]).invoke(history)
    assert list(fake.calls[0].prompt) == [
        Message("user", "Where?"),
        Message("assistant", "so", tool_calls=(ToolCall("weather", '{"city": "Lima"}', "c1"),)),
        Message("tool", "12", tool_call_id="c1"),
    ]
    assert fake.calls[0].question == "Where?"
    ChatKVFusion(generator=fake).invoke(history)
    assert [message.role for message in fake.calls[1].prompt] == ["user", "user"]


def test_retrieved_documents_stay_documents_if_tools_are_bound():
    fake, found = ChatRecorder(), [LangChainDocument("the mill")]
    search: Any = {**CALL, "name": "search", "id": "c2"}
    history = [
        HumanMessage("Where?"), AIMessage("", tool_calls=[search, CALL]),
        ToolMessage("the mill", artifact=found, tool_call_id="c2"), ToolMessage("12", tool_call_id="c1"),
    ]  # fmt: skip
    ChatKVFusion(generator=fake).bind_tools([weather]).invoke(history)
    assert fake.calls[0].texts == ["the mill"]
    assert [message.role for message in fake.calls[0].prompt] == ["user", "assistant", "tool"]
    assert [call.name for call in fake.calls[0].prompt[1].tool_calls] == ["weather"]


def test_a_call_that_was_cut_is_invalid():
    message = chat().bind_tools([weather], tool_choice="any").invoke("Where?", max_tokens=40)
    assert isinstance(message, AIMessage)
    assert not message.tool_calls and message.invalid_tool_calls[0]["name"] == "weather"
    assert message.response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("name", ["tagged", "none"])
async def test_answers_are_objects_of_a_schema(method, name):
    model = chat(name)
    for schema in (Place, PlaceDict, Place.model_json_schema()):
        bound = model.with_structured_output(schema, method=method)
        found = bound.invoke("Where?")
        assert isinstance(found, Place) if schema is Place else isinstance(found["warm"], bool)
        assert await bound.ainvoke("Where?") == found == list(bound.stream("Where?"))[-1]
    raw = model.with_structured_output(Place, method=method, include_raw=True).invoke("Where?")
    assert isinstance(raw["raw"], AIMessage) and isinstance(raw["parsed"], Place) and raw["parsing_error"] is None
    cut = model.with_structured_output(Place, method=method, include_raw=True).invoke("Where?", max_tokens=30)
    assert cut["raw"].response_metadata["finish_reason"] in ("length", "tool_calls", "stop")


def test_json_mode_needs_no_schema():
    fake = ChatRecorder()
    with pytest.raises(Exception, match="in lima"):  # the fake does not answer with JSON
        ChatKVFusion(generator=fake).with_structured_output(method="json_mode").invoke("Where?")
    assert fake.calls[0].options["response_format"] == {"type": "json_object"}


def test_wrong_methods_are_rejected():
    with pytest.raises(InvalidInputError, match="method is 'magic'"):
        chat().with_structured_output(Place, method="magic")
    with pytest.raises(InvalidInputError, match="schema is None"):
        chat().with_structured_output()


def test_a_response_format_is_an_option_of_every_call():
    given: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": Place.model_json_schema()}}
    for answer in (chat().invoke("Where?", response_format=given), chat().bind(response_format=Place).invoke("q")):
        assert Place.model_validate(json.loads(answer.text))
