"""OpenAI's tools and response formats: requests, complete replies and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llguidance")

import tiny
from fakes import RecordingGenerator
from openai import BadRequestError, OpenAI
from pydantic import BaseModel
from serving_client import CHAT, client_of, request
from tool_templates import tool_model

from kvfusion_rag import AnswerFormat, KVFusionGenerator, Message, Tool, ToolCall
from kvfusion_rag.serving import create_app, running
from kvfusion_rag.text.answer_format import MAX_DEPTH, MAX_FORMAT_CHARACTERS

CITY = {"type": "object", "properties": {"city": {"enum": ["Lima", "Oslo"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
LONG = {"const": "x" * MAX_FORMAT_CHARACTERS}
HISTORY = [
    {"role": "user", "content": "Where?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "12 degrees"}]},
]


@pytest.fixture(scope="module", params=["tagged", "none"])
def gen(request) -> KVFusionGenerator:
    return tool_model(request.param)


@pytest.fixture(scope="module")
def openai(gen) -> Iterator[OpenAI]:
    with running(create_app(gen)) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(openai: OpenAI, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": "Where is it warm?"}]
    given = {"model": "tiny-caller", "messages": messages, "max_tokens": 90, **options}
    return openai.chat.completions.create(**given)


def test_requests_reach_the_generator():
    generator = RecordingGenerator()
    body = request(*HISTORY, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    assert client_of(generator).post(CHAT, json={**body, "parallel_tool_calls": False}).status_code == 200
    [call] = generator.calls
    assert call.question == "Where?" and call.prompt == [
        Message("user", "Where?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Lima"}', "c1"),)),
        Message("tool", "12 degrees", tool_call_id="c1"),
    ]
    assert call.options["tools"] == [Tool("weather", "Tells it.", CITY), Tool("now")]
    assert (call.options["tool_choice"], call.options["parallel_tool_calls"]) == ("now", False)
    assert "response_format" not in call.options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "json_object"}, AnswerFormat.json_object()),
        ({"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}},
         AnswerFormat.json_schema(CITY)),
    ],
    ids=["json_object", "json_schema"],
)  # fmt: skip
def test_formats_reach_the_generator(given, expected):
    generator = RecordingGenerator()
    assert client_of(generator).post(CHAT, json=request(response_format=given)).status_code == 200
    assert generator.calls[0].options["response_format"] == expected and "tools" not in generator.calls[0].options


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_are_complete_in_replies_and_streams(openai, choice):
    options = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": 4}
    whole = ask(openai, **options).choices[0]
    [call] = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    if choice != "required":
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Lima", "Oslo")
    chunks = [chunk.choices[0] for chunk in ask(openai, stream=True, **options)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert (deltas[0].id, deltas[0].function.name, deltas[0].index) == (call.id, call.function.name, 0)
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_call_and_its_result_can_be_sent_back(openai):
    message = ask(openai, tools=TOOLS, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees"}
    turns = [{"role": "user", "content": "Where is it warm?"}, message, result]
    assert ask(openai, messages=turns, tools=TOOLS, max_tokens=5).choices[0].finish_reason in ("length", "stop")
    assert ask(openai, messages=turns, max_tokens=5).usage.prompt_tokens > 0  # tools are not repeated


def test_json_schemas_are_followed(openai):
    class Place(BaseModel):
        city: str = "Lima"
        warm: bool

    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    given = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    whole = ask(openai, response_format=given).choices[0]
    assert whole.finish_reason == "stop" and Place.model_validate_json(whole.message.content)
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(openai, response_format=given, stream=True)]
    assert "".join(pieces) == whole.message.content
    cut = ask(openai, response_format=given, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "two tools are named 'weather'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice is 'no'"),
        ({"tools": TOOLS, "stop": "x"}, "leave out stop"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": LONG}}}, "characters, but at most"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_cannot_be_followed_is_an_error_of_the_client(openai, fields, message):
    with pytest.raises(BadRequestError, match=message):
        ask(openai, **fields)


@pytest.mark.parametrize("kind", ["tools", "response_format"])
def test_hostile_schemas_are_rejected_or_followed_in_little_time(kind):
    nested: dict[str, Any] = {}
    for _ in range(MAX_DEPTH + 1):
        nested = {"items": nested}
    bomb = {"type": "string", "pattern": "((a{0,99}){0,99}){0,99}b"}
    client = client_of(tiny.generator(max_new_tokens=4))
    for schema in (nested, bomb, {"const": "\ud800<|im_end|>"}, {"$ref": "#"}, {"$ref": "file:///etc/passwd"}):
        place = {"type": "object", "properties": {"a": schema}}
        if kind == "tools":
            form: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "x", "parameters": place}}]}
        else:
            form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": place}}}
        found = client.post(CHAT, content=json.dumps({**request(), "model": "tiny-llama", **form}),
                            headers={"content-type": "application/json"})  # fmt: skip
        assert found.status_code in (200, 400), found.text
