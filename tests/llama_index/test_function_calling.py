"""KVFusionLlamaIndexLLM calls functions and answers with objects, in LlamaIndex's own programs and agents."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("llguidance")

from fakes import RecordingGenerator
from llama_index.core.agent import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field
from tool_templates import tool_model

from kvfusion_rag import InvalidInputError, Message, Tool, ToolCall
from llama_index_kvfusion import KVFusionLlamaIndexLLM

pytestmark = pytest.mark.usefixtures("no_default_llm")


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=6)
    warm: bool


def warm(is_warm: bool) -> str:
    """Tells whether it is warm."""
    return f"warm: {is_warm}"


WARM = FunctionTool.from_defaults(warm)


def llm(name: str = "tagged") -> KVFusionLlamaIndexLLM:
    return KVFusionLlamaIndexLLM(tool_model(name), max_new_tokens=120)


def test_tools_reach_the_generator():
    generator = RecordingGenerator()
    fake = KVFusionLlamaIndexLLM(generator)
    fake.chat_with_tools([WARM], "Where?", tool_required=True, documents=["x"])
    [call] = generator.calls
    [tool] = call.options["tools"]
    assert isinstance(tool, Tool) and tool.name == "warm" and tool.parameters["required"] == ["is_warm"]
    assert (call.options["tool_choice"], call.options["parallel_tool_calls"]) == ("required", False)
    assert (call.texts, call.question) == (["x"], "Where?")
    fake.chat_with_tools([], "Where?")
    assert "tools" not in generator.calls[1].options


def test_calls_and_results_are_messages_if_there_are_tools():
    generator = RecordingGenerator()
    block = ToolCallBlock(tool_call_id="c1", tool_name="warm", tool_kwargs={"is_warm": True})
    history = [
        ChatMessage(role=MessageRole.USER, content="Where?"),
        ChatMessage(role=MessageRole.ASSISTANT, blocks=[block]),
        ChatMessage(role=MessageRole.TOOL, content="yes", additional_kwargs={"tool_call_id": "c1"}),
    ]
    KVFusionLlamaIndexLLM(generator).chat_with_tools([WARM], chat_history=history)
    assert generator.calls[0].prompt == [
        Message("user", "Where?"),
        Message("assistant", "", tool_calls=(ToolCall("warm", '{"is_warm": true}', "c1"),)),
        Message("tool", "yes", tool_call_id="c1"),
    ]
    assert generator.calls[0].question == "Where?"
    KVFusionLlamaIndexLLM(generator).chat(history)
    assert [message.role for message in generator.calls[1].prompt] == ["user", "assistant", "user"]


@pytest.mark.parametrize("name", ["tagged", "none"])
async def test_calls_are_equal_in_answers_and_streams(name):
    model = llm(name)
    options: dict[str, Any] = {"tools": [WARM], "user_msg": "Where?", "tool_required": True}
    response = model.chat_with_tools(**options)
    [selection] = model.get_tool_calls_from_response(response)
    assert selection.tool_name == "warm" and isinstance(selection.tool_kwargs["is_warm"], bool) and selection.tool_id
    last = list(model.stream_chat_with_tools(**options))[-1]
    assert model.get_tool_calls_from_response(last) == [selection]
    for chunk in model.stream_chat_with_tools(**options):
        model.get_tool_calls_from_response(chunk, error_on_no_tool_call=False)
    assert model.get_tool_calls_from_response(await model.achat_with_tools(**options)) == [selection]
    called = model.predict_and_call([WARM], "Where?", tool_required=True)
    assert called.response == f"warm: {selection.tool_kwargs['is_warm']}"


def test_an_answer_without_a_call_is_an_error_if_one_is_needed():
    generator = RecordingGenerator()
    fake = KVFusionLlamaIndexLLM(generator)
    response: ChatResponse = fake.chat_with_tools([WARM], "Where?")
    assert fake.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(InvalidInputError, match="the answer 'in lima' calls no tool"):
        fake.get_tool_calls_from_response(response)


@pytest.mark.parametrize("name", ["tagged", "none"])
async def test_structured_answers(name):
    model = llm(name)
    prompt = PromptTemplate("Where in {country}?")
    found = model.structured_predict(Place, prompt, country="Peru")
    assert isinstance(found, Place)
    assert await model.astructured_predict(Place, prompt, country="Peru") == found
    *_, last = model.stream_structured_predict(Place, prompt, country="Peru")
    assert last.model_dump() == found.model_dump()
    *_, last = [each async for each in await model.astream_structured_predict(Place, prompt, country="Peru")]
    assert last.model_dump() == found.model_dump()
    raw = model.as_structured_llm(Place).chat([ChatMessage("Where in Peru?")]).raw
    assert isinstance(raw, Place)


def test_a_response_format_is_an_option_of_every_call():
    model = llm()
    assert Place.model_validate_json(model.complete("Where?", response_format=Place, documents=["the mill"]).text)
    assert Place.model_validate_json(model.chat([ChatMessage("Where?")], response_format=Place).message.content or "")


async def test_a_function_agent_uses_the_model():
    model = llm()
    assert model.metadata.is_function_calling_model
    answer = await FunctionAgent(tools=[WARM], llm=model, streaming=False).run("Where is it warm?")
    assert isinstance(str(answer), str)
