"""Who may ask: keys, tenants, names of the server, and web pages."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest
import tiny
from fakes import RecordingGenerator

from kvfusion_rag import InvalidInputError, KVFusionError
from kvfusion_rag.serving import Access, bind, create_app, read_keys, require_guarded, running
from tests.serving.test_serving import CHAT, client_of, request

KEY, OTHER = "key-of-the-first-tenant", "key-of-the-other-tenant"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        bearer(""),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(KEY.upper()),
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Bearer " + "x" * 5000},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/documents", "/v1/models", "/openapi.json", "/no/such/path"])
def test_without_a_right_key_nothing_is_answered(headers, path):
    generator = RecordingGenerator()
    client = client_of(generator, Access({KEY: None}))
    method = client.post if path in (CHAT, "/v1/documents") else client.get
    found = method(path, headers=headers)
    assert found.status_code == 401 and generator.calls == []
    assert found.json()["error"]["code"] == "invalid_api_key" and found.headers["www-authenticate"] == "Bearer"


def test_each_of_several_keys_is_right_and_health_needs_none():
    client = client_of(tiny.generator(), Access({KEY: None, OTHER: "b"}))
    assert [client.get("/v1/models", headers=bearer(key)).status_code for key in (KEY, OTHER)] == [200, 200]
    assert client.get("/v1/models", headers={"authorization": f"bearer  {KEY}"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_tenants_have_documents_of_their_own():
    generator = tiny.generator()
    client = client_of(generator, Access({KEY: "a", OTHER: "b"}))
    documents = {"documents": ["the river runs past an old mill"]}
    assert client.post("/v1/documents", json=documents, headers=bearer(KEY)).json()["data"][0]["origin"] == "computed"
    asked = {**request(**documents, max_tokens=1), "model": generator.model_id}

    def origin(key: str) -> str:
        return client.post(CHAT, json=asked, headers=bearer(key)).json()["kvfusion"]["sources"][0]["origin"]

    assert origin(OTHER) == "computed" and origin(KEY) == "memory"
    assert client.post("/v1/documents/forget", json=documents, headers=bearer(OTHER)).json()["removed"] == 1
    assert origin(KEY) == "memory"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7:8000", 200),  # an address is no name that a page's DNS leads here
        ("rebound.example:8000", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("user@rebound.example", 403),
        ("[::1", 403),
        ("", 403),
        ("rag.internal", 403),
    ],
)
def test_a_server_without_keys_answers_to_its_own_names_alone(host, status):
    generator = RecordingGenerator()
    found = client_of(generator).post(CHAT, json=request(), headers={"host": host})
    assert found.status_code == status and len(generator.calls) == (status == 200)


def test_further_names_are_allowed_by_name_and_keys_make_them_needless():
    assert client_of(RecordingGenerator(), Access(hosts=["Rag.internal"])).get(
        "/health", headers={"host": "rag.internal"}
    )
    named = client_of(RecordingGenerator(), Access({KEY: None}, hosts=["rag.internal"]))
    keyed = client_of(RecordingGenerator(), Access({KEY: None}))
    for client, host, status in [(named, "rag.internal", 200), (named, "x.example", 403), (keyed, "x.example", 200)]:
        assert client.get("/v1/models", headers={**bearer(KEY), "host": host}).status_code == status


@pytest.mark.parametrize("origin", ["https://page.example", "http://localhost:3000", "null"])
def test_web_pages_are_not_answered_unless_their_origin_is_named(origin):
    generator = RecordingGenerator()
    # What a form or a script can send without asking first:
    simple = {"origin": origin, "content-type": "text/plain"}
    found = client_of(generator).post(CHAT, content=json.dumps(request()), headers=simple)
    assert found.status_code == 403 and generator.calls == []
    assert "access-control-allow-origin" not in found.headers
    asking = {"origin": origin, "access-control-request-method": "POST"}
    assert client_of(generator).options(CHAT, headers=asking).status_code == 403

    named = client_of(generator, Access(origins=[origin]))
    assert named.options(CHAT, headers=asking).headers["access-control-allow-origin"] == origin
    assert named.post(CHAT, json=request(), headers={"origin": origin}).status_code == 200
    assert named.post(CHAT, json=request(), headers={"origin": "https://other.example"}).status_code == 403


def test_a_body_that_is_not_sent_as_json_is_not_read():
    generator = RecordingGenerator()
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        found = client_of(generator).post(CHAT, content=json.dumps(request()), headers=headers)
        assert found.status_code == 400 and "application/json" in found.json()["error"]["message"]
    assert generator.calls == []


@pytest.mark.parametrize(
    "key", ["short", "x" * 15, "with blanks in the midst", "ключ-из-других-букв", "line\nbreak-in-a-key"]
)
def test_weak_and_unsendable_keys_are_refused_without_being_repeated(key):
    with pytest.raises(InvalidInputError, match="openssl rand") as refused:
        Access({key: None})
    assert key not in str(refused.value)


def test_keys_are_in_no_representation():
    assert KEY not in repr(Access({KEY: "a"}))


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({KEY: "a", OTHER: None}))
    assert read_keys(path) == {KEY: "a", OTHER: None}
    with pytest.raises(InvalidInputError, match=r"namespace is '\.\./a'"):
        Access({KEY: "../a"})


@pytest.mark.parametrize("text", ["", "{}", "[]", f'["{KEY}"]', f'{{"{KEY}": 7}}', "[" * 100_000, "{", f'"{KEY}"'])
def test_a_file_without_keys_is_refused_without_being_repeated(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"keys\.json") as refused:
        read_keys(path)
    assert KEY not in str(refused.value)
    with pytest.raises(InvalidInputError, match="No such file"):
        read_keys(tmp_path / "absent.json")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "rag.internal", ""])
def test_other_machines_are_let_in_with_a_key_alone(host):
    with pytest.raises(InvalidInputError, match="no API key"):
        require_guarded(host, Access())
    require_guarded(host, Access({KEY: None}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_key(host):
    require_guarded(host, Access())


def test_an_address_that_is_taken_is_said():
    from kvfusion_rag.serving import create_app

    with running(create_app(RecordingGenerator())) as url:  # type: ignore[arg-type]
        port = int(url.rpartition(":")[2])
        with pytest.raises(InvalidInputError, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port)
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 70_000), ("203.0.113.7", 0)):
        with pytest.raises(InvalidInputError, match="cannot listen"):
            bind(host, port)


@pytest.mark.parametrize("name", ["hosts", "origins"])
def test_one_string_is_no_list_of_names(name):
    with pytest.raises(InvalidInputError, match=f"{name} is 'https://app.example'"):
        Access(**{name: "https://app.example"})


def test_an_app_that_fails_as_it_starts_does_not_hang():
    app = create_app(RecordingGenerator())  # type: ignore[arg-type]

    @asynccontextmanager
    async def fails(app):
        raise RuntimeError("no")
        yield

    app.router.lifespan_context = fails
    with pytest.raises(KVFusionError, match="did not start"), running(app):
        pass
