"""Who may ask: API keys and their namespaces, and what keeps web pages from driving a server through a browser.

ASGI middleware that decides from the headers alone, before a body is read.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InvalidInputError
from ..store import require_namespace
from .errors import ApiError
from .incoming import Incoming

SHORTEST_KEY = 16  # characters
OPEN_PATHS = ("/health",)  # asked without a key


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: API key -> namespace of its documents (``None``: the generator's own). Without any key everyone may ask.
        hosts: names in the ``Host`` header besides addresses and ``localhost``. Without any, a server with keys takes
            every name: a page that reaches it by DNS rebinding has no key.
        origins: of web pages that may ask (CORS), such as ``https://app.example``; by default none.

    Raises:
        InvalidInputError: a key is short or has blanks, a namespace is no name, or hosts or origins are one string.
    """

    keys: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("hosts", "origins"):
            if isinstance(getattr(self, name), str):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a list of names.")
        for key, namespace in self.keys.items():
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidInputError(
                    f"an API key has {len(key)} characters, but it must have at least {SHORTEST_KEY}, all of them "
                    "letters, digits or signs of ASCII without blanks; make one with: openssl rand -hex 32"
                )
            if namespace is not None:
                require_namespace(namespace)

    @property
    def namespaces(self) -> set[str]:
        """Those of other tenants than the generator's own."""
        return {namespace for namespace in self.keys.values() if namespace is not None}


def read_keys(path: str | Path) -> dict[str, str | None]:
    """Keys and namespaces of a JSON file: ``{"key": "namespace", ...}``, null for the server's own namespace.

    Raises:
        InvalidInputError: it cannot be read, or holds something else; the message repeats nothing of it.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise InvalidInputError(f"the file of API keys {str(path)!r} cannot be read: {reason}.") from None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str | None) for v in found.values()):
        raise InvalidInputError(
            f"the file of API keys {str(path)!r} must hold a JSON object with at least one key: "
            '{"key": "namespace", ...}.'
        )
    return found


class Guard:
    """Refuses what :class:`Access` does not allow, and notes the namespace of what it does."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._hosts = {"localhost", *(host.lower() for host in access.hosts)}
        self._any_host = bool(access.keys) and not access.hosts
        self._namespaces = {_digest(key): namespace for key, namespace in access.keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                namespace = self._admit(scope["path"], Headers(scope=scope))
            except ApiError as error:
                return await Incoming(scope, receive).refuse(error, scope, send)
            scope.setdefault("state", {})["namespace"] = namespace
        await self._app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> str | None:
        """The namespace that a request is answered in."""
        if not self._any_host and not self._is_known(_host_of(headers.get("host", ""))):
            raise ApiError(
                403,
                "the Host header names another server than this; if it is one of its names, the server has to be "
                "started with --allowed-host.",
                "host_not_allowed",
            )
        if (origin := headers.get("origin")) is not None and origin not in self._access.origins:
            raise ApiError(403, "requests of web pages are not answered.", "origin_not_allowed")
        if not self._namespaces or path in OPEN_PATHS:
            return None
        return self._namespace_of(headers.get("authorization", ""))

    def _is_known(self, host: str) -> bool:
        """An address is no name that somebody else's DNS could have led here."""
        return host in self._hosts or _is_address(host)

    def _namespace_of(self, authorization: str) -> str | None:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = [
            namespace for digest, namespace in self._namespaces.items() if hmac.compare_digest(digest, given)
        ]  # all are compared, so that the time taken tells of none
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _host_of(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
