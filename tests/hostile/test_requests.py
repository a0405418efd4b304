"""Requests that anybody may send: an answer or a client's error of bounded size, whatever body and headers say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from fuzzing import JSON, LARGE, examples
from growth import growth_of_time
from hypothesis import given
from hypothesis import strategies as st
from serving_client import CHAT, client_of, request
from starlette.testclient import TestClient

from kvfusion_rag.serving import Access
from kvfusion_rag.serving.bodies import ChatRequest
from kvfusion_rag.text.chat import _split_off_question

KEY = "key-of-the-only-tenant"
PATHS = [CHAT, "/v1/documents", "/v1/documents/forget"]
HEADERS = {"content-type": "application/json"}
FIELDS = sorted(ChatRequest.model_fields)
DOCUMENT_FIELDS = ["text", "id", "title", "metadata", "score"]
NAMES = ["host", "origin", "authorization", "content-type", "content-length", "transfer-encoding", "accept-encoding",
         "access-control-request-method", "cookie", "expect", "range", "x-forwarded-for"]  # fmt: skip
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30) | st.sampled_from(
    ["localhost:99999", "[::1", "[::1]:x", "Bearer", f"Bearer {KEY}", "-1", "9" * 30, "gzip", "http://[", "null"]
)


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A client of a small model that reads the client's own messages."""
    return client_of(tiny.untuned("fusion", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def guarded() -> TestClient:
    return client_of(RecordingGenerator(), Access({KEY: None}, hosts=["localhost"], origins=["https://a.example"]))


def require_client_error(found: Any, sent: int, answered: int = 0) -> None:
    """Check a reply to a body of ``sent`` bytes that may be answered with ``answered`` tokens."""
    assert found.status_code < 500, found.text
    if found.status_code != 200:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        assert len(found.content) < 2000
    assert len(found.content) < 3000 + 10 * sent + 20 * answered


def ask(client: TestClient, path: str = CHAT, **fields: Any) -> Any:
    base = {"model": "tiny-llama", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 1}
    body = json.dumps({**(base if path == CHAT else {}), "documents": ["the mill"], **fields})
    found = client.post(path, content=body, headers=HEADERS)
    limits = [fields.get(name) for name in ("max_tokens", "max_completion_tokens")]
    answered = max((limit for limit in limits if isinstance(limit, int | float) and 0 <= limit <= 4096), default=0)
    require_client_error(found, len(body), int(answered))
    return found


@examples(40)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_values_in_any_fields(client, values):
    ask(client, **values)


@examples(30)
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(DOCUMENT_FIELDS), JSON, max_size=4))
def test_any_values_in_any_fields_of_a_document(client, path, values):
    ask(client, path, documents=[{"text": "the mill", **values}, "the mill"])


@examples(40)
@given(st.sampled_from([*PATHS, "/health", "/v1/models", "/v1/models/x"]),
       st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5))  # fmt: skip
def test_any_headers(guarded, path, headers):
    content = None if path not in PATHS else json.dumps(request(documents=["x"]))
    found = guarded.request("GET" if content is None else "POST", path, content=content, headers=headers)
    assert found.status_code < 500 and len(found.content) < 5000


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("model", "messages")])
def test_numbers_that_no_float_can_hold(client, name):
    for value in (LARGE, -LARGE):
        ask(client, **{name: value})
    ask(client, documents=[{"text": "x", "score": LARGE}])


@pytest.mark.parametrize("depth", [100, 500, 900, 980, 1000, 5000])
@pytest.mark.parametrize("field", ['"documents": [{"text": "x", "metadata": %s}]', '"user": %s', '"tools": %s',
                                   '"chat_template_kwargs": {"a": %s}', '"messages": %s'])  # fmt: skip
def test_values_of_any_depth(client, field, depth):
    for opening, closing in (('{"a":', "}"), ("[", "]")):
        value = opening * depth + "1" + closing * depth
        body = (
            '{"model": "tiny-llama", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}], ' + field % value
        )
        require_client_error(client.post(CHAT, content=body + "}", headers=HEADERS), len(body))


# Questions that are repeated in the prompt


@pytest.mark.parametrize("line", ["a\n", "x a\n\n", "a a a\n", "\na"])
@pytest.mark.parametrize("path", [CHAT, "/v1/documents"])
def test_question_that_is_repeated_in_the_system_message(client, path, line):
    messages = [{"role": "system", "content": line * 1500}, {"role": "user", "content": "a"}]
    assert ask(client, path, messages=messages).status_code in (200, 400)


@examples(60)
@given(st.lists(st.sampled_from(["who", "built", " ", "\n", "x", "who?"]), max_size=12).map("".join))
def test_lines_with_the_question_are_separated_and_nothing_is_lost(text):
    others, lines = _split_off_question(text, "who")
    assert "who" not in others.split("\n") and sorted(others + lines) == sorted(text)
    assert all("who" in line or not line for line in lines.split("\n"))


def test_time_to_separate_the_question_grows_in_step_with_the_text():
    assert growth_of_time(lambda size: _split_off_question("x a\n\n" * size, "a"), 2_000) < 10
