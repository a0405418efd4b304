"""The pages for browsers at ``/`` and ``/docs``, without a browser. ``test_browser.py`` uses them."""

from __future__ import annotations

import re

import pytest
from fakes import RecordingGenerator
from serving_client import CHAT, client_of, request
from starlette.testclient import TestClient

from kvfusion_rag.serving import Access
from kvfusion_rag.serving.pages import FILES, PAGE_PATHS

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(RecordingGenerator())


def links(text: str) -> list[str]:
    return re.findall(r'(?:href|src)="([^"]*)"', text)


def test_links_of_the_page_answer_and_are_relative(client):
    """Relative links also work behind a proxy that serves the page under another path."""
    found = client.get("/")
    assert found.status_code == 200 and found.headers["content-type"] == "text/html; charset=utf-8"
    assert {"docs", "page/main.js", "page/style.css"} <= set(links(found.text))
    for link in links(found.text):
        assert not link.startswith("/") and "//" not in link
        assert client.get(f"/{link}").status_code == 200, link


def test_whole_page_is_small(client):
    assert sum(len(client.get(path).content) for path in PAGE_PATHS) < MAX_BYTES


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_files_of_the_page_are_complete_and_load_nothing_from_other_hosts(client, path):
    found = client.get(path)
    assert found.status_code == 200 and found.headers["content-type"] == FILES[path.rpartition("/")[2]]
    assert found.headers["x-content-type-options"] == "nosniff"
    text = found.text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for module in re.findall(r'from "\./([^"]*)"', text):
        assert module in FILES


def test_page_runs_only_its_own_files_and_makes_no_html_from_text(client):
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ") and "unsafe" not in policy
    for part in ("require-trusted-types-for 'script'", "trusted-types 'none'", "frame-ancestors 'none'"):
        assert part in policy
    html = client.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", html)
    scripts = "".join(client.get(f"/page/{name}").text for name in FILES if name.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", scripts)


@pytest.mark.parametrize("name", ["", "index.html", "no.js", "..%2fapp.py", "../app.py", "%2e%2e/app.py"])
def test_other_files_are_not_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_documentation_has_every_path_status_and_field(client):
    shown, schema = client.get("/docs").text, client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        (method,) = methods
        _, _, section = shown.partition(f"<h3>{method.upper()} {path}</h3>")
        section = section.partition("<h3>")[0]
        assert section and methods[method]["description"] in section, path
        assert all(f"<td>{status}</td>" in section for status in methods[method]["responses"])
    for name, one in schema["components"]["schemas"].items():
        section = shown.partition(f'<h3 id="{name}">')[2].partition("<h3")[0]
        assert section and all(f"<td>{field}</td>" in section for field in one.get("properties", {})), name
    for link in links(shown):
        assert link.startswith("#") and f'id="{link[1:]}"' in shown


def test_documentation_loads_and_runs_nothing(client):
    found = client.get("/docs")
    assert found.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<(script|link|img|iframe|object)\b|//|@import|url\(", found.text)


def test_page_needs_no_key_because_it_asks_for_one_and_contains_nothing_about_the_server():
    class Named(RecordingGenerator):
        model_id = "secret/model"

    client = client_of(Named(), Access({"key-of-the-only-tenant": None}))
    for path in PAGE_PATHS:
        found = client.get(path)
        assert found.status_code == 200 and "secret/model" not in found.text
    for path in ("/docs", "/page/no.js", "/v1/models"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer key-of-the-only-tenant"}).status_code in (200, 404)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "http://127.0.0.1:8000", 403),
        ("localhost:8000", "https://localhost:8000", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
        ("rebound.example", "http://rebound.example", 403),  # DNS rebinding: the host is checked first
        ("", "http://", 403),
    ],
)
def test_only_the_servers_own_page_may_send_requests(client, host, origin, status):
    headers = {"host": host, "origin": origin}
    found = client.post(CHAT, json=request(), headers=headers)
    assert found.status_code == status and "access-control-allow-origin" not in found.headers
