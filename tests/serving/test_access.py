"""Access control: keys, namespaces, host names and web pages."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import httpx
import pytest
import tiny
from fakes import RecordingGenerator
from serving_client import CHAT, client_of, request

from kvfusion_rag import InvalidInputError, KVFusionError, KVFusionGenerator
from kvfusion_rag.cli import main
from kvfusion_rag.serving import Access, bind, create_app, read_keys, require_guarded, running

KEY, OTHER = "key-of-the-first-tenant", "key-of-the-other-tenant"


@pytest.fixture(scope="module")
def tenants() -> KVFusionGenerator:
    return tiny.generator()


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
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/documents", "/v1/models", "/v1/library", "/openapi.json", "/docs", "/no/such/path"]
)
def test_requests_without_a_valid_key_are_rejected(headers, path):
    generator = RecordingGenerator()
    client = client_of(generator, Access({KEY: None}))
    method = client.post if path in (CHAT, "/v1/documents") else client.get
    found = method(path, headers=headers)
    assert found.status_code == 401 and generator.calls == []
    assert found.json()["error"]["code"] == "invalid_api_key" and found.headers["www-authenticate"] == "Bearer"


def test_every_key_is_valid_and_health_needs_none(tenants):
    client = client_of(tenants, Access({KEY: None, OTHER: "b"}))
    assert [client.get("/v1/models", headers=bearer(key)).status_code for key in (KEY, OTHER)] == [200, 200]
    assert client.get("/v1/models", headers={"authorization": f"bearer  {KEY}"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_each_namespace_has_its_own_documents(tenants):
    client = client_of(tenants, Access({KEY: "a", OTHER: "b"}))
    documents = {"documents": ["the river runs past an old mill"]}
    assert client.post("/v1/documents", json=documents, headers=bearer(KEY)).json()["data"][0]["origin"] == "computed"
    body = request(**documents, max_tokens=1, model=tenants.model_id)

    def origin(key: str) -> str:
        return client.post(CHAT, json=body, headers=bearer(key)).json()["kvfusion"]["sources"][0]["origin"]

    assert origin(OTHER) == "computed" and origin(KEY) == "memory"
    assert client.post("/v1/documents/forget", json=documents, headers=bearer(OTHER)).json()["removed"] == 1
    assert origin(KEY) == "memory"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7:8000", 200),  # DNS rebinding needs a name
        ("rebound.example:8000", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("user@rebound.example", 403),
        ("[::1", 403),
        ("", 403),
        ("rag.internal", 403),
    ],
)
def test_server_without_keys_accepts_only_its_own_host_names(host, status):
    generator = RecordingGenerator()
    found = client_of(generator).post(CHAT, json=request(), headers={"host": host})
    assert found.status_code == status and len(generator.calls) == (status == 200)


def test_host_names_can_be_allowed_and_keys_make_this_unnecessary():
    keyless = client_of(RecordingGenerator(), Access(hosts=["Rag.internal"]))
    assert keyless.get("/health", headers={"host": "rag.internal"}).status_code == 200
    named = client_of(RecordingGenerator(), Access({KEY: None}, hosts=["rag.internal"]))
    keyed = client_of(RecordingGenerator(), Access({KEY: None}))
    for client, host, status in [(named, "rag.internal", 200), (named, "x.example", 403), (keyed, "x.example", 200)]:
        assert client.get("/v1/models", headers={**bearer(KEY), "host": host}).status_code == status


@pytest.mark.parametrize("origin", ["https://page.example", "http://localhost:3000", "null"])
def test_web_pages_are_rejected_unless_their_origin_is_allowed(origin):
    generator = RecordingGenerator()
    # A form or a script can send this request without a preflight request:
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


def test_body_with_another_content_type_is_rejected():
    generator = RecordingGenerator()
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        found = client_of(generator).post(CHAT, content=json.dumps(request()), headers=headers)
        assert found.status_code == 400 and "application/json" in found.json()["error"]["message"]
    assert generator.calls == []


@pytest.mark.parametrize(
    "key", ["short", "x" * 15, "with blanks in the midst", "ключ-из-других-букв", "line\nbreak-in-a-key"]
)
def test_weak_and_invalid_keys_are_rejected_without_quoting_them(key):
    with pytest.raises(InvalidInputError, match="openssl rand") as rejected:
        Access({key: None})
    assert key not in str(rejected.value)


def test_repr_does_not_contain_keys():
    assert KEY not in repr(Access({KEY: "a"}))


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({KEY: "a", OTHER: None}))
    assert read_keys(path) == {KEY: "a", OTHER: None}
    with pytest.raises(InvalidInputError, match=r"namespace is '\.\./a'"):
        Access({KEY: "../a"})


@pytest.mark.parametrize("text", ["", "{}", "[]", f'["{KEY}"]', f'{{"{KEY}": 7}}', "[" * 100_000, "{", f'"{KEY}"'])
def test_file_without_keys_is_rejected_without_quoting_it(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"keys\.json") as rejected:
        read_keys(path)
    assert KEY not in str(rejected.value)
    with pytest.raises(InvalidInputError, match="No such file"):
        read_keys(tmp_path / "absent.json")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "rag.internal", ""])
def test_public_host_needs_a_key(host):
    with pytest.raises(InvalidInputError, match="no API key"):
        require_guarded(host, Access())
    require_guarded(host, Access({KEY: None}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_host_needs_no_key(host):
    require_guarded(host, Access())


def test_address_in_use_raises_an_error():
    with running(create_app(RecordingGenerator())) as url:  # type: ignore[arg-type]
        port = int(url.rpartition(":")[2])
        with pytest.raises(InvalidInputError, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port)
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 70_000), ("203.0.113.7", 0)):
        with pytest.raises(InvalidInputError, match="cannot listen"):
            bind(host, port)


@pytest.mark.parametrize("name", ["hosts", "origins"])
def test_string_instead_of_a_list_is_rejected(name):
    with pytest.raises(InvalidInputError, match=f"{name} is 'https://app.example'"):
        Access(**{name: "https://app.example"})


@pytest.mark.parametrize(
    ("origin", "advice"),
    [
        ("*", None),
        ("https://*.example", None),
        ("app.example", None),
        ("app.example:8080", None),
        ("https://", None),
        ("https://user@app.example", None),
        ("https://app.example:port", None),
        ("https://app.example, https://other.example", None),
        ("", None),
        ("https://app.example/", "https://app.example"),
        ("https://app.example/path?x=1", "https://app.example"),
        ("https://App.example", "https://app.example"),
        ("HTTP://app.example:80", "http://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://[::1]:3000/", "http://[::1]:3000"),
    ],
)
def test_origins_that_no_browser_sends_are_rejected_with_the_correct_form(origin, advice):
    with pytest.raises(InvalidInputError, match="allowed origin") as rejected:
        Access(origins=[origin])
    assert ("write" in str(rejected.value)) == (advice is not None)
    if advice:
        assert f"write {advice!r}" in str(rejected.value)
        Access(origins=[advice])


@pytest.mark.parametrize("origin", ["null", "http://localhost:3000", "tauri://localhost", "chrome-extension://abcdef"])
def test_origins_of_browsers_are_accepted(origin):
    assert Access(origins=[origin]).origins == [origin]


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("*", None),
        ("*.example", None),
        ("", None),
        ("rag internal", None),
        ("rag.internal.", None),
        ("rag.internal:8000", "rag.internal"),
        ("http://rag.internal:8000/v1", "rag.internal"),
        ("rag.internal/", "rag.internal"),
    ],
)
def test_hosts_that_match_no_request_are_rejected_with_the_correct_form(host, advice):
    with pytest.raises(InvalidInputError, match="allowed host") as rejected:
        Access(hosts=[host])
    if advice:
        assert f"write {advice!r}" in str(rejected.value)
        Access(hosts=[advice])


def test_repeated_key_is_rejected_without_quoting_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "keys.json"
    path.write_text(f'{{"{KEY}": "a", "{OTHER}": "b", "{KEY}": "c"}}')
    with pytest.raises(InvalidInputError, match="a key twice") as rejected:
        read_keys(path)
    assert KEY not in str(rejected.value)
    path.write_text(f'{{"{KEY}": "a"}}')
    monkeypatch.setenv("RAG_KEY", KEY)
    assert main(["serve", "--api-keys-file", str(path), "--api-key-env", "RAG_KEY"]) == 2
    err = capsys.readouterr().err
    assert "is also in" in err and KEY not in err


def test_app_that_fails_to_start_does_not_hang():
    app = create_app(RecordingGenerator())  # type: ignore[arg-type]

    @asynccontextmanager
    async def fails(app):
        raise RuntimeError("no")
        yield

    app.router.lifespan_context = fails
    with pytest.raises(KVFusionError, match="did not start"), running(app):
        pass


@pytest.mark.parametrize(
    ("trusted", "origin", "proto", "status"),
    [
        (["127.0.0.1"], "https://rag.example", "https", 200),
        (["10.0.0.1", "127.0.0.1"], "https://rag.example", "https", 200),
        (["127.0.0.1"], "https://evil.example", "https", 403),
        (["127.0.0.1"], "https://rag.example", None, 403),
        (["127.0.0.1"], "http://rag.example", None, 200),
        (["10.0.0.1"], "https://rag.example", "https", 403),
        ([], "https://rag.example", "https", 403),
    ],
)
def test_page_behind_a_proxy_with_tls_needs_a_trusted_proxy(trusted, origin, proto, status):
    headers = {"host": "rag.example", "origin": origin} | ({} if proto is None else {"x-forwarded-proto": proto})
    with running(
        create_app(RecordingGenerator(), access=Access(hosts=["rag.example"])), trusted_proxies=trusted
    ) as url:
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
