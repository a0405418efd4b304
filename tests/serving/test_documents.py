"""Requests that prefill and remove documents, and the metrics of the store."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from fakes import RecordingGenerator
from serving_client import CHAT, client_of, request


def test_documents_are_prefilled_loaded_and_removed():
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


def test_documents_are_prefilled_for_a_conversation():
    generator = tiny.untuned("fusion")
    client = client_of(generator)
    documents = [{"text": "the river runs past an old mill"}, {"text": "two grey doves sleep"}]
    system = {"role": "system", "content": "Is it true? Be brief."}

    def origins(question: str, *before: dict[str, Any]) -> set[str]:
        asked = request(*before, {"role": "user", "content": question}, documents=documents, max_tokens=1)
        answer = client.post(CHAT, json={**asked, "model": generator.model_id}).json()
        return {s["origin"] for s in answer["kvfusion"]["sources"]}

    example = {"messages": [system, {"role": "user", "content": "anything"}]}
    assert client.post("/v1/documents", json={"documents": documents, **example}).status_code == 200
    assert origins("who sleeps?") == {"computed"}  # without the system message
    assert origins("who sleeps?", system) == {"memory"}
    turns = [system, {"role": "user", "content": "who?"}, {"role": "assistant", "content": "she"}]
    assert origins("who sleeps?", *turns) == {"memory"}


def test_documents_are_prefilled_for_requests_with_tools():
    pytest.importorskip("llguidance")
    generator = tiny.untuned("fusion")
    client = client_of(generator)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    documents = [{"text": "the river runs past an old mill"}]

    def origin(**more: Any) -> str:
        body = request({"role": "user", "content": "who?"}, documents=documents, max_tokens=40, **more)
        answer = client.post(CHAT, json={**body, "model": generator.model_id}).json()
        return answer["kvfusion"]["sources"][0]["origin"]

    example = {"messages": [{"role": "user", "content": "anything"}], "tools": [tool]}
    assert client.post("/v1/documents", json={"documents": documents, **example}).status_code == 200
    assert (origin(tools=[tool]), origin()) == ("memory", "computed")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages"),
        ({"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs"),
        ({"mode": "fusion"}, "mode"),
    ],
    ids=["tool", "none", "no user", "many", "nested", "unknown"],
)
def test_prefill_messages_have_the_limits_of_chats(fields, param):
    client = client_of(RecordingGenerator())
    found = client.post("/v1/documents", json={"documents": ["x"], **fields})
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert client.post("/v1/documents/forget", json={"documents": ["x"], "messages": []}).status_code == 400


def test_prefill_without_a_store_is_a_client_error():
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
