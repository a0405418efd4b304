"""Results, callbacks, time limits and retries of ChatKVFusion."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder
from langchain_models import FOUND, Recorder, chat

from kvfusion_rag import Document, OverloadError
from langchain_kvfusion import AnswerTimeoutError

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
            "output_token_details": {"reasoning": 0},
        }
        said = message.response_metadata
        assert (said["model_name"], said["model_provider"]) == ("fake/model", "kvfusion")
        assert (said["mode"], said["finish_reason"], said["cited_text"]) == ("fusion", "stop", "In Lima")
        assert [(s["id"], s["title"], s["duplicate_of"]) for s in said["sources"]] == [
            ("a", "T", None),
            ("b", None, "a"),
        ]
        assert said["citations"][0] == {"document_id": "a", "start": 5, "end": 12, "text": "In Lima", "place": None}
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


# Async, time limits, overload


@pytest.mark.parametrize("call", ["invoke", "ainvoke", "astream"])
async def test_answer_is_stopped_after_the_timeout(call):
    fake = ChatRecorder(hold=threading.Event())
    model, recorder = chat(fake, timeout=0.05), Recorder()
    config: Any = {"callbacks": [recorder]}
    releasing = threading.Timer(0.5, fake.hold.set)  # the fake cannot be cancelled within a step
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
    assert [piece.text for piece in slow_reader] == [" lima", ""]  # the time of the consumer does not count


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
