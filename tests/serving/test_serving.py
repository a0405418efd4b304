"""The service on a generator without a model: what a request becomes, and what its answer looks like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from starlette.testclient import TestClient

from kvfusion_rag import ContextLimitError, Document, InvalidInputError, MemoryLimitError, Message, OverloadError
from kvfusion_rag.serving import Access, ServingOptions, create_app

CHAT = "/v1/chat/completions"


def client_of(generator: Any, access: Access | None = None, **options: Any) -> TestClient:
    """A client on this machine, as far as the app can tell."""
    app = create_app(generator, access=access, options=ServingOptions(**options))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "fake/model", "messages": messages or [{"role": "user", "content": "Where?"}], **fields}


def events(text: str) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, which have to end as OpenAI's do."""
    *found, last, rest = text.split("\n\n")
    assert last == "data: [DONE]" and rest == ""
    for line in found:
        assert line.startswith("data: ") and "\n" not in line
        yield json.loads(line.removeprefix("data: "))


@pytest.fixture
def generator() -> RecordingGenerator:
    return RecordingGenerator()


@pytest.fixture
def client(generator) -> TestClient:
    return client_of(generator)


# What is asked


def test_messages_become_a_prompt_and_the_last_one_the_question(client, generator):
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "Where is the office?")]
    found = client.post(CHAT, json=request(*({"role": role, "content": text} for role, text in turns)))
    assert found.status_code == 200
    (call,) = generator.calls
    assert call.question == "Where is the office?"
    assert call.prompt == [Message(role, text) for role, text in turns]


def test_developers_are_systems_and_text_parts_are_joined(client, generator):
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}]
    client.post(CHAT, json=request({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}))
    assert generator.calls[0].prompt == [Message("system", "Be brief."), Message("user", "Where is it?")]


def test_documents_are_strings_or_objects(client, generator):
    given = [
        "The office is in Lima.",
        {"text": "Rice.", "id": "../../etc/passwd", "title": "<b>T</b>", "metadata": {}, "score": 2},
    ]
    found = client.post(CHAT, json=request(documents=given)).json()
    assert generator.calls[0].documents == [
        Document("The office is in Lima."),
        Document("Rice.", "../../etc/passwd", "<b>T</b>", {}, 2.0),
    ]
    assert [(s["id"], s["title"]) for s in found["kvfusion"]["sources"]] == [
        ("1", None),
        ("../../etc/passwd", "<b>T</b>"),
    ]


def test_options_of_decoding_are_passed_on(client, generator):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_completion_tokens": 5,
        "seed": 3,
        "mode": "ape",
        "focus": 2,
        "attribution": "effects",
        "chat_template_kwargs": {"enable_thinking": False, "effort": "low", "depth": 3, "weight": 0.5, "name": None},
    }
    assert client.post(CHAT, json=request(**fields, stop="\n")).status_code == 200
    expected = {**fields, "max_new_tokens": fields["max_completion_tokens"], "stop": ["\n"]}
    del expected["max_completion_tokens"]
    assert generator.calls[0].options == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": 6}, 6),
        ({}, None),
        ({"max_tokens": None}, None),
    ],
)
def test_the_longest_answer_has_two_names(client, generator, fields, expected):
    client.post(CHAT, json=request(**fields))
    assert generator.calls[0].options["max_new_tokens"] == expected


def test_a_mode_of_the_server_is_that_of_requests_that_name_none(generator):
    client = client_of(generator, mode="concat")
    modes = [client.post(CHAT, json=request(**fields)).json()["kvfusion"]["mode"] for fields in ({}, {"mode": "ape"})]
    assert modes == ["concat", "ape"]
    client.post(CHAT, json=request(mode="auto"))
    assert generator.calls[-1].options["mode"] == "auto"


@pytest.mark.parametrize("own", ["auto", None, 3])
def test_a_focus_of_the_server_is_that_of_requests_that_name_none(generator, own):
    client = client_of(generator, focus=own)
    for fields in ({}, {"focus": None}, {"focus": "auto"}, {"focus": 2}):
        assert client.post(CHAT, json=request(**fields)).status_code == 200
    assert [call.options["focus"] for call in generator.calls] == [own, None, "auto", 2]
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    assert "null keeps all" in fields["focus"]["description"]


@pytest.mark.parametrize("stream", [False, True])
def test_sources_say_what_focus_left_out(stream):
    generator = tiny.generator()
    documents = ["the river runs past an old mill", "two grey doves sleep", "the lamp is lit"]
    expected = generator.answer("who?", documents, prompt=[Message("user", "who?")], focus=1, max_new_tokens=2)
    asked = {"model": generator.model_id, "messages": [{"role": "user", "content": "who?"}], "documents": documents}
    found = client_of(generator).post(CHAT, json={**asked, "max_tokens": 2, "focus": 1, "stream": stream})
    facts = json.loads(found.text.split("data: ")[-2])["kvfusion"] if stream else found.json()["kvfusion"]
    assert [(s["used"], s["focus_score"]) for s in facts["sources"]] == [
        (source.used, source.focus_score) for source in expected.sources
    ]
    assert [s["used"] for s in facts["sources"]].count(True) == 1
    plain = client_of(generator).post(CHAT, json={**asked, "max_tokens": 2}).json()
    assert {(s["used"], s["focus_score"]) for s in plain["kvfusion"]["sources"]} == {(True, None)}


@pytest.mark.parametrize(
    ("settings", "options", "shown"),
    [
        ({}, {}, None),
        ({"focus": 2}, {}, 2),
        ({"focus": 2}, {"mode": "concat"}, None),
        ({"focus": 2}, {"mode": "concat", "focus": 3}, 3),
        ({"focus": 2}, {"focus": None}, None),
    ],
)
def test_the_model_shows_the_focus_of_requests_that_name_none(settings, options, shown):
    generator = tiny.generator(**settings)
    found = client_of(generator, **options).get(f"/v1/models/{generator.model_id}").json()
    assert found["kvfusion"]["focus"] == shown


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {}},
        {"n": None, "tools": None, "response_format": None, "stop": None, "temperature": None, "documents": None},
        {"stream_options": None, "stream": False, "modalities": ["text"]},
    ],
)
def test_fields_that_ask_for_nothing_change_nothing(client, generator, fields):
    client.post(CHAT, json=request())
    assert client.post(CHAT, json=request(**fields)).status_code == 200
    assert generator.calls[1] == generator.calls[0]


def test_an_answer_can_be_sent_back_as_a_message(client, generator):
    message = client.post(CHAT, json=request()).json()["choices"][0]["message"]
    again = client.post(
        CHAT, json=request({"role": "user", "content": "Where?"}, message, {"role": "user", "content": "?"})
    )
    assert again.status_code == 200
    assert generator.calls[1].prompt[1] == Message("assistant", "in lima")


# What is answered


def test_a_whole_answer(client):
    found = client.post(CHAT, json=request(documents=[{"text": "The office is In Lima.", "id": "a"}])).json()
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert found["model"] == "fake/model"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "in lima"} and choice["finish_reason"] == "stop"
    assert found["usage"] == {
        "prompt_tokens": 6,  # five words of the document, and the one message
        "completion_tokens": 2,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    facts = found["kvfusion"]
    assert facts["mode"] == "fusion" and facts["cited_text"] == "In Lima"
    (source,) = facts["sources"]
    assert source == {
        **{"id": "a", "title": None, "origin": "computed", "tokens": 5, "duplicate_of": None},
        **{"used": True, "focus_score": None},
    }
    assert facts["citations"] == [{"document_id": "a", "start": 14, "end": 21, "text": "In Lima"}]
    assert facts["timings"] == {"prefill": 0.1, "first_token": 0.2, "total": 0.3}


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_tells_the_same_in_pieces(client, include_usage):
    asked = request(documents=["The office is In Lima."])
    whole = client.post(CHAT, json=asked).json()
    streamed = client.post(CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": include_usage}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = list(events(streamed.text))
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert pieces == ["", "in", " lima", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[-1]["kvfusion"] == whole["kvfusion"] and "kvfusion" not in chunks[1]


def test_models(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "fake/model" and model["kvfusion"]["mode"] == "fusion"
    assert client.get("/v1/models/fake/model").json() == model
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(("mode", "shown"), [(None, "fusion"), ("auto", "fusion"), ("concat", "concat")])
def test_the_model_shows_the_mode_of_requests_that_name_none(generator, mode, shown):
    found = client_of(generator, mode=mode).get("/v1/models/fake/model").json()
    assert found["kvfusion"]["mode"] == shown


def test_health(client):
    assert client.get("/health").json() == {"status": "ok"}


# Errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidInputError("bad"), 400, "invalid_request_error", "invalid_value"),
        (ContextLimitError("long"), 400, "invalid_request_error", "context_length_exceeded"),
        (OverloadError("many"), 429, "rate_limit_error", "overloaded"),
        (MemoryLimitError("full"), 500, "server_error", "out_of_memory"),
        (RuntimeError("in /home/me/model.py"), 500, "server_error", "internal_error"),
    ],
)
def test_errors_have_a_status_and_openais_form(stream, error, status, kind, code):
    found = client_of(RecordingGenerator(error=error)).post(CHAT, json=request(stream=stream))
    assert found.status_code == status
    told = found.json()["error"]
    assert (told["type"], told["code"], told["param"]) == (kind, code, None)
    assert (str(error) in told["message"]) == (code != "internal_error")
    assert "/home" not in found.text and "Traceback" not in found.text
    assert ("retry-after" in found.headers) == (status == 429)


def test_an_error_in_the_midst_of_a_stream_is_its_last_event(caplog):
    generator = RecordingGenerator(error=RuntimeError("in /home/me/model.py"), fail_after=1)
    found = client_of(generator).post(CHAT, json=request(stream=True))
    *_, last, rest = found.text.split("\n\n")
    assert found.status_code == 200 and rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "/home" not in found.text and "/home" in caplog.text  # the log has what the client must not
    assert generator.streams[0].closed


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "no field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages", "last"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "blank"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "no field"),
        ({"documents": "one string"}, "documents", "valid list"),
        ({"documents": [7]}, "documents[0]", ""),
        ({"documents": [{"title": "no text"}]}, "documents[0].text", "missing"),
        ({"documents": [{"text": "x", "id": 7}]}, "documents[0].id", "valid string"),
        ({"documents": ["x"] * 4}, "documents", "4 documents"),
        ({"documents": [{"text": "x", "score": "0.5"}]}, "documents[0].score", "valid number"),
        ({"documents": [{"text": "x", "score": True}]}, "documents[0].score", "valid number"),
        ({"mode": "sideways"}, "mode", "'fusion'"),
        ({"focus": 0}, "focus", "focus is 0, but it must be a number of documents from 1"),
        ({"focus": True}, "focus", "focus is True"),
        ({"focus": 1.5}, "focus", "focus is 1.5"),
        ({"focus": "2"}, "focus", "focus is '2'"),
        ({"focus": [1]}, "focus", "focus is [1]"),
        ({"chat_template_kwargs": "none"}, "chat_template_kwargs", "dictionary"),
        ({"chat_template_kwargs": {str(n): n for n in range(17)}}, "chat_template_kwargs", "at most 16"),
        ({"chat_template_kwargs": {"": 1}}, "chat_template_kwargs", "1 to 64"),
        ({"chat_template_kwargs": {"x" * 65: 1}}, "chat_template_kwargs", "1 to 64"),
        ({"chat_template_kwargs": {"a": "x" * 501}}, "chat_template_kwargs", "500 at most"),
        ({"chat_template_kwargs": {"a": ["nested"]}}, "chat_template_kwargs", "'a' is not a text"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"model": None}, "model", "missing"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_place(generator, changes, param, said):
    found = client_of(generator, max_documents=3).post(CHAT, json={**request(), **changes})
    assert found.status_code == 400, found.text
    told = found.json()["error"]
    assert told["type"] == "invalid_request_error" and told["param"] == param and said in told["message"]
    assert generator.calls == []


def test_another_model_and_another_path_are_not_found(client):
    other = client.post(CHAT, json={**request(), "model": "gpt-4o"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert "'fake/model'" in other.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"
    assert client.get(CHAT).status_code == 405


# Attribution


@pytest.mark.parametrize("stream", [False, True])
def test_sources_say_what_they_did_for_the_answer_when_asked(stream):
    generator = tiny.generator()
    documents = ["the river runs past an old mill", "two grey doves sleep"]
    expected = generator.answer(
        "who?", documents, prompt=[Message("user", "who?")], attribution="effects", max_new_tokens=2
    )
    asked = {"model": generator.model_id, "messages": [{"role": "user", "content": "who?"}], "documents": documents}
    found = client_of(generator).post(
        CHAT, json={**asked, "max_tokens": 2, "attribution": "effects", "stream": stream}
    )
    facts = json.loads(found.text.split("data: ")[-2])["kvfusion"] if stream else found.json()["kvfusion"]
    assert [(s["attention"], s["effect"]) for s in facts["sources"]] == [
        (source.attention, source.effect) for source in expected.sources
    ]
    plain = client_of(generator).post(CHAT, json={**asked, "max_tokens": 2}).json()
    assert not {"attention", "effect"} & plain["kvfusion"]["sources"][0].keys()


# The store


def test_documents_are_prefilled_found_and_forgotten():
    generator = tiny.generator()
    client = client_of(generator)
    documents = [{"text": f"the river number {n} runs past an old mill"} for n in range(20)]
    found = client.post("/v1/documents", json={"documents": documents}).json()
    assert [(s["id"], s["origin"]) for s in found["data"]] == [(str(n), "computed") for n in range(1, 21)]
    asked = {**request(documents=documents[:3], max_tokens=2), "model": generator.model_id}
    answer = client.post(CHAT, json=asked).json()
    assert {s["origin"] for s in answer["kvfusion"]["sources"]} == {"memory"}
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == sum(s["tokens"] for s in answer["kvfusion"]["sources"]) > 0
    assert client.post("/v1/documents/forget", json={"documents": documents[:2]}).json()["removed"] == 2
    origins = [s["origin"] for s in client.post(CHAT, json=asked).json()["kvfusion"]["sources"]]
    assert origins == ["computed", "computed", "memory"]


def test_documents_are_prefilled_for_a_wording():
    generator = tiny.untuned("fusion")
    client = client_of(generator)
    documents = [{"text": "the river runs past an old mill"}, {"text": "two grey doves sleep"}]
    system = {"role": "system", "content": "Is it true? Be brief."}

    def origins(question: str, *before: dict[str, Any]) -> set[str]:
        asked = request(*before, {"role": "user", "content": question}, documents=documents, max_tokens=1)
        answer = client.post(CHAT, json={**asked, "model": generator.model_id}).json()
        return {s["origin"] for s in answer["kvfusion"]["sources"]}

    wording = {"messages": [system, {"role": "user", "content": "anything"}]}
    assert client.post("/v1/documents", json={"documents": documents, **wording}).status_code == 200
    assert origins("who sleeps?") == {"computed"}  # without the system message
    assert origins("who sleeps?", system) == {"memory"}
    turns = [system, {"role": "user", "content": "who?"}, {"role": "assistant", "content": "she"}]
    assert origins("who sleeps?", *turns) == {"memory"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages"),
        ({"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs"),
        ({"mode": "fusion"}, "mode"),
    ],
    ids=["none", "no user", "many", "nested", "unknown"],
)
def test_wordings_of_prefill_have_the_bounds_of_chats(client, fields, param):
    found = client.post("/v1/documents", json={"documents": ["x"], **fields})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert client.post("/v1/documents/forget", json={"documents": ["x"], "messages": []}).status_code == 400


def test_prefill_without_a_store_is_the_callers_error():
    found = client_of(tiny.generator(store=None)).post("/v1/documents", json={"documents": ["x"]})
    assert found.status_code == 400 and "store" in found.json()["error"]["message"]


def test_metrics_count_requests_and_documents():
    generator = tiny.generator()
    client = client_of(generator, metrics=True)
    client.post("/v1/documents", json={"documents": ["the river"]})
    client.post("/v1/documents", json={})
    client.get("/no/such/path")
    lines = client.get("/metrics").text.splitlines()
    assert 'kvfusion_server_requests_total{path="/v1/documents",status="200"} 1.0' in lines
    assert 'kvfusion_server_requests_total{path="/v1/documents",status="400"} 1.0' in lines
    assert 'kvfusion_server_requests_total{path="other",status="404"} 1.0' in lines
    assert "kvfusion_store_computed_total 2.0" in lines  # the document, and the prefix in front of it
    assert client_of(generator).get("/metrics").status_code == 404
