"""Pages for browsers: questions and answers at ``/``, and the server's paths and fields at ``/docs``.

The first one is static: its files are in the folder ``page``, and its script asks the API as any other client. The
second one is plain HTML without scripts. Both load nothing from another host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from .api_schema import REPLIES

FILES = {
    "": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Files of the page at ``/`` and their types. The page itself has no name."""

PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES if name)})
"""Paths of the page. They contain nothing about the server, so browsers, which cannot send a key, may read them."""

_COMMON = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}
# Only the page's own files are loaded or run, no text becomes HTML or script, and no other page may frame it.
_HEADERS = _COMMON | {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
}
# Nothing but the page's own style is loaded or run.
_DOCS_HEADERS = _COMMON | {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
}
_STYLE = (
    "body{font-family:sans-serif;line-height:1.5;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
)
_COMPONENTS = "#/components/schemas/"


def add_pages(app: FastAPI) -> None:
    """Add ``GET /`` with its files under ``/page``, and ``GET /docs``."""
    folder = resources.files("kvfusion_rag.serving") / "page"
    contents = {name: (folder / (name or "index.html")).read_bytes() for name in FILES}

    @app.get("/", responses=REPLIES["page"])
    async def start_page() -> HTMLResponse:
        """Return a page on which questions are asked."""
        return HTMLResponse(contents[""], headers=_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        """Return a file of the page."""
        if not name or name not in FILES:
            raise HTTPException(404)
        return Response(contents[name], media_type=FILES[name], headers=_HEADERS)

    @app.get("/docs", responses=REPLIES["page"])
    async def documentation() -> HTMLResponse:
        """Return a page with all paths and fields."""
        return HTMLResponse(_documentation(app.openapi()), headers=_DOCS_HEADERS)


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
