"""Options, batches, streams and serialization, which KVFusionLLM and ChatKVFusion have in common."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading

import pytest
import tiny

pytest.importorskip("langchain_core")

from conversation_fakes import ChatRecorder
from fakes import EchoGenerator
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField
from langchain_models import ALL_OPTIONS, DEFAULTS, MODELS, call_all, run, text

from kvfusion_rag import ContextLimitError, Document, InvalidInputError
from langchain_kvfusion import KVFusionLLM, KVFusionPrompt
from langchain_kvfusion.framing import frame


@MODELS
@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
async def test_options_of_a_call_override_those_of_the_model(make, name):
    fake = ChatRecorder()
    model = make(generator=fake, max_new_tokens=7, stop=["."], temperature=0.1, seed=9)
    await call_all(model, "q", **ALL_OPTIONS, **{name: 3})
    await call_all(model.bind(**ALL_OPTIONS, **{name: 3}), "q")
    await call_all(make(generator=fake, max_tokens=3, **ALL_OPTIONS), "q")
    assert len(fake.calls) == 18
    assert all(call.options == {**ALL_OPTIONS, "max_new_tokens": 3} for call in fake.calls)


@MODELS
async def test_none_keeps_the_model_setting(make):
    fake = ChatRecorder()
    await call_all(make(generator=fake, temperature=0.5, stop=["."]), "q", temperature=None, stop=None)
    assert all(call.options == {**DEFAULTS, "temperature": 0.5, "stop": ["."]} for call in fake.calls)


@MODELS
async def test_template_variables_of_call_and_model_are_merged(make):
    fake = ChatRecorder()
    await call_all(make(generator=fake, chat_template_kwargs={"a": 1, "b": 1}), "q", chat_template_kwargs={"b": 2})
    assert all(call.options["chat_template_kwargs"] == {"a": 1, "b": 2} for call in fake.calls)


@MODELS
def test_show_prompt_has_the_arguments_of_invoke(make):
    fake = ChatRecorder()
    model = make(generator=fake, mode="concat", chat_template_kwargs={"a": 1})
    prompt = KVFusionPrompt.from_template("{context}\n\n{question}")
    variables = {"context": ["x"], "question": "Who?"}
    (prompt | model).invoke(variables)
    assert (prompt | model.show_prompt).invoke(variables).text == "\n\nWho?"
    model.invoke("Who?", documents=["x"])
    model.show_prompt("Who?", documents=["x"], mode="fusion", chat_template_kwargs={"a": 2})
    invoked, shown, invoked_with_documents, shown_with_documents = fake.calls
    assert shown.options == {"mode": "concat", "focus": "auto", "chat_template_kwargs": {"a": 1}}
    assert shown_with_documents.options == {"mode": "fusion", "focus": "auto", "chat_template_kwargs": {"a": 2}}
    for first, second in ((invoked, shown), (invoked_with_documents, shown_with_documents)):
        assert (first.question, first.documents, first.prompt) == (second.question, second.documents, second.prompt)


@MODELS
async def test_invalid_options_are_rejected_by_all_methods(make):
    model = make(generator=ChatRecorder())
    for options, message in (
        ({"max_length": 3}, "max_length"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "same option"),
        ({"temperature": -1}, "temperature"),
    ):
        for call in (model.invoke, model.ainvoke, model.stream, model.astream):
            with pytest.raises(InvalidInputError, match=message):
                await run(call, "q", **options)
        for call in (model.batch, model.abatch):
            with pytest.raises(InvalidInputError, match=message):
                await run(call, ["q"], **options)


@MODELS
async def test_strict_rejects_prompts_without_documents(make):
    model = make(generator=ChatRecorder(), strict=True)
    assert set(await call_all(model, "q", documents=["x"])) == {"in lima"}
    for call in (model.invoke, model.ainvoke, model.stream, model.astream):
        with pytest.raises(InvalidInputError, match="is strict"):
            await run(call, "q")
    with pytest.raises(InvalidInputError, match="is strict"):
        model.batch(["p", "q"], documents=[["x"], []])


@MODELS
async def test_forged_frame_is_rejected_by_all_methods(make):
    model = make(generator=ChatRecorder())
    forged = f"Who? {frame(Document('Ada wrote it.')).replace('Ada', 'Eve')}"
    for prompt in (forged, [HumanMessage(forged)]):
        for call in (model.invoke, model.ainvoke, model.stream, model.astream):
            with pytest.raises(InvalidInputError, match="did not write"):
                await run(call, prompt)


@MODELS
async def test_nested_documents_belong_to_the_inputs_of_a_batch(make):
    model = make(generator=EchoGenerator())
    questions, documents = ["p", "q", "r"], [["a"], ["b", "c"], []]
    expected = ["p <- a at 0.0", "q <- b + c at 0.0", "r <-  at 0.0"]
    for config in ({}, {"max_concurrency": 2}):
        for answers in (
            model.batch(questions, config, documents=documents),
            await model.abatch(questions, config, documents=documents),
            model.bind(documents=documents).batch(questions, config),
        ):
            assert [text(answer) for answer in answers] == expected
        flat = model.batch(questions, config, documents=["d"])
        assert [text(answer) for answer in flat] == [f"{q} <- d at 0.0" for q in questions]


def test_batch_of_an_llm_is_one_generator_call():
    fake = EchoGenerator()
    KVFusionLLM(generator=fake).batch(["p", "q"], documents=[["a"], []])
    assert len(fake.threads) == 1


@MODELS
async def test_wrong_number_of_document_lists_is_rejected(make):
    model = make(generator=ChatRecorder())
    for call in (model.batch, model.abatch):
        with pytest.raises(InvalidInputError, match="one list per prompt"):
            await run(call, ["p", "q"], documents=[["a"]])
    failed = model.batch(["p", "q"], documents=[["a"]], return_exceptions=True)
    failed += await model.abatch(["p", "q"], documents=[["a"]], return_exceptions=True)
    assert [type(error) for error in failed] == [InvalidInputError] * 4


@MODELS
@pytest.mark.parametrize("bad", [7, {"title": "no text"}], ids=["not a document", "without text"])
@pytest.mark.parametrize("config", [{}, {"max_concurrency": 2}], ids=["together", "by twos"])
async def test_a_bad_input_of_a_batch_fails_alone(make, bad, config):
    model = make(generator=EchoGenerator())
    questions, documents = ["p", "q", "r", "s"], [["a"], [bad], ["c"], []]
    for answers in (
        model.batch(questions, config, documents=documents, return_exceptions=True),
        await model.abatch(questions, config, documents=documents, return_exceptions=True),
    ):
        assert isinstance(answers.pop(1), InvalidInputError)
        assert [text(answer) for answer in answers] == ["p <- a at 0.0", "r <- c at 0.0", "s <-  at 0.0"]


@MODELS
async def test_a_question_that_cannot_be_answered_fails_alone(make):
    """The generator answers a batch in one call, and rejects all of it if one question does not fit."""
    model = make(generator=tiny.generator("llama"), max_tokens=4)
    documents = [["the river"], ["the old mill " * 400], ["two grey doves"]]
    alone = [model.invoke("who built it?", documents=documents[i]) for i in (0, 2)]
    for answers in (
        model.batch(["who built it?"] * 3, documents=documents, return_exceptions=True),
        await model.abatch(["who built it?"] * 3, documents=documents, return_exceptions=True),
    ):
        assert isinstance(answers.pop(1), ContextLimitError)
        assert [text(answer) for answer in answers] == [text(answer) for answer in alone]


@MODELS
def test_batch_can_return_errors(make):
    model = make(generator=ChatRecorder(error=RuntimeError("no")))
    assert [str(error) for error in model.batch(["p", "q"], return_exceptions=True)] == ["no", "no"]


# Streams


@MODELS
async def test_streams_stopped_early_are_closed(make):
    fake = ChatRecorder()
    stream = make(generator=fake).stream("q")
    assert text(next(stream)) == "in"
    stream.close()
    astream = make(generator=fake).astream("q")
    assert text(await anext(astream)) == "in"
    await astream.aclose()
    assert [stream.closed for stream in fake.streams] == [True, True]


@MODELS
async def test_cancelled_stream_is_closed_when_its_piece_is_done(make):
    fake = ChatRecorder(hold=threading.Event())
    task = asyncio.create_task(run(make(generator=fake).astream, "q"))
    while not fake.threads:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream = fake.streams[0]
    assert not stream.closed  # closing it now would fail in the middle of a step
    fake.hold.set()
    for _ in range(2000):
        if stream.closed:
            break
        await asyncio.sleep(0.001)
    assert stream.closed


@MODELS
@pytest.mark.parametrize("method", ["ainvoke", "abatch", "astream"])
async def test_event_loop_is_not_blocked(make, method):
    fake = ChatRecorder(hold=threading.Event())
    call = getattr(make(generator=fake), method)
    task = asyncio.create_task(run(call, ["q"] if method == "abatch" else "q"))
    while not fake.threads:
        await asyncio.sleep(0.001)
    fake.hold.set()  # unreachable if the event loop is blocked
    await task
    assert threading.get_ident() not in fake.threads


# Identity


@MODELS
def test_langsmith_parameters(make):
    model = make(generator=ChatRecorder(), max_tokens=7, temperature=0.5, stop=["."])
    assert model._get_ls_params() == {
        "ls_provider": "kvfusion",
        "ls_model_type": "llm" if make is KVFusionLLM else "chat",
        "ls_model_name": "fake/model",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["."],
    }
    called = model._get_ls_params(stop=["!"], temperature=0.2, max_new_tokens=3)
    assert (called.get("ls_temperature"), called.get("ls_max_tokens"), called.get("ls_stop")) == (0.2, 3, ["!"])
    assert not {"ls_max_tokens", "ls_stop"} & make(generator=ChatRecorder())._get_ls_params().keys()


@MODELS
def test_identifying_parameters_contain_everything_that_affects_an_answer(make):
    params = make(generator=ChatRecorder(), max_tokens=7, stop=["."])._identifying_params
    assert params["generator"] == ChatRecorder().identity()
    assert set(DEFAULTS) - {"max_new_tokens"} < set(params)
    json.dumps(params)


@MODELS
def test_settings_are_configurable(make):
    fake = ChatRecorder()
    model = make(generator=fake).configurable_fields(temperature=ConfigurableField(id="t"))
    model.with_config(configurable={"t": 0.7}).invoke("q")
    assert fake.calls[0].options["temperature"] == 0.7


@MODELS
def test_token_ids_come_from_the_generator(make):
    model = make(generator=ChatRecorder())
    assert (model.get_token_ids("one three five"), model.get_num_tokens("one three five")) == ([3, 5, 4], 3)
    assert make(generator=ChatRecorder(), custom_get_token_ids=lambda _: [1]).get_token_ids("x y") == [1]


@MODELS
def test_generator_is_shared_by_copies_and_never_serialized(make, tmp_path):
    model = make(generator=ChatRecorder(pieces=("hidden words",)), temperature=0.5)
    texts = [repr(model), str(model), dumps(model), model.model_dump_json(), repr(model.asdict())]
    texts += [repr(pickle.dumps(model)), repr(model._serialized)]
    if make is KVFusionLLM:
        model.save(tmp_path / "llm.json")
        texts.append((tmp_path / "llm.json").read_text())
    assert not any("hidden words" in each or "ChatRecorder" in each for each in texts)
    assert copy.copy(model).generator is copy.deepcopy(model).generator is model.generator
    restored = pickle.loads(pickle.dumps(model))
    assert (restored.model_id, restored.temperature) == ("fake/model", 0.5)
    with pytest.raises(InvalidInputError, match=rf"{make.__name__} has no generator.*pickling drops the model"):
        restored.invoke("q")
