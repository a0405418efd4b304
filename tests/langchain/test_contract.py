"""What LangChain expects of every model: batches, callbacks, fallbacks of streams, caches and parameters."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder
from fakes import EchoGenerator
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import collect_runs
from langchain_models import MODELS, text

from langchain_kvfusion import ChatKVFusion, KVFusionLLM


class Watcher(BaseCallbackHandler):
    """Records starts, ends and errors of runs."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.params: list[dict[str, Any]] = []
        self.ended: dict[Any, str] = {}
        self.failed: list[tuple[BaseException, LLMResult | None]] = []

    def on_llm_start(self, serialized: Any, prompts: Any, **kwargs: Any) -> None:
        self.sizes.append(kwargs["batch_size"])
        self.params.append(kwargs["invocation_params"])

    on_chat_model_start = on_llm_start

    def on_llm_end(self, response: LLMResult, *, run_id: Any, **kwargs: Any) -> None:
        self.ended[run_id] = response.generations[0][0].text

    def on_llm_error(self, error: BaseException, *, response: LLMResult | None = None, **kwargs: Any) -> None:
        self.failed.append((error, response))


@MODELS
async def test_batches_keep_their_order_with_any_concurrency(make):
    model = make(generator=EchoGenerator())
    questions = [f"q{number}" for number in range(7)]
    expected = [f"{question} <- a at 0.0" for question in questions]
    for config in ({}, {"max_concurrency": 3}):
        assert [text(a) for a in model.batch(questions, config, documents=["a"])] == expected
        assert [text(a) for a in await model.abatch(questions, config, documents=["a"])] == expected
    found = dict(model.batch_as_completed(questions, documents=["a"]))
    found_async = dict([pair async for pair in model.abatch_as_completed(questions, documents=["a"])])
    assert [text(found[n]) for n in range(7)] == [text(found_async[n]) for n in range(7)] == expected


async def test_callbacks_receive_the_batch_size():
    watcher = Watcher()
    llm = KVFusionLLM(generator=ChatRecorder(), callbacks=[watcher])
    llm.generate(["a", "b", "c"])
    assert watcher.sizes == [3, 3, 3]
    llm.batch(["a", "b"], {"max_concurrency": 1})
    await llm.abatch(["a", "b"])
    llm.invoke("a")
    list(llm.stream("a"))
    assert watcher.sizes[3:] == [1, 1, 2, 2, 1, 1]


@MODELS
async def test_each_prompt_of_a_batch_has_its_own_run(make):
    watcher = Watcher()
    make(generator=EchoGenerator(), callbacks=[watcher]).batch(["p", "q"])
    assert sorted(watcher.ended.values()) == ["p <-  at 0.0", "q <-  at 0.0"]


@MODELS
async def test_failed_runs_are_reported_as_errors(make):
    error, watcher = RuntimeError("no"), Watcher()

    class AsyncWatcher(AsyncCallbackHandler):
        def __init__(self) -> None:
            self.failed: list[BaseException] = []

        async def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
            self.failed.append(error)

    on_loop = AsyncWatcher()
    model = make(generator=ChatRecorder(error=error, fail_after=1), callbacks=[watcher, on_loop])
    for call in (lambda: model.invoke("q"), lambda: list(model.stream("q"))):
        with pytest.raises(RuntimeError):
            call()
    for acall in (model.ainvoke("q"), _drain(model.astream("q"))):
        with pytest.raises(RuntimeError):
            await acall
    assert [failed for failed, _ in watcher.failed] == [error] * 4
    assert on_loop.failed[-2:] == [error] * 2
    assert all(isinstance(response, LLMResult) for _, response in watcher.failed)
    assert not watcher.ended


async def _drain(stream: Any) -> list[Any]:
    return [piece async for piece in stream]


@pytest.mark.parametrize("missing", [["_astream"], ["_stream", "_astream"]])
async def test_subclass_without_streams_falls_back(missing):
    overrides = {name: getattr(BaseLLM, name) for name in missing}
    llm = type("Limited", (KVFusionLLM,), overrides)(generator=ChatRecorder())
    pieces = await _drain(llm.astream("q", documents=["x"]))
    assert "".join(pieces) == "in lima"
    assert llm.generator.calls[0].method == ("stream" if missing == ["_astream"] else "answer_batch")
    assert llm.generator.calls[0].texts == ["x"]


async def test_chat_model_with_disabled_streaming_yields_one_piece():
    model = ChatKVFusion(generator=ChatRecorder(), disable_streaming=True)
    assert [piece.text for piece in model.stream("q", documents=["x"])] == ["in lima"]
    assert [piece.text for piece in await _drain(model.astream("q", documents=["x"]))] == ["in lima"]
    assert {call.method for call in model.generator.calls} == {"answer_batch"}


@MODELS
async def test_own_cache_overrides_the_global_one_and_false_disables_both(make):
    everyone, own = InMemoryCache(), InMemoryCache()
    set_llm_cache(everyone)
    try:
        fake = EchoGenerator()
        for model in (make(generator=fake, cache=own), make(generator=fake, cache=False)):
            for _ in range(2):
                model.invoke("q", documents=["a"])
                await model.ainvoke("q", documents=["a"])
        assert len(fake.calls) == 1 + 4
        assert (len(own._cache), len(everyone._cache)) == (1, 0)
        make(generator=fake).batch(["q", "q"], documents=["a"], config={"max_concurrency": 1})
        assert len(everyone._cache) == 1
    finally:
        set_llm_cache(None)


@MODELS
async def test_runs_record_the_parameters_of_a_call(make):
    watcher = Watcher()
    model = make(generator=ChatRecorder(), callbacks=[watcher], temperature=0.4)
    with collect_runs() as collected:
        model.invoke("q", stop=["."], max_tokens=5)
        await model.ainvoke("q", stop=["."], max_tokens=5)
        list(model.stream("q", stop=["."], max_tokens=5))
    for params in watcher.params:
        assert (params["temperature"], params["max_tokens"], params["stop"]) == (0.4, 5, ["."])
    for run in collected.traced_runs:
        metadata = run.extra["metadata"]
        assert (metadata["ls_provider"], metadata["ls_model_name"]) == ("kvfusion", "fake/model")
        assert (metadata["ls_temperature"], metadata["ls_max_tokens"], metadata["ls_stop"]) == (0.4, 5, ["."])
