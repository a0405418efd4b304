"""The server with a fake generator: how a request reaches the generator, and what the reply contains."""

from __future__ import annotations

import json

import pytest
import tiny
from fakes import RecordingGenerator
from serving_client import CHAT, client_of, events, extension, request
from starlette.testclient import TestClient

from kvfusion_rag import (
    ContextLimitError,
    Document,
    InvalidInputError,
    KVFusionGenerator,
    MemoryLimitError,
    Message,
    OverloadError,
    SupportCalibration,
)
from kvfusion_rag.serving import ServingOptions


@pytest.fixture(scope="module")
def model() -> KVFusionGenerator:
    """A small real model."""
    return tiny.generator()


@pytest.fixture
def generator() -> RecordingGenerator:
    return RecordingGenerator()


@pytest.fixture
def client(generator) -> TestClient:
    return client_of(generator)


# Requests


def test_messages_become_the_prompt_and_the_last_message_the_question(client, generator):
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "Where is the office?")]
    found = client.post(CHAT, json=request(*({"role": role, "content": text} for role, text in turns)))
    assert found.status_code == 200
    (call,) = generator.calls
    assert call.question == "Where is the office?"
    assert call.prompt == [Message(role, text) for role, text in turns]


def test_developer_role_becomes_system_and_text_parts_are_joined(client, generator):
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}]
    client.post(CHAT, json=request({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}))
    assert generator.calls[0].prompt == [Message("system", "Be brief."), Message("user", "Where is it?")]


def test_documents_may_be_strings_or_objects(client, generator):
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


def test_decoding_options_reach_the_generator(client, generator):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_completion_tokens": 5,
        "max_reasoning_tokens": 6,
        "seed": 3,
        "mode": "ape",
        "focus": 2,
        "attribution": "effects",
        "min_support": "auto",
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
def test_max_tokens_has_two_names(client, generator, fields, expected):
    client.post(CHAT, json=request(**fields))
    assert generator.calls[0].options["max_new_tokens"] == expected


def test_server_mode_applies_to_requests_without_a_mode(generator):
    client = client_of(generator, mode="concat")
    modes = [client.post(CHAT, json=request(**fields)).json()["kvfusion"]["mode"] for fields in ({}, {"mode": "ape"})]
    assert modes == ["concat", "ape"]
    client.post(CHAT, json=request(mode="auto"))
    assert generator.calls[-1].options["mode"] == "auto"


@pytest.mark.parametrize("focus", ["auto", None, 3])
def test_server_focus_applies_to_requests_without_a_focus(generator, focus):
    client = client_of(generator, focus=focus)
    for fields in ({}, {"focus": None}, {"focus": "auto"}, {"focus": 2}):
        assert client.post(CHAT, json=request(**fields)).status_code == 200
    assert [call.options["focus"] for call in generator.calls] == [focus, None, "auto", 2]
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    assert "null keeps all" in fields["focus"]["description"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("option", "fields", "unset"),
    [
        pytest.param({"focus": 1}, ("used", "focus_score"), (True, None), id="focus"),
        pytest.param(
            {"attribution": "effects"}, ("attention", "effect"), (None, None), id="attribution",
            marks=pytest.mark.torch_only,
        ),
    ],
)  # fmt: skip
def test_sources_contain_focus_scores_and_attribution_if_requested(model, stream, option, fields, unset):
    documents = ["the river runs past an old mill", "two grey doves sleep", "the lamp is lit"]
    expected = model.answer("who?", documents, prompt=[Message("user", "who?")], max_new_tokens=2, **option)
    body = request({"role": "user", "content": "who?"}, documents=documents, max_tokens=2, model=model.model_id)
    client = client_of(model)
    sources = extension(client.post(CHAT, json={**body, **option, "stream": stream}).text, stream=stream)["sources"]
    assert [tuple(s[name] for name in fields) for s in sources] == [
        tuple(getattr(source, name) for name in fields) for source in expected.sources
    ]
    without = client.post(CHAT, json=body).json()["kvfusion"]["sources"]
    assert {tuple(s.get(name) for name in fields) for s in without} == {unset}


@pytest.mark.parametrize("stream", [False, True])
def test_replies_contain_support_if_it_was_measured(stream):
    calibration = SupportCalibration({"gain": 0.4, "coverage": 2.0}, -1.0, 1.0)
    model = tiny.generator(support=calibration, max_new_tokens=2)
    expected = model.answer("who?", ["the old mill"], min_support="auto")
    body = request({"role": "user", "content": "who?"}, documents=["the old mill"], model=model.model_id)
    client = client_of(model)
    found = extension(client.post(CHAT, json={**body, "min_support": "auto", "stream": stream}).text, stream=stream)
    assert [found[name] for name in ("support", "found", "notice")] == [expected.support, False, expected.notice]
    plain = extension(client.post(CHAT, json={**body, "stream": stream}).text, stream=stream)
    assert not {"support", "found", "notice"} & plain.keys()
    default = client_of(model.with_settings(min_support=0.0)).post(CHAT, json=body).json()["kvfusion"]
    assert default["found"] is True


@pytest.mark.parametrize("value", [2, -1, "high", [0.5]])
def test_wrong_min_support_is_rejected(client, value):
    reply = client.post(CHAT, json=request(min_support=value))
    assert reply.status_code == 400 and "from 0 to 1, 'auto' or None" in reply.json()["error"]["message"]


def test_min_support_of_a_model_without_calibration_is_the_clients_error():
    model = tiny.generator()
    body = request(documents=["the mill"], model=model.model_id, min_support="auto")
    reply = client_of(model).post(CHAT, json=body)
    assert reply.status_code == 400 and "has no calibration of support" in reply.json()["error"]["message"]


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
def test_model_object_contains_the_default_focus(settings, options, shown):
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
def test_fields_without_effect_are_accepted(client, generator, fields):
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


# Replies


def test_complete_reply(client):
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
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    facts = found["kvfusion"]
    assert facts["mode"] == "fusion" and facts["cited_text"] == "In Lima"
    (source,) = facts["sources"]
    assert source == {
        **{"id": "a", "title": None, "origin": "computed", "tokens": 5, "pieces": 1, "duplicate_of": None},
        **{"miss": None, "used": True, "focus_score": None, "key_kind": None},
        "place": None,
    }
    assert facts["citations"] == [{"document_id": "a", "start": 14, "end": 21, "text": "In Lima", "place": None}]
    assert facts["timings"] == {"prefill": 0.1, "first_token": 0.2, "total": 0.3}


@pytest.mark.parametrize("include_usage", [True, False])
def test_streamed_reply_contains_the_same_as_the_complete_one(client, include_usage):
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


def test_models_are_listed(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "fake/model" and model["kvfusion"]["mode"] == "fusion"
    assert client.get("/v1/models/fake/model").json() == model
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(("mode", "shown"), [(None, "fusion"), ("auto", "fusion"), ("concat", "concat")])
def test_model_object_contains_the_default_mode(generator, mode, shown):
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
def test_errors_have_a_status_and_openais_format(stream, error, status, kind, code):
    found = client_of(RecordingGenerator(error=error)).post(CHAT, json=request(stream=stream))
    assert found.status_code == status
    data = found.json()["error"]
    assert (data["type"], data["code"], data["param"]) == (kind, code, None)
    assert (str(error) in data["message"]) == (code != "internal_error")
    assert "/home" not in found.text and "Traceback" not in found.text
    assert ("retry-after" in found.headers) == (status == 429)


def test_error_within_a_stream_is_its_last_event(caplog):
    generator = RecordingGenerator(error=RuntimeError("in /home/me/model.py"), fail_after=1)
    found = client_of(generator).post(CHAT, json=request(stream=True))
    *_, last, done, rest = found.text.split("\n\n")
    assert found.status_code == 200 and (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "/home" not in found.text and "/home" in caplog.text  # only the log may contain the cause
    assert generator.streams[0].closed


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name", "at most 64"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}] * 129}, "tools", "at most 128"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format",
            "belongs to the type 'json_schema' only",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format.json_schema.schema",
            "valid dictionary",
        ),
        ({"functions": [{"name": "x"}]}, "functions", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "no tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages", "no message of the user"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "y"}]}, "messages", "blank"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "blank"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]},
            "messages[0]",
            "only the assistant calls tools",
        ),
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
        ({"chat_template_kwargs": {"a": "x" * 501}}, "chat_template_kwargs", "at most 500"),
        ({"chat_template_kwargs": {"a": ["nested"]}}, "chat_template_kwargs", "'a' is not a text"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"model": None}, "model", "missing"),
    ],
)
def test_invalid_fields_are_rejected_with_their_name(generator, changes, param, message):
    found = client_of(generator, max_documents=3).post(CHAT, json={**request(), **changes})
    assert found.status_code == 400, found.text
    data = found.json()["error"]
    assert data["type"] == "invalid_request_error" and data["param"] == param and message in data["message"]
    assert generator.calls == []


def test_model_has_the_names_of_the_options_instead_of_its_own(generator):
    client = client_of(generator, model_names=("lighthouse", "org/keeper"))
    listed = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["lighthouse", "org/keeper"]
    assert client.get("/v1/models/org/keeper").json() == listed[1]
    for name in ("lighthouse", "org/keeper"):
        answer = client.post(CHAT, json={**request(), "model": name})
        assert (answer.status_code, answer.json()["model"]) == (200, "lighthouse")
    own = client.post(CHAT, json=request())
    assert own.status_code == 404 and "only 'lighthouse' and 'org/keeper'" in own.json()["error"]["message"]
    assert client.get("/v1/models/fake/model").status_code == 404


@pytest.mark.parametrize("names", [("",), ("a", 1)])
def test_model_names_must_be_texts(names):
    with pytest.raises(InvalidInputError, match="model_names is"):
        ServingOptions(model_names=names)


def test_unknown_models_and_paths_are_not_found(client):
    other = client.post(CHAT, json={**request(), "model": "gpt-4o"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert "'fake/model'" in other.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"
    assert client.get(CHAT).status_code == 405
