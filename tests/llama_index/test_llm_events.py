"""Async calls, events, token counts and documents of `KVFusionLlamaIndexLLM`."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import sys
import threading
from collections.abc import Callable

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.schema import MetadataMode, TextNode
from llama_index_helpers import CHAT, COMPLETE, USER, EventLog, call, make

from kvfusion_rag import Document, MissingDependencyError
from llama_index_kvfusion.documents import to_documents

# Async


@pytest.mark.parametrize("way", ["acomplete", "astream_complete", "achat", "astream_chat"])
async def test_event_loop_is_not_blocked(way: str) -> None:
    llm, generator = make()
    generator.hold = threading.Event()
    task = asyncio.create_task(call(llm, way, USER if "chat" in way else "Where?"))
    while not generator.threads:  # until the generator is held
        await asyncio.sleep(0.001)
    ticks = 0
    for _ in range(5):
        await asyncio.sleep(0)
        ticks += 1
    assert not task.done()
    generator.hold.set()
    chunks = await task
    assert ticks == 5
    assert chunks[-1].raw["text"] == "in lima"
    assert threading.get_ident() not in generator.threads


def test_stream_stopped_early_is_closed() -> None:
    llm, generator = make()
    chunks = llm.stream_complete("Where?")
    next(chunks)
    chunks.close()
    del chunks
    assert generator.streams[0].closed


async def test_cancelled_async_stream_is_closed_after_its_step() -> None:
    llm, generator = make()
    chunks = await llm.astream_complete("Where?")
    await anext(chunks)
    generator.hold = threading.Event()
    step = asyncio.create_task(anext(chunks))
    while len(generator.threads) < 2:
        await asyncio.sleep(0.001)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert not generator.streams[0].closed
    generator.hold.set()
    await until(lambda: generator.streams[0].closed)


@pytest.mark.parametrize("way", COMPLETE + CHAT)
async def test_generator_errors_are_raised(way: str) -> None:
    llm, generator = make()
    generator.error, generator.fail_after = RuntimeError("out of memory"), 1
    with pytest.raises(RuntimeError, match="out of memory"):
        await call(llm, way, USER if way in CHAT else "Where?")
    await until(lambda: all(stream.closed for stream in generator.streams))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition did not come true")


# Events, callbacks and token counts


@pytest.mark.parametrize("way", COMPLETE + CHAT)
async def test_each_call_is_one_event_pair(way: str, events: EventLog) -> None:
    llm, _ = make()
    await call(llm, way, USER if way in CHAT else "Where?", documents=["a"])
    kind = "LLMChat" if way in CHAT else "LLMCompletion"
    progress = 3 if "stream" in way else 0
    assert events.names() == [f"{kind}Start", *[f"{kind}InProgress"] * progress, f"{kind}End"]
    start, end = events.seen[0], events.seen[-1]
    assert start.additional_kwargs["documents"] == ["a"]
    assert start.model_dict["model_name"] == "fake/model"
    assert end.response.raw["text"] == "in lima"


@pytest.mark.parametrize("way", COMPLETE + CHAT)
async def test_tokens_are_counted_once_with_documents(way: str) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: ["wrong"] * 1000)
    llm, _ = make(callback_manager=CallbackManager([counter]))
    await call(llm, way, USER if way in CHAT else "Where?", documents=["one two three"])
    assert (counter.prompt_llm_token_count, counter.completion_llm_token_count) == (3 + 1, 2)
    assert len(counter.llm_token_counts) == 1


# Documents


def test_metadata_mode_selects_the_text_of_a_node() -> None:
    node = TextNode(text="body", id_="n", metadata={"title": "T", "year": 1999})
    (bare,) = to_documents([node])
    (full,) = to_documents([node], MetadataMode.LLM)
    assert (bare.text, bare.title) == ("body", "T")
    assert (full.text, full.title) == ("title: T\nyear: 1999\n\nbody", None)


@pytest.mark.parametrize(
    "node",
    [
        TextNode(text="body", metadata={"title": "T"}, excluded_llm_metadata_keys=["title"]),
        TextNode(text="body", metadata={"title": " "}),
        TextNode(text="body", metadata={"title": 3}),
    ],
)
def test_invalid_titles_are_ignored(node: TextNode) -> None:
    assert to_documents([node])[0].title is None


def test_repeated_ids_are_numbered() -> None:
    items = [Document("a", id="x"), Document("b", id="x"), Document("c", id="x#2"), Document("d"), Document("e")]
    documents = to_documents(items)
    assert [d.id for d in documents] == ["x", "x#2", "x#2#2", None, None]
    assert [d.text for d in documents] == list("abcde")


def test_metadata_without_a_json_type_becomes_text() -> None:
    llm, _ = make()
    when = datetime.date(2024, 5, 1)
    raw = llm.complete("Where?", documents=[Document("a", metadata={"when": when, "n": 1})]).raw
    assert raw["sources"][0]["metadata"] == {"when": "2024-05-01", "n": 1}


def test_missing_llama_index_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_index_kvfusion"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core", None)
    with pytest.raises(MissingDependencyError, match=r'"\.\[llama-index\]"'):
        importlib.import_module("llama_index_kvfusion")
