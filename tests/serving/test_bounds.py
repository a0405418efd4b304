"""Bodies, ids, titles and questions are bounded before they are parsed, validated, encoded or sent back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from hypothesis import given, settings
from serving_client import CHAT, client_of, request
from starlette.testclient import TestClient

from kvfusion_rag import Document, KVFusionGenerator, Message
from kvfusion_rag.serving import app as app_module
from kvfusion_rag.serving.incoming import has_more_parts
from kvfusion_rag.text.encoder import LONGEST_TOKEN, PlainEncoder
from tests.serving.test_untrusted import ANY_JSON

JSON = {"content-type": "application/json"}
MANY = 100_000


def parts_of(value: object) -> int:
    """Count the strings, commas and openings of the JSON of ``value``."""
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + sum(1 + parts_of(item) for item in value.values())
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(parts_of, value))
    return int(isinstance(value, str))


@settings(max_examples=100)
@given(ANY_JSON)
def test_parts_of_json_are_counted_without_parsing_it(value):
    count = parts_of(value)
    for body in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        data = body.encode("utf-8", "surrogatepass")
        assert not has_more_parts(data, count) and has_more_parts(data, count - 1)


@pytest.mark.parametrize(
    "body", [b'"', b'"\\"' * 50_000, b"\\" * 50_000, b'"' * 50_001, b'\\"' * 50_000], ids=range(5)
)
def test_broken_strings_are_counted_in_one_pass(body):
    assert not has_more_parts(body, len(body))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


HOSTILE: dict[str, dict[str, Any]] = {
    "numbers for documents": {"documents": [0] * MANY},
    "blank documents": {"documents": [""] * MANY},
    "empty documents": {"documents": [{}] * MANY},
    "lists for documents": {"documents": [[]] * MANY},
    "numbers for messages": {"messages": [0] * MANY},
    "parts of a message": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}]},
    "annotations": {"messages": [{"role": "user", "content": "x", "annotations": [0] * MANY}]},
    "stops": {"stop": [0] * MANY},
    "metadata": {"documents": [{"text": "x", "metadata": {str(n): n for n in range(MANY)}}]},
    "variables": {"chat_template_kwargs": {str(n): n for n in range(MANY)}},
    "unknown fields": {str(n): n for n in range(MANY)},
    "unknown fields of a document": {"documents": [{str(n): n for n in range(MANY)}]},
    "an ignored field": {"user": [[]] * MANY},
    "focus": {"focus": [0] * MANY},
    "a field without effect": {"logit_bias": {str(n): n for n in range(MANY)}},
}


@pytest.mark.parametrize("path", [CHAT, "/v1/documents", "/v1/documents/forget"])
@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_bodies_of_many_parts_are_rejected_before_they_are_parsed(monkeypatch, path, fields):
    monkeypatch.setattr(json, "loads", lambda *given, **options: pytest.fail("the body was parsed"))
    found = client_of(RecordingGenerator()).post(path, content=json.dumps({**request(), **fields}), headers=JSON)
    monkeypatch.undo()
    assert found.status_code == 400 and found.json()["error"]["code"] == "body_too_complex"


@pytest.mark.parametrize("path", [CHAT, "/v1/documents", "/v1/documents/forget"])
@pytest.mark.parametrize("name", HOSTILE)
def test_number_of_errors_in_a_body_is_bounded(monkeypatch, path, name):
    (field, value), *_ = HOSTILE[name].items()
    few = dict(list(HOSTILE[name].items())[:2000]) if len(HOSTILE[name]) > 1 else {field: shortened(value, 2000)}
    counts: list[int] = []
    describe = app_module.of_validation
    monkeypatch.setattr(app_module, "of_validation", lambda errors: counts.append(len(errors)) or describe(errors))
    fields = few if path == CHAT else {"documents": few.get("documents", [0] * 2000)}
    base = request() if path == CHAT else {}
    found = client_of(RecordingGenerator()).post(path, content=json.dumps({**base, **fields}), headers=JSON)
    assert found.status_code == 400 or name in ("annotations", "an ignored field", "parts of a message")
    assert all(count <= 10 for count in counts) and len(found.content) < 2000


def shortened(value: Any, size: int) -> Any:
    """Return ``value`` with at most ``size`` items at every level."""
    if isinstance(value, list):
        return [shortened(item, size) for item in value[:size]]
    if isinstance(value, dict):
        return {name: shortened(item, size) for name, item in list(value.items())[:size]}
    return value


# Replies


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("field", "most"), [("id", 256), ("title", 1000)])
def test_ids_and_titles_are_limited(field, most, stream):
    client = client_of(RecordingGenerator())
    for path in (CHAT, "/v1/documents", "/v1/documents/forget"):
        fields = request(stream=stream) if path == CHAT else {}
        for size, status in ((most, 200), (most + 1, 400), (20_000, 400)):
            found = client.post(path, json={**fields, "documents": [{"text": "x", field: "x" * size}]})
            assert found.status_code == status
            assert status == 200 or (found.json()["error"]["param"], len(found.content) < 1000) == (
                f"documents[0].{field}",
                True,
            )


@pytest.mark.parametrize("path", [CHAT, "/v1/documents"])
def test_reply_is_not_much_larger_than_its_request(path):
    text = "The ferry carries forty cars."
    documents = [{"id": "x" * 256 if n == 0 else str(n), "text": text} for n in range(256)]
    body = json.dumps({**(request() if path == CHAT else {}), "documents": documents})
    found = client_of(RecordingGenerator()).post(path, content=body, headers=JSON)
    assert found.status_code == 200 and len(found.content) < 10 * len(body)


# Tokens


@pytest.fixture(scope="module")
def generator() -> KVFusionGenerator:
    return tiny.generator(long_documents="split")


@pytest.fixture
def client(generator) -> TestClient:
    return client_of(generator)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Lengths of all texts that are encoded."""
    lengths: list[int] = []
    encoding = PlainEncoder._encoding
    monkeypatch.setattr(
        PlainEncoder, "_encoding", lambda self, text, **kw: lengths.append(len(text)) or encoding(self, text, **kw)
    )
    return lengths


@pytest.mark.parametrize(
    "text", ["how many ", "x", " ", "漢", "a1,;"], ids=["words", "letter", "blank", "cjk", "signs"]
)
def test_characters_that_are_encoded_do_not_grow_with_long_questions_and_titles(generator, encoded, text):
    question = "who?"
    for size in (300_000, 1_200_000):
        long = "?" + text * (size // len(text))
        for call in (
            lambda long=long: generator.answer(long, ["the mill"]),
            lambda long=long: generator.answer(question, ["the mill"], prompt=[Message("user", long)]),
            lambda long=long: generator.answer(question, [Document("the mill", title=long)]),
            lambda long=long: generator.prefill([Document("the mill", title=long)]),
            lambda long=long: generator.prefill(["the mill"], prompt=[Message("user", long)], question=long),
            lambda long=long: generator.forget([Document("the mill", title=long)]),
        ):
            encoded.clear()
            with pytest.raises(ValueError, match=f"has {len(long)} characters"):
                call()
            assert sum(encoded) < 10 * LONGEST_TOKEN * (generator.context_window or 0)


def test_long_questions_are_client_errors(client, generator):
    for fields in (
        {"messages": [{"role": "user", "content": "how many " * 20_000}]},
        {"messages": [{"role": "system", "content": "x " * 90_000}, {"role": "user", "content": "who?"}]},
    ):
        found = client.post(CHAT, json={**request(documents=["the mill"]), "model": generator.model_id, **fields})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
