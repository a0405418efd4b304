"""Pages for browsers: what this server is at ``/``, and its paths and fields at ``/docs``.

Both are plain HTML without scripts, and load nothing from another host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from .api_schema import REPLIES

# Nothing but the page's own style is loaded or run, and no other page may frame it.
HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_STYLE = (
    "body{font-family:sans-serif;line-height:1.5;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
)
_COMPONENTS = "#/components/schemas/"


def add_pages(app: FastAPI, model: Mapping[str, Any]) -> None:
    """Add ``GET /``, which names ``model`` (as ``/v1/models`` returns it), and ``GET /docs``."""

    @app.get("/", responses=REPLIES["page"])
    async def start_page() -> HTMLResponse:
        """Return a page that says what this server is."""
        return HTMLResponse(_start_page(model), headers=HEADERS)

    @app.get("/docs", responses=REPLIES["page"])
    async def documentation() -> HTMLResponse:
        """Return a page with all paths and fields."""
        return HTMLResponse(_documentation(app.openapi()), headers=HEADERS)


def _start_page(model: Mapping[str, Any]) -> str:
    links = {
        "docs": "paths and fields of requests",
        "v1/models": "the model, and how it reads documents",
        "health": "whether the server runs",
        "openapi.json": "the same as docs, for programs",
    }
    listed = "".join(f'<li><a href="{path}">/{path}</a>: {meaning}</li>' for path, meaning in links.items())
    return _page(
        "kvfusion-rag",
        "<p>This server answers questions from documents, in the format of OpenAI's chat completions.</p>"
        f"<p>Model: <b>{escape(model['id'])}</b>, mode {escape(model['kvfusion']['mode'])}. "
        "Clients use the base URL of this page with <code>/v1</code>.</p>"
        f"<ul>{listed}</ul>",
    )


def _documentation(schema: Mapping[str, Any]) -> str:
    operations = (
        _operation(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    objects = (
        f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{escape(one.get("description", ""))}</p>{_fields(one)}'
        for name, one in schema["components"]["schemas"].items()
    )
    title = f"{schema['info']['title']} {schema['info']['version']}"
    return _page(title, f"<h2>Paths</h2>{''.join(operations)}<h2>Objects</h2>{''.join(objects)}")


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    sent = "" if body is None else f"<p>Body: {_type(body)}, as application/json</p>"
    replies = ((status, escape(reply["description"])) for status, reply in sorted(operation["responses"].items()))
    return (
        f"<h3>{method.upper()} {escape(path)}</h3><p>{escape(operation.get('description', ''))}</p>{sent}"
        f"{_table(('status', 'meaning'), replies)}"
    )


def _fields(one: Mapping[str, Any]) -> str:
    required = one.get("required", ())
    rows = (
        (
            escape(name),
            _type(field),
            "yes" if name in required else "",
            escape(" ".join(str(field.get("description", "")).split())),
        )
        for name, field in one.get("properties", {}).items()
    )
    return _table(("field", "type", "required", "meaning"), rows)


def _type(field: Mapping[str, Any]) -> str:
    """Return a short form of a JSON schema as HTML: names of types and objects, and allowed values."""
    if "$ref" in field:
        name = escape(field["$ref"].removeprefix(_COMPONENTS))
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "const" in field or "enum" in field:
        return " or ".join(escape(repr(value)) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return escape(str(field.get("type", "anything")))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{lines}</table>"


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>"
    )
