"""The ingress in front of replicas: the API of the single server, sessions, lost replicas. These tests need no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import tiny
from fakes import RecordingGenerator
from ingress import LocalReplicas, ingress_client
from serving_client import CHAT, client_of, events, request
from starlette.testclient import TestClient
from starlette.types import Message

from kvfusion_rag import InvalidInputError
from kvfusion_rag.cluster import Replicas
from kvfusion_rag.cluster.serving.ingress import ATTEMPTS, ReplicaLostError, create_ingress, session_of
from kvfusion_rag.cluster.serving.replica import Forwarded, Replica
from kvfusion_rag.serving import Access, ServingOptions

ROOT = Path(__file__).parents[2]
KEY, OTHER = "key-of-the-first-tenant", "key-of-the-other-tenant"
DOCUMENTS = ["The mill was built by Thomas Grant.", {"text": "Rice is eaten everywhere.", "id": "rice"}]


class Failing(LocalReplicas):
    """Replicas that end after ``pieces`` messages, ``failures`` times."""

    def __init__(self, replicas: list[Replica], failures: int, pieces: int = 0) -> None:
        super().__init__(replicas)
        self.failures, self.pieces = failures, pieces

    async def respond(self, request: Forwarded, session: str) -> AsyncGenerator[Message, None]:
        number = 0
        async for message in super().respond(request, session):
            if self.failures and number == self.pieces:
                self.failures -= 1
                raise ReplicaLostError("killed")
            number += 1
            yield message


def client_over(replicas: LocalReplicas, access: Access | None = None, most: int = 1, **options) -> TestClient:
    facts = replicas.replicas[0].facts()
    app = create_ingress(
        facts["model"], facts["schema"], replicas, access=access or Access(), options=ServingOptions(**options),
        most_replicas=most,
    )  # fmt: skip
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def replica(generator=None, namespaces=()) -> Replica:
    return Replica(generator or RecordingGenerator(), namespaces, ServingOptions())


@pytest.mark.slow
def test_every_test_of_the_single_server_holds_behind_the_ingress():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "through_ingress",
        "tests/serving",
    ]
    labelled = "tests/serving/test_documents.py::test_metrics_count_requests_and_documents"
    path = os.pathsep.join([str(ROOT / "tests/helpers"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [*command, "-m", "not slow", "--deselect", labelled, "--ignore", "tests/serving/test_command.py"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-5000:]


def test_paths_and_their_schema_are_those_of_the_single_server():
    pytest.importorskip("prometheus_client")
    generator = tiny.generator()
    ours, single = ingress_client(generator, metrics=True), client_of(generator, metrics=True)
    schema = ours.get("/openapi.json").json()
    assert schema == single.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method in ("get", "post", "put", "delete"):
            replies = [getattr(client, method)(path.replace("{name}", "x")) for client in (ours, single)]
            assert replies[0].status_code == replies[1].status_code, (method, path)
            assert (replies[0].status_code == 405) == (method not in operations)


def test_requests_with_the_same_documents_share_a_session_in_any_order():
    def session(documents, namespace=None, **fields) -> str:
        body = json.dumps(request(documents=documents, **fields)).encode()
        return session_of(Forwarded(CHAT, "application/json", body, namespace))

    assert session(DOCUMENTS) == session(DOCUMENTS[::-1], stream=True) == session([*DOCUMENTS, DOCUMENTS[0]])
    assert session(DOCUMENTS) != session(["other"]) and session(DOCUMENTS) != session(DOCUMENTS, "tenant")
    assert session(["\ud800"]) and session([]) == ""


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"[]", b"null", b'{"documents": 3}', b'{"documents": [3]}', b"\xff",
             b'{"documents": [{"title": "x"}]}', b'{"documents": [{"text": 3}]}', b'{"documents": ' + b"9" * 5000],
)  # fmt: skip
def test_body_without_documents_has_no_session(body):
    assert session_of(Forwarded(CHAT, "application/json", body)) == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces", [0, 1])
def test_replica_that_ends_before_the_first_piece_is_replaced(stream, pieces):
    generator = RecordingGenerator()
    replicas = Failing([replica(generator)], failures=ATTEMPTS - 1, pieces=pieces)
    found = client_over(replicas).post(CHAT, json=request(documents=DOCUMENTS, stream=stream))
    assert found.status_code == 200 and ("lima" in found.text)
    assert len(set(replicas.sessions)) == 1 and len(replicas.sessions) == ATTEMPTS


def test_request_that_ends_every_replica_is_an_error():
    replicas = Failing([replica()], failures=100)
    found = client_over(replicas).post(CHAT, json=request())
    assert (found.status_code, found.json()["error"]["code"]) == (503, "replica_lost")
    assert found.headers["retry-after"] == "1" and len(replicas.sessions) == ATTEMPTS


def test_stream_ends_with_an_error_if_the_replica_ends_after_the_first_piece():
    replicas = Failing([replica()], failures=1, pieces=3)
    found = client_over(replicas).post(CHAT, json=request(stream=True))
    *pieces, last = events(found.text)
    assert found.status_code == 200 and len(replicas.sessions) == 1
    assert [piece["choices"][0]["delta"].get("content") for piece in pieces] == ["", "in"]
    assert last["error"]["code"] == "replica_lost"


def test_requests_are_rejected_before_they_reach_a_replica():
    replicas = LocalReplicas([replica()])
    client = client_over(replicas, Access({KEY: None}), max_body_bytes=1000)
    assert client.post(CHAT, json=request()).status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    long = json.dumps(request(documents=["x" * 1000]))
    assert client.post(CHAT, content=long, headers=headers).status_code == 413
    assert client.post(CHAT, json=request(), headers={**headers, "origin": "https://x.example"}).status_code == 403
    assert replicas.sessions == []
    assert client.post(CHAT, json=request(), headers=headers).status_code == 200


def test_replica_gets_the_namespace_of_the_key_and_no_key():
    seen = []

    class Watching(LocalReplicas):
        def respond(self, request, session):
            seen.append(request)
            return super().respond(request, session)

    replicas = Watching([replica(tiny.generator(), ["b"])])
    client = client_over(replicas, Access({KEY: None, OTHER: "b"}))
    for key in (KEY, OTHER):
        headers = {"authorization": f"Bearer {key}", "cookie": "secret=1"}
        assert client.post("/v1/documents", json={"documents": ["x"]}, headers=headers).status_code == 200
    assert [one.namespace for one in seen] == [None, "b"]
    assert KEY not in repr(seen) and "secret" not in repr(seen)


def test_documents_are_removed_from_every_replica():
    generators = [tiny.generator() for _ in range(2)]
    replicas = LocalReplicas([replica(generator) for generator in generators])
    client = client_over(replicas)
    for generator in generators:
        generator.prefill(["the river", "the mill"])
    found = client.post("/v1/documents/forget", json={"documents": ["the river"]})
    assert found.json() == {"object": "documents.forgotten", "removed": 2}
    for generator in generators:
        assert [one.origin for one in generator.prefill(["the river", "the mill"])] == ["computed", "memory"]
    wrong = client.post("/v1/documents/forget", json={})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "documents")


def test_metrics_have_the_requests_of_the_ingress_and_the_store_of_each_replica():
    pytest.importorskip("prometheus_client")
    generators = [tiny.generator() for _ in range(2)]
    replicas = LocalReplicas([replica(generator) for generator in generators])
    client = client_over(replicas, metrics=True)
    client.post("/v1/documents", json={"documents": ["the river"]})
    lines = client.get("/metrics").text.splitlines()
    assert 'kvfusion_server_requests_total{path="/v1/documents",status="200"} 1.0' in lines
    assert 'kvfusion_store_computed_total{replica="0"} 2.0' in lines
    assert 'kvfusion_store_computed_total{replica="1"} 0.0' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_page_of_metrics_has_the_requests_while_no_replica_answers():
    pytest.importorskip("prometheus_client")

    class Silent(LocalReplicas):
        async def metrics(self):
            raise ReplicaLostError("no answer within 5 s")

    client = client_over(Silent([replica(tiny.generator())]), metrics=True)
    assert client.get("/health").status_code == 200
    found = client.get("/metrics")
    assert found.status_code == 200 and 'requests_total{path="/health",status="200"} 1.0' in found.text
    assert "kvfusion_store" not in found.text


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:8", (1, 8)), ("10000", (10_000, 10_000))])
def test_replicas_are_read(text, expected):
    found = Replicas.read(text)
    assert (found.least, found.most) == expected


@pytest.mark.parametrize("text", ["", "0", "8:1", "1:", ":8", "1:2:3", "-1", "x", "1.5", "0:4", "10001", "٣"])
def test_other_replicas_are_rejected(text):
    with pytest.raises(InvalidInputError, match="replicas are"):
        Replicas.read(text)
