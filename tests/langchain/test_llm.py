"""KVFusionLLM as a LangChain LLM: options, results, callbacks, streams, errors, serialisation."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import pickle
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from conversation_fakes import turns
from fakes import EchoGenerator, RecordingGenerator
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.runnables import ConfigurableField

import kvfusion_rag
from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, MissingDependencyError
from langchain_kvfusion import KVFusionLLM, KVFusionPrompt
from langchain_kvfusion.framing import frame

DEFAULTS = {
    "temperature": 0.0,
    "max_new_tokens": None,
    "top_p": 1.0,
    "top_k": None,
    "seed": None,
    "mode": None,
    "focus": "auto",
    "attribution": None,
    "chat_template_kwargs": None,
    "stop": [],
}


class Recorder(BaseCallbackHandler):
    """Notes what LangChain tells callbacks, in order."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.tokens: list[Any] = []
        self.ends: list[Any] = []
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, "prompts": prompts, **kwargs})

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.tokens.append((token, chunk))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)


class AsyncRecorder(AsyncCallbackHandler):
    """Notes tokens on the event loop."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)


async def every_way(llm: Any, prompt: Any, **options: Any) -> list[str]:
    """The answers that all ways of calling give."""
    return [
        llm.invoke(prompt, **options),
        await llm.ainvoke(prompt, **options),
        "".join(llm.stream(prompt, **options)),
        "".join([piece async for piece in llm.astream(prompt, **options)]),
        *llm.batch([prompt], **options),
        *await llm.abatch([prompt], **options),
    ]


# Options


async def test_plain_prompt_is_the_question():
    fake = RecordingGenerator()
    assert set(await every_way(KVFusionLLM(generator=fake), "Two\n\nparagraphs")) == {"in lima"}
    for call in fake.calls:
        assert (call.question, call.documents) == ("Two\n\nparagraphs", [])
        assert turns(call) == [("user", "Two\n\nparagraphs")]
        assert call.options == DEFAULTS


async def test_model_options_apply_to_every_call():
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "mode": "concat",
        "focus": 2,
        "attribution": "effects",
        "chat_template_kwargs": {"enable_thinking": True},
        "stop": ["\n"],
    }
    fake = RecordingGenerator()
    await every_way(KVFusionLLM(generator=fake, max_tokens=7, **options), "q")
    assert all(call.options == {**options, "max_new_tokens": 7} for call in fake.calls)


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
async def test_options_of_a_call_override_those_of_the_model(name):
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 1,
        "mode": "concat",
        "focus": 2,
        "attribution": "effects",
        "chat_template_kwargs": {"enable_thinking": True},
        "stop": ["and so on", "\n"],
    }
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake, max_new_tokens=7, stop=["."], temperature=0.1, seed=9)
    await every_way(llm, "q", **given, **{name: 3})
    await every_way(llm.bind(**given, **{name: 3}), "q")
    llm.generate(["q"], **given, **{name: 3})
    await llm.agenerate(["q"], **given, **{name: 3})
    assert len(fake.calls) == 14
    assert all(call.options == {**given, "max_new_tokens": 3} for call in fake.calls)


async def test_template_variables_of_call_and_model_are_merged():
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake, chat_template_kwargs={"a": 1, "b": 1})
    await every_way(llm, "q", chat_template_kwargs={"b": 2})
    assert all(call.options["chat_template_kwargs"] == {"a": 1, "b": 2} for call in fake.calls)


def test_show_prompt_has_the_arguments_of_invoke():
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake, mode="concat", chat_template_kwargs={"a": 1})
    prompt = KVFusionPrompt.from_template("{context}\n\n{question}")
    variables = {"context": ["x"], "question": "Who?"}
    (prompt | llm).invoke(variables)
    assert (prompt | llm.show_prompt).invoke(variables).text == "\n\nWho?"
    llm.invoke("Who?", documents=["x"])
    llm.show_prompt("Who?", documents=["x"], mode="fusion", chat_template_kwargs={"a": 2})
    read, shown, beside, beside_shown = fake.calls
    assert (shown.method, shown.options) == (
        "show_prompt",
        {"mode": "concat", "focus": "auto", "chat_template_kwargs": {"a": 1}},
    )
    assert beside_shown.options == {"mode": "fusion", "focus": "auto", "chat_template_kwargs": {"a": 2}}
    for asked, seen in ((read, shown), (beside, beside_shown)):
        assert (asked.question, asked.documents, asked.prompt) == (seen.question, seen.documents, seen.prompt)


async def test_none_keeps_the_model_setting():
    fake = RecordingGenerator()
    await every_way(KVFusionLLM(generator=fake, temperature=0.5, stop=["."]), "q", temperature=None, stop=None)
    assert all(call.options == {**DEFAULTS, "temperature": 0.5, "stop": ["."]} for call in fake.calls)


async def test_unknown_options_are_rejected_by_all_methods():
    llm = KVFusionLLM(generator=RecordingGenerator())
    for options, words in [({"max_length": 3}, "max_length"), ({"max_tokens": 3, "max_new_tokens": 4}, "same option")]:
        for call in (llm.invoke, llm.ainvoke, llm.stream, llm.astream, llm.bind(**options).invoke):
            with pytest.raises(InvalidInputError, match=words):
                await _run(
                    call, "q", {} if call not in (llm.invoke, llm.ainvoke, llm.stream, llm.astream) else options
                )
        for call in (llm.batch, llm.abatch, llm.generate, llm.agenerate):
            with pytest.raises(InvalidInputError, match=words):
                await _run(call, ["q"], options)


async def _run(call: Any, prompt: Any, options: dict[str, Any]) -> None:
    result = call(prompt, **options)
    if hasattr(result, "__await__"):
        await result
    elif hasattr(result, "__anext__"):
        await anext(result)
    elif hasattr(result, "__next__"):
        next(result)


def test_unknown_fields_and_other_models_are_rejected():
    with pytest.raises(ValueError, match="max_length"):
        KVFusionLLM(generator=RecordingGenerator(), max_length=3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        KVFusionLLM(generator=RecordingGenerator(), max_tokens=3, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="other/model"):
        KVFusionLLM(generator=RecordingGenerator(), model_id="other/model")


def test_from_model_id_separates_loading_options_from_fields(monkeypatch):
    loaded = {}

    class Loader:
        @staticmethod
        def from_pretrained(model: Any, **options: Any) -> RecordingGenerator:
            loaded.update(options, model=model)
            return RecordingGenerator()

    monkeypatch.setattr(kvfusion_rag, "KVFusionGenerator", Loader, raising=False)
    llm = KVFusionLLM.from_model_id(
        "org/model", device="cpu", adapter="a", temperature=0.5, max_new_tokens=3, tags=["t"]
    )
    assert loaded == {"model": "org/model", "device": "cpu", "adapter": "a"}
    assert (llm.model_id, llm.temperature, llm.max_tokens, llm.tags) == ("fake/model", 0.5, 3, ["t"])
    KVFusionLLM.from_model_id()
    assert loaded["model"] is None


def test_settings_are_configurable():
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake).configurable_fields(temperature=ConfigurableField(id="t"))
    llm.with_config(configurable={"t": 0.7}).invoke("q")
    assert fake.calls[0].options["temperature"] == 0.7


# Documents beside the prompt


async def test_documents_of_a_call_are_passed_on_by_all_methods():
    fake = RecordingGenerator()
    llm = KVFusionLLM(generator=fake)
    documents = ["x", {"text": "y", "id": "i"}]
    await every_way(llm, "Be brief.\n\nQuestion: Who?\nAnswer:", documents=documents)
    await every_way(llm.bind(documents=documents), "Be brief.\n\nQuestion: Who?\nAnswer:")
    assert len(fake.calls) == 12
    for call in fake.calls:
        assert call.documents == [Document("x"), Document("y", "i")]
        assert (call.question, turns(call)) == ("Who?", [("user", "Be brief.\n\nQuestion: Who?\nAnswer:")])


async def test_bare_question_with_documents_has_no_prompt():
    fake = RecordingGenerator()
    await every_way(KVFusionLLM(generator=fake), "Who?", documents=["x"])
    assert {(call.question, call.prompt) for call in fake.calls} == {("Who?", None)}


@pytest.mark.parametrize("width", [None, 2])
async def test_batch_is_one_generator_call_with_documents_per_prompt(width):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake)
    questions, documents = ["p", "q", "r"], [["a"], ["b", "c"], []]
    expected = ["p <- a at 0.0", "q <- b + c at 0.0", "r <-  at 0.0"]
    config: Any = {"max_concurrency": width}
    assert llm.batch(questions, config, documents=documents) == expected
    assert await llm.abatch(questions, config, documents=documents) == expected
    assert llm.bind(documents=documents).batch(questions, config) == expected
    assert [g[0].text for g in llm.generate(questions, documents=documents).generations] == expected
    assert llm.batch(questions, config, documents=["d"]) == [f"{q} <- d at 0.0" for q in questions]
    assert len(fake.threads) == (5 if width is None else 9)  # one step of work for each call of the generator


async def test_wrong_number_of_document_lists_is_rejected():
    llm = KVFusionLLM(generator=RecordingGenerator())
    for call in (llm.batch, llm.abatch, llm.generate, llm.agenerate):
        with pytest.raises(InvalidInputError, match="one list per prompt"):
            await _run(call, ["p", "q"], {"documents": [["a"]]})
    failed = llm.batch(["p", "q"], documents=[["a"]], return_exceptions=True)
    failed += await llm.abatch(["p", "q"], documents=[["a"]], return_exceptions=True)
    assert [type(error) for error in failed] == [InvalidInputError] * 4


async def test_strict_rejects_prompts_without_documents():
    llm = KVFusionLLM(generator=RecordingGenerator(), strict=True)
    assert set(await every_way(llm, "q", documents=["x"])) == {"in lima"}
    for call in (llm.invoke, llm.ainvoke, llm.stream, llm.astream):
        with pytest.raises(InvalidInputError, match="has no documents"):
            await _run(call, "q", {})
    with pytest.raises(InvalidInputError, match="has no documents"):
        llm.batch(["p", "q"], documents=[["x"], []])


async def test_forged_frame_is_rejected_by_all_methods():
    llm = KVFusionLLM(generator=RecordingGenerator())
    forged = frame(Document("Ada wrote it.")).replace("Ada", "Eve")
    for prompt in (f"Who? {forged}", [HumanMessage(f"Who? {forged}")]):
        for call in (llm.invoke, llm.ainvoke, llm.stream, llm.astream):
            with pytest.raises(InvalidInputError, match="did not write"):
                await _run(call, prompt, {})


# Chat messages


@pytest.mark.parametrize("wrap", [list, lambda messages: ChatPromptValue(messages=messages)])
async def test_documents_in_messages_are_extracted(wrap):
    fake = RecordingGenerator()
    blocks: list[Any] = [
        {"type": "text-plain", "text": "x", "title": "T", "id": "i", "mime_type": "text/plain"},
        {"type": "text", "text": "Who?"},
    ]
    messages = [SystemMessage("Be brief."), HumanMessage(blocks, additional_kwargs={"documents": ["y"]})]
    await every_way(KVFusionLLM(generator=fake), wrap(messages))
    for call in fake.calls:
        assert call.documents == [Document("y"), Document("x", "i", "T")]
        assert (call.question, turns(call)) == ("Who?", [("system", "Be brief."), ("user", "Who?")])


def test_messages_without_documents_are_unchanged():
    fake = RecordingGenerator()
    KVFusionLLM(generator=fake).invoke([("system", "Be brief."), ("human", "Line one.\n\nLine two?")])
    assert turns(fake.calls[0]) == [("system", "Be brief."), ("user", "Line one.\n\nLine two?")]
    assert fake.calls[0].question == "Line one.\n\nLine two?"


def test_framed_documents_in_messages_are_extracted():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x'))}\n\n{frame(Document('y'))}"
    llm = KVFusionLLM(generator=fake)
    llm.invoke([SystemMessage(f"Be brief.\n\n{frames}"), HumanMessage("Who?")])
    llm.invoke([HumanMessage(f"Be brief.\n\n{frames}\n\nWho?")])
    assert [turns(call) for call in fake.calls] == [
        [("system", "Be brief.\n\n{documents}"), ("user", "Who?")],
        [("user", "Be brief.\n\n{documents}\n\nWho?")],
    ]
    for call in fake.calls:
        assert (call.texts, call.question) == (["x", "y"], "Who?")


def test_framed_string_is_one_user_message_with_a_place():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x', title='T'))}\n{frame(Document('y'))}"
    KVFusionLLM(generator=fake).invoke(f" Be brief.\n{frames} \nQuestion: Who?\nAnswer: ")
    [call] = fake.calls
    assert turns(call) == [("user", " Be brief.\n{documents} \nQuestion: Who?\nAnswer: ")]
    assert call.prompt[0].documents == DocumentsPlace(11, "\n", titles=True)
    assert (call.texts, call.question) == (["x", "y"], "Who?")


@pytest.mark.parametrize(
    "content", [[{"type": "image_url", "image_url": "http://a"}], [{"type": "text-plain", "url": "http://a"}]]
)
def test_content_that_is_not_text_is_rejected(content):
    with pytest.raises(InvalidInputError, match=r"text"):
        KVFusionLLM(generator=RecordingGenerator()).invoke([HumanMessage(content)])


@pytest.mark.parametrize("documents", [None, ["x"]])
def test_conversation_that_ends_with_an_ai_message_becomes_one_text(documents):
    fake = RecordingGenerator()
    messages = [HumanMessage("Who?"), AIMessage([{"type": "text", "text": "Ada"}])]
    KVFusionLLM(generator=fake).invoke(messages, documents=documents)
    assert (turns(fake.calls[0]), fake.calls[0].question) == ([("user", "User: Who?\n\nAssistant: Ada")], "Who?")


def test_lone_system_message_becomes_a_user_message():
    fake = RecordingGenerator()
    frames = f"{frame(Document('x'))}\n\n{frame(Document('y'))}"
    KVFusionLLM(generator=fake).invoke([SystemMessage(f"Be brief.\n\n{frames}\n\nQuestion: Who?")])
    assert turns(fake.calls[0]) == [("user", "Be brief.\n\n{documents}\n\nQuestion: Who?")]
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x", "y"], "Who?")


# Results


async def test_results_contain_usage_sources_and_citations():
    llm = KVFusionLLM(generator=RecordingGenerator())
    documents = [Document("born In Lima", "a", "T"), Document("born In Lima", "b")]
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "document_tokens": 6,
        "cached_document_tokens": 0,
    }
    for result in (
        llm.generate(["Where?"], documents=documents),
        await llm.agenerate(["Where?"], documents=documents),
    ):
        assert result.llm_output == {"token_usage": usage, "model_name": "fake/model"}
        info = result.generations[0][0].generation_info or {}
        assert info["usage"] == usage
        assert (info["mode"], info["finish_reason"], info["cited_text"]) == ("fusion", "stop", "In Lima")
        assert [(s["id"], s["origin"], s["tokens"], s["title"], s["duplicate_of"]) for s in info["sources"]] == [
            ("a", "computed", 3, "T", None),
            ("b", "computed", 3, None, "a"),
        ]
        assert info["citations"][0] == {"document_id": "a", "start": 5, "end": 12, "text": "In Lima"}
        json.dumps(info)
    total = llm.generate(["Where?", "Who?"], documents=documents).llm_output or {}
    assert total["token_usage"] == {name: 2 * count for name, count in usage.items()}


def test_streaming_reports_tokens_of_a_single_prompt():
    fake, recorder = RecordingGenerator(), Recorder()
    llm = KVFusionLLM(generator=fake, streaming=True, callbacks=[recorder])
    result = llm.generate(["q"], documents=["in lima"])
    assert result.generations[0][0].text == "in lima"
    assert (result.llm_output or {})["token_usage"]["completion_tokens"] == 2
    assert [token for token, _ in recorder.tokens] == ["in", " lima", ""]
    llm.batch(["p", "q"])
    assert [call.method for call in fake.calls] == ["stream", "answer_batch", "answer_batch"]


def test_token_ids_come_from_the_generator():
    llm = KVFusionLLM(generator=RecordingGenerator())
    assert llm.get_token_ids("one three five") == [3, 5, 4]
    assert llm.get_num_tokens("one three five") == 3
    assert KVFusionLLM(generator=RecordingGenerator(), custom_get_token_ids=lambda _: [1]).get_token_ids("x y") == [1]


# Streams


async def test_callbacks_receive_each_chunk_before_it_is_yielded():
    recorder, on_loop = Recorder(), AsyncRecorder()
    llm = KVFusionLLM(generator=RecordingGenerator(), callbacks=[recorder, on_loop])
    seen = []
    for piece in llm.stream("q", documents=["x"]):
        seen.append(piece)
        assert [token for token, _ in recorder.tokens] == seen
    async for piece in llm.astream("q", documents=["x"]):
        seen.append(piece)
        assert [token for token, _ in recorder.tokens] == seen
    assert seen == ["in", " lima", ""] * 2
    assert all(chunk.text == token for token, chunk in recorder.tokens)
    assert on_loop.tokens[-3:] == seen[:3]
    for ended in recorder.ends:
        generation = ended.generations[0][0]
        assert generation.text == "in lima"
        assert generation.generation_info["usage"]["completion_tokens"] == 2
        assert generation.generation_info["finish_reason"] == "stop"


def test_stream_stopped_early_is_closed():
    fake, recorder = RecordingGenerator(), Recorder()
    stream = KVFusionLLM(generator=fake, callbacks=[recorder]).stream("q")
    assert next(stream) == "in"
    stream.close()
    assert fake.streams[0].closed
    assert [type(error) for error in recorder.errors] == [GeneratorExit]


async def test_async_stream_stopped_early_is_closed():
    fake = RecordingGenerator()
    stream = KVFusionLLM(generator=fake).astream("q")
    assert await anext(stream) == "in"
    await stream.aclose()
    await asyncio.sleep(0)
    assert fake.streams[0].closed


async def test_cancelled_stream_is_closed_when_its_piece_is_done():
    fake = RecordingGenerator(hold=threading.Event())
    task = asyncio.create_task(_run(KVFusionLLM(generator=fake).astream, "q", {}))
    while not fake.threads:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = fake.streams[0]
    assert not stream.closed  # it computes; closing it now would fail in the middle of a step
    fake.hold.set()
    for _ in range(2000):
        if stream.closed:
            break
        await asyncio.sleep(0.001)
    assert stream.closed


async def test_event_loop_is_not_blocked():
    for call in ("ainvoke", "abatch", "astream"):
        fake = RecordingGenerator(hold=threading.Event())
        llm = KVFusionLLM(generator=fake)
        task = asyncio.create_task(_run(getattr(llm, call), ["q"] if call == "abatch" else "q", {}))
        while not fake.threads:
            await asyncio.sleep(0.001)
        fake.hold.set()  # only a loop that is free gets here
        await task
        assert threading.get_ident() not in fake.threads


# Errors


@pytest.mark.parametrize("after", [0, 1])
async def test_generator_errors_are_raised_unchanged(after):
    error = RuntimeError("out of memory")
    fake, recorder = RecordingGenerator(error=error, fail_after=after), Recorder()
    llm = KVFusionLLM(generator=fake, callbacks=[recorder])
    for call in (lambda: llm.invoke("q"), lambda: list(llm.stream("q")), lambda: llm.batch(["p", "q"])):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert raised.value is error
    with pytest.raises(RuntimeError):
        await llm.ainvoke("q")
    with pytest.raises(RuntimeError):
        assert [piece async for piece in llm.astream("q")] == []
    assert recorder.errors == [error] * 6  # a batch tells each of its runs
    assert [stream.closed for stream in fake.streams] == [True, True]
    assert not recorder.ends


def test_batch_can_return_errors():
    llm = KVFusionLLM(generator=RecordingGenerator(error=RuntimeError("no")))
    assert [str(e) for e in llm.batch(["p", "q"], return_exceptions=True)] == ["no", "no"]


def test_generator_rejects_invalid_values():
    with pytest.raises(InvalidInputError, match="temperature"):
        KVFusionLLM(generator=RecordingGenerator()).invoke("q", temperature=-1)


# What callbacks, traces and files see


async def test_runs_record_parameters_and_prompts():
    recorder = Recorder()
    llm = KVFusionLLM(generator=RecordingGenerator(), callbacks=[recorder], temperature=0.5)
    llm.batch(["p", "q"], documents=["x"], temperature=0.1, stop=["."])
    await llm.abatch(["p", "q"], documents=["x"], temperature=0.1, stop=["."])
    assert [start["batch_size"] for start in recorder.starts] == [2] * 4
    list(llm.stream("q", documents=["x"], temperature=0.1, stop=["."]))
    for start in recorder.starts:
        params = start["invocation_params"]
        assert (params["_type"], params["temperature"], params["stop"]) == ("kvfusion", 0.1, ["."])
        assert params["generator"] == {"model_id": "fake/model", "revision": None, "mode": "fusion"}
        assert "documents" not in params
        assert start["prompts"][0] in ("x\n\np", "x\n\nq")
        assert start["metadata"]["lc_versions"]["kvfusion-rag"] == kvfusion_rag.__version__
        assert "langchain-core" in start["metadata"]["lc_versions"]


def test_langsmith_parameters():
    llm = KVFusionLLM(generator=RecordingGenerator(), max_tokens=7, temperature=0.5, stop=["."])
    assert llm._get_ls_params() == {
        "ls_provider": "kvfusion",
        "ls_model_type": "llm",
        "ls_model_name": "fake/model",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["."],
    }
    called = llm._get_ls_params(stop=["!"], temperature=0.2, max_new_tokens=3)
    assert (called.get("ls_temperature"), called.get("ls_max_tokens"), called.get("ls_stop")) == (0.2, 3, ["!"])
    bare = KVFusionLLM(generator=RecordingGenerator())._get_ls_params()
    assert "ls_max_tokens" not in bare and "ls_stop" not in bare


def test_metadata_of_the_caller_is_kept():
    mine = {"project": "p", "lc_versions": {"mine": "1"}}
    llm = KVFusionLLM(generator=RecordingGenerator(), metadata=mine)
    versions = (llm.metadata or {})["lc_versions"]
    assert (llm.metadata or {})["project"] == "p"
    assert (versions["mine"], versions["kvfusion-rag"]) == ("1", kvfusion_rag.__version__)


def test_identifying_parameters_contain_everything_that_affects_an_answer():
    llm = KVFusionLLM(generator=RecordingGenerator(), max_tokens=7, stop=["."])
    params = llm._identifying_params
    assert params["generator"] == RecordingGenerator().identity()
    assert {"temperature", "max_tokens", "top_p", "top_k", "seed", "mode", "stop"} <= set(params)
    json.dumps(params)
    assert llm.asdict()["_type"] == "kvfusion"


def test_generator_is_never_shown_or_saved(tmp_path):
    secret = RecordingGenerator(pieces=("hidden words",))
    llm = KVFusionLLM(generator=secret, temperature=0.5)
    llm.save(tmp_path / "llm.json")
    shown = [repr(llm), str(llm), dumps(llm), llm.model_dump_json(), repr(llm.asdict())]
    shown += [(tmp_path / "llm.json").read_text(), repr(pickle.dumps(llm)), repr(llm._serialized)]
    for text in shown:
        assert "hidden words" not in text and "RecordingGenerator" not in text


def test_pickled_model_keeps_settings_and_drops_the_generator():
    llm = pickle.loads(pickle.dumps(KVFusionLLM(generator=RecordingGenerator(), temperature=0.5)))
    assert (llm.model_id, llm.temperature) == ("fake/model", 0.5)
    with pytest.raises(InvalidInputError, match="pickling drops the model"):
        llm.invoke("q")


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_copies_share_the_generator(clone):
    llm = KVFusionLLM(generator=RecordingGenerator())
    assert clone(llm).generator is llm.generator


def test_missing_langchain_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "langchain_kvfusion"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingDependencyError, match=r"kvfusion-rag\[langchain\]"):
        importlib.import_module("langchain_kvfusion")
