"""All kinds of LangChain chains, graphs and agents pass on separate documents after a few changed lines."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")
pytest.importorskip("langchain")
pytest.importorskip("langgraph")

from conversation_fakes import ChatRecorder, turns
from fakes import EchoGenerator
from langchain_core.caches import BaseCache, InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_routes import (
    PROMPT,
    ROUTES,
    SHELF,
    Route,
    Shelf,
    agent,
    agent_apart,
    graph,
    graph_apart,
    lcel_apart,
    planner,
)

from langchain_kvfusion import ChatKVFusion, KVFusionLLM, KVFusionPrompt

PAGE = Path(__file__).parent.parent.parent / "docs" / "langchain.md"
QUESTION = "Who grinds flour?"
CASES = [
    (route, make)
    for route in ROUTES
    for make in (KVFusionLLM, ChatKVFusion)
    if make is ChatKVFusion or not route.chat_only
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_original_chains_join_their_documents(route: Route):
    answer = route.before(FakeListChatModel(responses=["an answer"])).invoke(QUESTION)
    assert answer in ("an answer", "the planner's own words")
    fake = ChatRecorder()
    route.before(ChatKVFusion(generator=fake)).invoke(QUESTION)
    assert all(not call.documents for call in fake.calls)  # replacing only the model is not enough


@pytest.mark.parametrize(("route", "make"), CASES)
async def test_changed_chains_separate_their_documents(route: Route, make: Any):
    fake = ChatRecorder()
    chain = route.after(make(generator=fake))
    answers = [chain.invoke(QUESTION)]
    if not route.chat_only:  # the scripted planner of the agent can be used only once
        answers += [await chain.ainvoke(QUESTION), *chain.batch([QUESTION]), *await chain.abatch([QUESTION])]
    if not route.is_graph:  # graphs stream states, not tokens
        answers += ["".join(chain.stream(QUESTION)), "".join([piece async for piece in chain.astream(QUESTION)])]
    assert set(answers) == {"in lima"}
    assert len(fake.calls) == len(answers)
    texts = [SHELF[name] for name in route.found]
    for call in fake.calls:
        assert call.texts == texts
        assert call.question == (route.question or QUESTION)
        read = "" if call.prompt is None else " ".join(text for _, text in turns(call))
        assert not any(text in read for text in SHELF.values())
        assert ("{documents}" in read) == (route.before not in (graph, agent))


def test_docs_list_the_number_of_changed_lines():
    rows = [line.strip("| ").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    claimed = {row[0].strip(): int(row[1]) for row in rows if len(row) == 3 and row[1].strip().isdecimal()}
    assert claimed == {route.name: route.changed_lines for route in ROUTES}


# Graphs and agents


def test_agent_answers_from_the_documents_of_its_tool():
    fake = ChatRecorder()
    model = ChatKVFusion(generator=fake)
    final = agent_apart(model).invoke(QUESTION)
    assert final == "in lima"
    [call] = fake.calls
    assert (call.ids, call.question) == (["lamp", "mill"], QUESTION)
    assert turns(call) == [("system", "Be brief."), ("user", QUESTION)]


async def test_async_agent_with_async_middleware():
    from langchain.agents import create_agent
    from langchain.agents.middleware import wrap_model_call
    from langchain_core.tools import create_retriever_tool

    fake = ChatRecorder()
    model = ChatKVFusion(generator=fake)

    @wrap_model_call
    async def answer_from_documents(request: Any, handler: Any) -> Any:
        found = isinstance(request.messages[-1], ToolMessage)
        return await handler(request.override(model=model, tools=[]) if found else request)

    tool = create_retriever_tool(Shelf(), "search", "Searches.", response_format="content_and_artifact")
    built = create_agent(planner(), [tool], middleware=[answer_from_documents])
    state = await built.ainvoke({"messages": [HumanMessage(QUESTION)]})
    assert (state["messages"][-1].text, fake.calls[0].ids) == ("in lima", ["lamp", "mill"])
    assert state["messages"][-1].usage_metadata["output_tokens"] == 2


def test_graph_streams_tokens():
    graph = graph_apart(ChatKVFusion(generator=ChatRecorder())).middle[0]
    pieces = [piece.text for piece, _ in graph.stream({"question": QUESTION}, stream_mode="messages")]
    assert pieces == ["in", " lima", ""]


async def test_small_model_answers_in_chains_and_graphs():
    model = ChatKVFusion(generator=tiny.speaker("1874"))
    for route in (lcel_apart, graph_apart):
        assert route(model).invoke("When was the lamp lit?") == "1874"
        assert await route(model).ainvoke("When was the lamp lit?") == "1874"


def apart(model: Any) -> Any:
    return KVFusionPrompt.from_prompt(PROMPT) | model | StrOutputParser()


# LangChain's response caches with chains


class SQLiteCache(BaseCache):
    """Like the cache of langchain-community: the key consists of two texts, and generations are stored as JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with sqlite3.connect(path) as database:
            database.execute("create table if not exists answers (prompt, llm, value, primary key (prompt, llm))")

    def lookup(self, prompt: str, llm_string: str) -> Sequence[Any] | None:
        with sqlite3.connect(self._path) as database:
            row = database.execute(
                "select value from answers where prompt = ? and llm = ?", (prompt, llm_string)
            ).fetchone()
        return None if row is None else [loads(each, allowed_objects="core") for each in json.loads(row[0])]

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Any]) -> None:
        value = json.dumps([dumps(generation) for generation in return_val])
        with sqlite3.connect(self._path) as database:
            database.execute("insert or replace into answers values (?, ?, ?)", (prompt, llm_string, value))

    def clear(self, **kwargs: Any) -> None:
        with sqlite3.connect(self._path) as database:
            database.execute("delete from answers")


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize(("route", "make"), CASES)
async def test_caches_reuse_answers_only_for_the_same_documents(route: Route, make: Any, kind: str, tmp_path: Path):
    fake = EchoGenerator()
    set_llm_cache(InMemoryCache() if kind == "memory" else SQLiteCache(tmp_path / "answers.db"))
    try:
        first = [route.after(make(generator=fake)).invoke(QUESTION) for _ in range(2)]
        if not route.chat_only:
            first.append(await route.after(make(generator=fake)).ainvoke(QUESTION))
        assert len(set(first)) == 1
        assert len(fake.calls) == 1
        others = Shelf(names=[name for name in SHELF if name not in route.found]).invoke("")
        other = apart(make(generator=fake)).invoke({"context": others, "question": route.question or QUESTION})
        assert SHELF["clerk"] in other or SHELF["mill"] in other
        assert other not in first
    finally:
        set_llm_cache(None)
