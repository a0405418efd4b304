"""Agents and workflows that use `KVFusionSynthesizer`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from fakes import EchoGenerator, RecordingGenerator
from llama_index.core.agent import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from llama_index_helpers import FixedRetriever

from kvfusion_rag import Message
from llama_index_kvfusion import KVFusionLlamaIndexLLM, KVFusionSynthesizer

pytestmark = pytest.mark.usefixtures("no_default_llm")

QUESTION = "Where was it?"
TEXTS = ["It was in Lima.", "It rained.", "Nobody knows."]


def nodes(texts: Sequence[str] = TEXTS) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{number}"), score=1 / number)
        for number, text in enumerate(texts, start=1)
    ]


def make(generator: Any = None) -> tuple[KVFusionSynthesizer, Any]:
    generator = RecordingGenerator() if generator is None else generator
    return KVFusionSynthesizer(KVFusionLlamaIndexLLM(generator)), generator


def planner(*turns: ChatMessage) -> MockFunctionCallingLLM:
    """Return an LLM for agents that gives scripted answers."""
    script = iter(turns)
    return MockFunctionCallingLLM(response_generator=lambda messages, **_: next(script))


def says(text: str = "", *blocks: Any) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*ChatMessage(content=text).blocks, *blocks])


def query_tool(synthesizer: KVFusionSynthesizer) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(synthesizer.as_query_engine(FixedRetriever(nodes())), name="facts")


async def test_function_agent_with_a_query_engine_tool() -> None:
    """The engine of the tool changes. The LLM of the agent does not."""
    synthesizer, generator = make()
    called = ToolCallBlock(tool_call_id="1", tool_name="facts", tool_kwargs={"input": QUESTION})
    llm = planner(says("", called), says("In Lima, it says."))
    agent = FunctionAgent(tools=[query_tool(synthesizer)], llm=llm, streaming=False)
    answer = await agent.run("Find out where it was.")
    (call,) = generator.calls
    assert (call.question, call.texts) == (QUESTION, TEXTS)
    (used,) = answer.tool_calls
    assert used.tool_output.content == "in lima"
    assert used.tool_output.raw_output.metadata["kvfusion"]["cited_text"] == "in Lima"
    assert str(answer) == "In Lima, it says."


async def test_react_agent_with_a_query_engine_tool() -> None:
    synthesizer, generator = make()
    thought = f'Thought: I need the tool.\nAction: facts\nAction Input: {{"input": "{QUESTION}"}}'
    llm = planner(says(thought), says("Thought: I can answer.\nAnswer: In Lima."))
    answer = await ReActAgent(tools=[query_tool(synthesizer)], llm=llm, streaming=False).run("Find out.")
    (call,) = generator.calls
    assert (call.question, call.texts) == (QUESTION, TEXTS)
    assert (str(answer), answer.tool_calls[0].tool_output.content) == ("In Lima.", "in lima")


class ScriptedGenerator(RecordingGenerator):
    """Gives scripted answers to prompts without documents."""

    script: Any = None

    def answer_to(self, call: Any) -> Any:
        self.pieces = ("in", " lima") if call.documents else (next(self.script),)
        return super().answer_to(call)


async def test_react_agent_with_our_llm_as_planner_too() -> None:
    """Our LLM can be the planner. Tool results reach it as user messages."""
    generator = ScriptedGenerator()
    action = f'Thought: I need the tool.\nAction: facts\nAction Input: {{"input": "{QUESTION}"}}'
    generator.script = iter([action, "Thought: I can answer.\nAnswer: In Lima."])
    synthesizer, _ = make(generator)
    agent = ReActAgent(tools=[query_tool(synthesizer)], llm=synthesizer.llm, streaming=False)
    assert str(await agent.run("Find out.")) == "In Lima."
    first, tool, last = generator.calls
    assert (first.documents, tool.texts, last.documents) == ([], TEXTS, [])
    assert [message.role for message in last.prompt] == ["system", "user", "assistant", "user"]
    assert last.prompt[-1] == Message("user", "Observation: in lima")


class Answering(Workflow):
    """A workflow with a step that uses a synthesizer."""

    def __init__(self, synthesizer: KVFusionSynthesizer) -> None:
        super().__init__(timeout=30)
        self._synthesizer = synthesizer

    @step
    async def answer(self, context: Context, event: StartEvent) -> StopEvent:
        response = await self._synthesizer.asynthesize(event.question, nodes())
        return StopEvent(result=response)


async def test_workflow_with_a_synthesizer() -> None:
    """``get_response_synthesizer(llm)`` -> ``KVFusionSynthesizer(llm)``, awaited in the step."""
    synthesizer, generator = make()
    response = await Answering(synthesizer).run(question=QUESTION)
    assert generator.calls[0].texts == TEXTS
    assert response.metadata["kvfusion"]["cited_text"] == "in Lima"


async def test_concurrent_workflows_have_separate_answers() -> None:
    synthesizer, _ = make(EchoGenerator())
    questions = [f"Question {number}?" for number in range(5)]
    responses = await asyncio.gather(*(Answering(synthesizer).run(question=question) for question in questions))
    assert [str(response).partition(" <- ")[0] for response in responses] == questions
