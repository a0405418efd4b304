"""The server over a socket, with OpenAI's client and LangChain's ChatOpenAI, and small random models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import openai
import pytest
import tiny
from fakes import RecordingGenerator
from langchain_core.documents import Document as LangChainDocument
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from kvfusion_rag import KVFusionGenerator, Message
from kvfusion_rag.serving import Access, ServingOptions, create_app, running
from tests.serving.test_admission import soon

KEY = "key-of-the-only-tenant"
MODEL = "tiny-llama"
DOCUMENTS = [
    {"text": "The ferry has run since 1921. It carries forty cars and three hundred passengers.", "id": "ferry"},
    "The bakery on Mill Street was opened by Tomas Lindqvist.",
]
LENGTH = 8  # tokens of an answer
QUESTIONS = ["How many cars does the ferry carry?", "When did the ferry begin to run?"]


@pytest.fixture(scope="module")
def gen() -> KVFusionGenerator:
    return tiny.generator()


@pytest.fixture(scope="module")
def expected(gen) -> list[str]:
    """The generator's own answers to the questions."""
    texts = [
        gen.answer(q, [DOCUMENTS[0]["text"], DOCUMENTS[1]], prompt=[Message("user", q)], max_new_tokens=LENGTH).text
        for q in QUESTIONS
    ]
    assert len(set(texts)) == len(texts)
    return texts


@pytest.fixture(scope="module")
def url(gen) -> Iterator[str]:
    with running(create_app(gen, access=Access({KEY: None}))) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


def asked(question: str) -> dict:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": LENGTH,
        "extra_body": {"documents": DOCUMENTS},
    }


def test_completion_equals_the_generators_answer(client, gen, expected):
    found = client.chat.completions.create(**asked(QUESTIONS[0]))
    assert found.choices[0].message.content == expected[0]
    documents = [DOCUMENTS[0]["text"], DOCUMENTS[1]]
    answer = gen.answer(QUESTIONS[0], documents, prompt=[Message("user", QUESTIONS[0])], max_new_tokens=LENGTH)
    assert found.choices[0].finish_reason == answer.finish_reason
    assert found.usage.total_tokens == answer.usage.total_tokens
    assert found.usage.prompt_tokens_details.cached_tokens <= answer.usage.document_tokens
    assert [s["id"] for s in found.kvfusion["sources"]] == ["ferry", "2"]


def test_completion_contains_citations_and_works_with_openais_stream_helper():
    with running(create_app(tiny.speaker("forty"))) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        body = {**asked(QUESTIONS[0]), "model": "tiny-speaker"}
        found = client.chat.completions.create(**body)
        with client.chat.completions.stream(**body) as stream:  # the helper rejects answers cut at their limit
            assert stream.get_final_completion().choices[0].message.content == "forty"
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("forty", "stop")
    (citation,) = found.kvfusion["citations"]
    assert citation == {"document_id": "ferry", "start": 41, "end": 46, "text": "forty", "place": None}


def test_order_of_documents_does_not_change_the_answer(client, expected):
    arguments = asked(QUESTIONS[1])
    arguments["extra_body"] = {"documents": DOCUMENTS[::-1]}
    texts = [client.chat.completions.create(**a).choices[0].message.content for a in (asked(QUESTIONS[1]), arguments)]
    assert texts == [expected[1]] * 2


def test_stream_has_the_same_text_and_usage(client):
    whole = client.chat.completions.create(**asked(QUESTIONS[0]))
    chunks = list(
        client.chat.completions.create(**asked(QUESTIONS[0]), stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].kvfusion["mode"] == "fusion"


async def test_concurrent_tasks_are_answered(url, expected):
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        found = await asyncio.gather(*(client.chat.completions.create(**asked(q)) for q in QUESTIONS * 2))
        assert [f.choices[0].message.content for f in found] == expected * 2
        stream = await client.chat.completions.create(**asked(QUESTIONS[1]), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected[1]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "kvfusion-rag"


def test_errors_have_the_types_of_openais_client(client, url):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as rejected:
        create(**asked("Who?"), n=2)
    assert rejected.value.param == "n" and rejected.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as rejected:
        create(**{**asked("Who?"), "max_tokens": 100_000})
    assert rejected.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match=MODEL):
        create(**{**asked("Who?"), "model": "gpt-4o"})
    for key in ("wrong-key-of-nobody", "nicht-für-ASCII"):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            OpenAI(base_url=url, api_key=key.encode("ascii", "ignore").decode(), max_retries=0).models.list()


def test_overload_failure_and_timeout_have_the_types_of_openais_client():
    hold = threading.Event()
    generator = RecordingGenerator(hold=hold)
    app = create_app(generator, options=ServingOptions(max_concurrency=1))  # type: ignore[arg-type]
    ask = {"model": "fake/model", "messages": [{"role": "user", "content": "Where?"}]}
    with running(app) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        first = threading.Thread(target=lambda: client.chat.completions.create(**ask))
        first.start()
        assert soon(lambda: bool(generator.threads))  # it occupies the only slot
        with pytest.raises(openai.RateLimitError, match="retry later"):
            client.chat.completions.create(**ask)
        hold.set()
        first.join()
    failing = create_app(RecordingGenerator(error=RuntimeError("x"), fail_after=1))  # type: ignore[arg-type]
    with running(failing) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="server's log"):
            client.chat.completions.create(**ask)
        with pytest.raises(openai.APIError, match="server's log"):
            list(client.chat.completions.create(**ask, stream=True))
    hold.clear()
    slow = create_app(RecordingGenerator(hold=hold), options=ServingOptions(timeout=0.2))  # type: ignore[arg-type]
    with running(slow) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="was cancelled") as late:
            client.chat.completions.create(**ask)
        assert late.value.status_code == 504
        hold.set()  # the server waits for this request when it stops


def test_rejected_client_that_retries_is_answered():
    generator = RecordingGenerator()
    with running(create_app(generator, options=ServingOptions(max_concurrency=2))) as address:  # type: ignore[arg-type]
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=8)
        answers: list[str | None] = []

        def ask() -> None:
            found = client.chat.completions.create(
                model="fake/model", messages=[{"role": "user", "content": "Where?"}]
            )
            answers.append(found.choices[0].message.content)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == ["in lima"] * 6


# LangChain


@pytest.fixture(scope="module")
def chat(url) -> ChatOpenAI:
    body = {"documents": DOCUMENTS}
    return ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_retries=0, max_tokens=LENGTH, extra_body=body)


def test_langchain_chat_model_answers_from_documents(chat, expected):
    found = chat.invoke(QUESTIONS[0])
    assert found.content == expected[0]
    assert found.usage_metadata["input_token_details"]["cache_read"] >= 0
    assert found.response_metadata["finish_reason"] in ("stop", "length")
    assert "".join(chunk.text for chunk in chat.stream(QUESTIONS[1])) == expected[1]
    assert [m.content for m in chat.batch(QUESTIONS)] == expected


async def test_langchain_chat_model_in_async_code(chat, expected):
    assert (await chat.ainvoke(QUESTIONS[0])).content == expected[0]
    assert "".join([chunk.text async for chunk in chat.astream(QUESTIONS[1])]) == expected[1]


def test_langchain_can_bind_documents_to_a_call(url, gen):
    chat = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_retries=0, max_tokens=LENGTH)
    retrieved = [LangChainDocument("The museum has been closed since 1987.", id="m", metadata={"page": 3})]
    documents = [{"text": d.page_content, "id": d.id, "metadata": d.metadata} for d in retrieved]
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")]) | chat.bind(
        extra_body={"documents": documents, "mode": "concat"}, temperature=0, stop=["\n"]
    )
    question = "Since when has the museum been closed?"
    turns = [Message("system", "Be brief."), Message("user", question)]
    texts = [d.page_content for d in retrieved]
    answer = gen.answer(question, texts, prompt=turns, mode="concat", stop=["\n"], max_new_tokens=LENGTH)
    assert chain.invoke({"question": question}).content == answer.text


def test_system_message_and_history_reach_the_model():
    generator = tiny.untuned()
    assert generator.follows_instructions
    with running(create_app(generator)) as address:
        chat = ChatOpenAI(
            model=generator.model_id, base_url=f"{address}/v1", api_key="none", max_tokens=4, max_retries=0
        )
        turns = [("system", "the miller"), ("human", "who built it?"), ("ai", "nobody"), ("human", "who built it?")]
        tokens = [chat.invoke(turns[n:]).usage_metadata["input_tokens"] for n in (0, 1, 3)]
    assert tokens[0] > tokens[1] > tokens[2]
