"""The pages for browsers at ``/`` and ``/docs``."""

from __future__ import annotations

import re

import pytest
from fakes import RecordingGenerator
from serving_client import client_of
from starlette.testclient import TestClient

from kvfusion_rag.serving import Access


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(RecordingGenerator())


def links(text: str) -> list[str]:
    return re.findall(r'(?:href|src)="([^"]*)"', text)


def test_start_page_names_the_model_and_its_links_answer(client):
    found = client.get("/")
    assert found.status_code == 200 and found.headers["content-type"].startswith("text/html")
    model = client.get("/v1/models").json()["data"][0]
    assert model["id"] in found.text and model["kvfusion"]["mode"] in found.text
    assert {"docs", "health", "v1/models"} <= set(links(found.text))
    for link in links(found.text):
        assert client.get(f"/{link}").status_code == 200, link


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


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_and_run_nothing(client, path):
    found = client.get(path)
    assert found.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"<(script|link|img|iframe|object)\b|//|@import|url\(", found.text)


def test_name_of_the_model_is_escaped():
    class Hostile(RecordingGenerator):
        model_id = "<script>alert(1)</script>"

    assert "<script" not in client_of(Hostile()).get("/").text


def test_pages_need_a_key_if_the_server_has_keys():
    client = client_of(RecordingGenerator(), Access({"key-of-the-only-tenant": None}))
    for path in ("/", "/docs"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": "Bearer key-of-the-only-tenant"}).status_code == 200
