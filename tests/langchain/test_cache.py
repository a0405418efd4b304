"""LangChain's response cache with KVFusionLLM: answers are reused only for equal documents and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from fakes import EchoGenerator
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from kvfusion_rag import Document
from langchain_kvfusion import ChatKVFusion, KVFusionLLM, KVFusionPrompt


@pytest.fixture(params=["global", "own", "asked for"])
def cached(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Yield arguments that enable a cache: LangChain's global one (by default or by True), or an own cache."""
    if request.param == "own":
        yield {"cache": InMemoryCache()}
        return
    set_llm_cache(InMemoryCache())
    yield {} if request.param == "global" else {"cache": True}
    set_llm_cache(None)


async def ask(llm: Any, is_async: bool, prompt: Any, **options: Any) -> str:
    return await llm.ainvoke(prompt, **options) if is_async else llm.invoke(prompt, **options)


# The prompts of each pair have the same text, but must not share an answer.
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"documents": ["a"]}, {"documents": ["b"]}),
    ({"documents": ["a\n\nb"]}, {"documents": ["a", "b"]}),
    ({"documents": [Document("a", "one")]}, {"documents": [Document("a", "two")]}),
    ({"documents": [Document("a", title="one")]}, {"documents": [Document("a")]}),
    ({"documents": ["a"]}, {"documents": ["a"], "temperature": 0.5}),
    ({"documents": ["a"], "max_tokens": 3}, {"documents": ["a"], "max_tokens": 4}),
    ({"documents": ["a"], "mode": "concat"}, {"documents": ["a"], "mode": "fusion"}),
    ({"stop": ["x"]}, {"stop": ["y"]}),
    ({}, {"seed": 4}),
    ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"a": 2}}),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("first", "second"), PAIRS)
async def test_different_documents_or_options_are_not_served_from_the_cache(cached, is_async, first, second):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake, **cached)
    for _ in range(2):
        for options in (first, second):
            await ask(llm, is_async, "q", **options)
            await ask(llm.bind(**options), is_async, "q")
    assert len(fake.calls) == 2


@pytest.mark.parametrize("is_async", [False, True])
async def test_prompts_with_equal_text_differ_by_documents_and_question(cached, is_async):
    fake = EchoGenerator()
    chain = KVFusionPrompt.from_template("{context} {question} {other}") | KVFusionLLM(generator=fake, **cached)
    inputs = [
        {"context": ["a\n\nb"], "question": "q", "other": ""},
        {"context": ["a", "b"], "question": "q", "other": ""},
        {"context": ["a", "b"], "question": "", "other": "q"},
        {"context": [Document("a", "id"), "b"], "question": "q", "other": ""},
    ]
    answers = [await ask(chain, is_async, each) for each in inputs]
    assert [await ask(chain, is_async, each) for each in inputs] == answers
    assert len(fake.calls) == len(inputs)
    assert (await chain.abatch(inputs) if is_async else chain.batch(inputs)) == answers
    assert len(fake.calls) == len(inputs)  # answers of single calls are found in a batch


def test_prompts_with_equal_text_differ_by_the_place_of_documents(cached):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake, **cached)
    for template in ("{context}x{question}", "x{context}{question}"):
        (KVFusionPrompt.from_template(template) | llm).invoke({"context": ["x"], "question": "q"})
    assert len(fake.calls) == 2


@pytest.mark.parametrize("is_async", [False, True])
async def test_batch_computes_only_answers_that_are_not_cached(cached, is_async):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake, **cached)
    await ask(llm, is_async, "q", documents=["a"])
    batch = {"documents": [["b"], ["a"], ["b", "c"]]}
    answers = await llm.abatch(["q"] * 3, **batch) if is_async else llm.batch(["q"] * 3, **batch)
    assert answers == ["q <- b at 0.0", "q <- a at 0.0", "q <- b + c at 0.0"]
    assert [call.texts for call in fake.calls] == [["a"], ["b"], ["b", "c"]]


async def test_streams_do_not_use_answers_for_other_documents(cached):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake, **cached)
    llm.invoke("q", documents=["a"])
    assert "".join(llm.stream("q", documents=["b"])) == "q <- b at 0.0"
    assert "".join([piece async for piece in llm.astream("q", documents=["c"])]) == "q <- c at 0.0"
    assert llm.invoke("q", documents=["a"]) == "q <- a at 0.0"


def test_different_model_settings_are_not_served_from_the_cache(cached):
    fake = EchoGenerator()
    for temperature in (0.0, 0.5):
        KVFusionLLM(generator=fake, temperature=temperature, **cached).invoke("q")
    KVFusionLLM(generator=EchoGenerator(model_id="other", calls=fake.calls), **cached).invoke("q")
    assert len(fake.calls) == 3


def test_cached_answer_has_its_sources(cached):
    llm = KVFusionLLM(generator=EchoGenerator(), **cached)
    first, second = (llm.generate(["q"], documents=["a"]).generations[0][0] for _ in range(2))
    assert second.generation_info == first.generation_info
    assert (second.generation_info or {})["sources"][0]["tokens"] == 1


def test_cache_false_disables_the_global_cache(cached):
    fake = EchoGenerator()
    llm = KVFusionLLM(generator=fake, cache=False)
    llm.invoke("q")
    llm.invoke("q")
    assert len(fake.calls) == 2


def test_own_cache_replaces_the_global_one():
    everyone = InMemoryCache()
    set_llm_cache(everyone)
    KVFusionLLM(generator=EchoGenerator(), cache=InMemoryCache()).invoke("q")
    set_llm_cache(None)
    assert not everyone._cache


def test_cache_true_needs_a_global_cache():
    with pytest.raises(ValueError, match="cache"):
        KVFusionLLM(generator=EchoGenerator(), cache=True).invoke("q")


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stop": ["x"]}, {"stop": ["y"]}),
    ({"temperature": 0.0}, {"temperature": 0.7}),
    ({"mode": "concat"}, {"mode": "fusion"}),
    ({"attribution": "effects"}, {}),
    ({"min_support": "auto"}, {"min_support": 0.5}),
    ({"chat_template_kwargs": {"a": 1}}, {}),
]


@pytest.mark.parametrize("kind", [KVFusionLLM, ChatKVFusion])
@pytest.mark.parametrize(("first", "second"), FIELDS)
async def test_none_in_a_call_does_not_hide_model_settings_in_the_cache_key(kind, first, second):
    fake, cache = EchoGenerator(), InMemoryCache()
    for fields in (first, second) * 2:
        model = kind(generator=fake, cache=cache, **fields)
        model.invoke("q", documents=["a"], temperature=None, mode=None, attribution=None)
        await model.ainvoke("q", documents=["a"], temperature=None, mode=None, attribution=None)
    assert len(fake.calls) == 2
