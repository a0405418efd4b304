"""The OpenAPI document: every status and content type of a reply is documented for its path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import RecordingGenerator
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_client import CHAT, client_of, request
from starlette.testclient import TestClient

from kvfusion_rag.serving import Access
from tests.serving.test_untrusted import ANY_JSON

KEY = "key-of-the-only-tenant"
FIELDS = ["model", "messages", "documents", "stream", "stop", "chat_template_kwargs"]


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(RecordingGenerator(), Access({KEY: None}), max_documents=2, max_body_bytes=5000)


@pytest.fixture(scope="module")
def schema(client) -> dict[str, Any]:
    return client.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()


def require_documented(schema: dict[str, Any], path: str, response: Any) -> None:
    (operation,) = schema["paths"][path].values()
    documented = operation["responses"][str(response.status_code)]
    assert response.headers["content-type"].partition(";")[0] in documented["content"]


@settings(max_examples=60)
@given(
    path=st.sampled_from([CHAT, "/v1/documents", "/v1/documents/forget"]),
    value=ANY_JSON,
    field=st.sampled_from(FIELDS),
    headers=st.sampled_from(
        [{}, {"authorization": "Bearer x"}, {"origin": "https://x.example"}, {str(n): "" for n in range(200)}]
    ),
)
def test_statuses_and_content_types_are_documented(client, schema, path, value, field, headers):
    base = request(documents=["x"]) if path == CHAT else {"documents": ["x"]}
    content = json.dumps({**base, field: value})
    for sent in ({"authorization": f"Bearer {KEY}"}, headers):
        found = client.post(path, content=content, headers={"content-type": "application/json", **sent})
        require_documented(schema, path, found)


def test_unused_status_of_the_framework_is_not_documented(schema):
    assert "422" not in json.dumps(schema) and "HTTPValidationError" not in json.dumps(schema)


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("/", "/"),
        ("/docs", "/docs"),
        ("/health", "/health"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/{name}", "/v1/models/x"),
    ],
)
def test_paths_without_a_body_are_documented(client, schema, path, url):
    for headers in ({}, {"authorization": f"Bearer {KEY}"}, {"origin": "https://x.example"}):
        require_documented(schema, path, client.get(url, headers=headers))


def test_streams_and_long_bodies_are_documented(client, schema):
    headers = {"authorization": f"Bearer {KEY}"}
    for body in (request(stream=True), request(documents=["x" * 6000]), request(model="other")):
        require_documented(schema, CHAT, client.post(CHAT, json=body, headers=headers))
