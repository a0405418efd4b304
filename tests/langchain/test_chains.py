"""create_kvfusion_documents_chain, batches and streams of chains, and models wrapped by fallbacks and retries."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_classic")

from conversation_fakes import turns
from fakes import EchoGenerator, RecordingGenerator
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.output_parsers import CommaSeparatedListOutputParser, StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_models import MODELS
from langchain_routes import SHELF, Shelf, lcel_apart

from kvfusion_rag import InvalidInputError
from langchain_kvfusion import KVFusionLLM, KVFusionPrompt, create_kvfusion_documents_chain

PROMPT = KVFusionPrompt.from_template("Be brief.\n\n{context}\n\nQuestion: {question}\nAnswer:")
VARIABLES = {"context": Shelf().invoke(""), "question": "Who?"}


def test_batch_of_a_chain_is_one_generator_call_in_order():
    fake = EchoGenerator()
    answers = lcel_apart(KVFusionLLM(generator=fake)).batch(["q0", "q1", "q2"])
    assert [answer.split(" <- ")[0] for answer in answers] == ["q0", "q1", "q2"]
    assert len(fake.threads) == 1


async def test_documents_chain_streams_tokens():
    chain = create_kvfusion_documents_chain(KVFusionLLM(generator=RecordingGenerator()), PROMPT)
    assert [piece for piece in chain.stream(VARIABLES) if piece] == ["in", " lima"]
    events = [event async for event in chain.astream_events(VARIABLES, version="v2")]
    chunks = [event["data"]["chunk"].text for event in events if event["event"] == "on_llm_stream"]
    assert "".join(chunks) == "in lima"


def test_joined_documents_are_reported(caplog):
    fake = RecordingGenerator()
    chain = create_stuff_documents_chain(KVFusionLLM(generator=fake), PROMPT)
    chain.invoke({"context": [LangChainDocument("x"), LangChainDocument("y")], "question": "Who?"})
    assert fake.calls[0].texts == ["x\n\ny"]
    assert "create_kvfusion_documents_chain" in caplog.text


def test_default_prompt_of_the_documents_chain():
    fake = RecordingGenerator()
    chain = create_kvfusion_documents_chain(KVFusionLLM(generator=fake))
    assert chain.invoke({"context": [LangChainDocument("x")], "input": "Who?"}) == "in lima"
    assert (fake.calls[0].texts, fake.calls[0].question) == (["x"], "Who?")
    [(role, text)] = turns(fake.calls[0])
    assert role == "user"
    assert text.endswith("\n\n{documents}\n\nQuestion: Who?\nAnswer:")


def test_documents_chain_accepts_a_parser_and_a_variable_name():
    fake = RecordingGenerator(pieces=("a, ", "b"))
    chain = create_kvfusion_documents_chain(
        KVFusionLLM(generator=fake).bind(stop=["\n"]),
        KVFusionPrompt.from_template("{docs} {question}", "docs"),
        output_parser=CommaSeparatedListOutputParser(),
        document_variable_name="docs",
    )
    assert chain.invoke({"docs": ["x"], "question": "Who?"}) == ["a", "b"]
    assert fake.calls[0].options["stop"] == ["\n"]


@pytest.mark.parametrize("prompt", [PromptTemplate.from_template("{a}"), KVFusionPrompt.from_template("{a}", "a")])
def test_documents_chain_requires_its_variable(prompt):
    with pytest.raises(InvalidInputError, match="context"):
        create_kvfusion_documents_chain(KVFusionLLM(generator=RecordingGenerator()), prompt)


@pytest.mark.parametrize("error", [RuntimeError("no"), InvalidInputError("no")])
def test_chain_raises_errors_of_the_generator(error):
    chain = lcel_apart(KVFusionLLM(generator=RecordingGenerator(error=error)))
    for call in (lambda: chain.invoke("q"), lambda: list(chain.stream("q")), lambda: chain.batch(["p", "q"])):
        with pytest.raises(type(error), match="no"):
            call()


# Wrapped models


@MODELS
@pytest.mark.parametrize("fallback", [FakeListLLM(responses=["fallback"]), FakeListChatModel(responses=["fallback"])])
async def test_fallback_gets_the_ordinary_prompt(make, fallback):
    failing = make(generator=RecordingGenerator(error=RuntimeError("no")))
    seen: list[Any] = []
    recorded = (lambda value: seen.append(value.to_string()) or value) | fallback
    chain = PROMPT | failing.with_fallbacks([recorded]) | StrOutputParser()
    assert chain.invoke(VARIABLES) == await chain.ainvoke(VARIABLES) == "fallback"
    assert seen == [f"Be brief.\n\n{SHELF['lamp']}\n\n{SHELF['mill']}\n\nQuestion: Who?\nAnswer:"] * 2


@MODELS
def test_model_can_be_a_fallback(make):
    failing = (lambda value: 1 / 0) | FakeListLLM(responses=["never"])
    fake = RecordingGenerator()
    chain = PROMPT | failing.with_fallbacks([make(generator=fake)]) | StrOutputParser()
    assert chain.invoke(VARIABLES) == "in lima"
    assert fake.calls[0].ids == ["lamp", "mill"]


@MODELS
def test_parallel_branches_use_separate_threads(make):
    fake = EchoGenerator(hold=threading.Event())
    model = make(generator=fake)
    branches: Any = {
        name: PROMPT | model.bind(temperature=number / 10) | StrOutputParser() for number, name in enumerate("abc")
    }
    answers: dict[str, str] = {}
    caller = threading.Thread(target=lambda: answers.update(RunnableParallel(branches).invoke(VARIABLES)))
    caller.start()
    while len(fake.threads) < 3:  # all branches wait in the generator at the same time
        caller.join(0.001)
        assert caller.is_alive()
    fake.hold.set()
    caller.join()
    texts = f"{SHELF['lamp']} + {SHELF['mill']}"
    assert answers == {name: f"Who? <- {texts} at {number / 10}" for number, name in enumerate("abc")}
    assert len(set(fake.threads)) == 3


@MODELS
def test_retries_keep_the_documents(make):
    class Flaky(RecordingGenerator):
        def step(self) -> None:
            if len(self.calls) == 1:
                raise ConnectionError("once")

    fake = Flaky()
    chain = PROMPT | make(generator=fake).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    (chain | StrOutputParser()).with_config(tags=["t"]).invoke(VARIABLES)
    assert [call.ids for call in fake.calls] == [["lamp", "mill"]] * 2
