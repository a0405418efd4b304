"""Access control: API keys with their namespaces, and protection against requests from web pages.

The ASGI middleware looks only at headers, so it rejects a request before reading its body.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InvalidInputError
from ..home import expanded
from ..store import require_namespace
from .errors import ApiError
from .incoming import Incoming
from .pages import PAGE_PATHS

MIN_KEY_CHARACTERS = 16
MAX_HEADERS = 100
PATHS_WITHOUT_KEY = {"/health"} | PAGE_PATHS
DEFAULT_PORTS = {"http": 80, "https": 443}

_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)


@dataclass(frozen=True)
class Access:
    """Which clients may send requests.

    Attributes:
        keys: maps each API key to the namespace of its documents (``None`` is the generator's own namespace). If there
            are no keys, every client is allowed.
        hosts: names allowed in the ``Host`` header besides IP addresses and ``localhost``. If there are none, a server
            with keys accepts every name, because a page that reaches it by DNS rebinding does not have a key.
        origins: origins of web pages that may send requests (CORS), such as ``https://app.example``, besides the
            server's own page. Default: none.

    Raises:
        InvalidInputError: a key is too short or contains spaces, a namespace is invalid, hosts or origins is a string
            instead of a list, or contains a value that no browser ever sends.
    """

    keys: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("hosts", "origins"):
            if isinstance(getattr(self, name), str):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a list of names.")
        for host in self.hosts:
            _require_host(host)
        for origin in self.origins:
            _require_origin(origin)
        for key, namespace in self.keys.items():
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidInputError(
                    f"an API key has {len(key)} characters, but it must have at least {MIN_KEY_CHARACTERS} printable "
                    "ASCII characters without spaces; create one with: openssl rand -hex 32"
                )
            if namespace is not None:
                require_namespace(namespace)

    @property
    def namespaces(self) -> set[str]:
        """All namespaces of keys except the generator's own."""
        return {namespace for namespace in self.keys.values() if namespace is not None}


def read_keys(path: str | Path) -> dict[str, str | None]:
    """Read API keys from a JSON file: ``{"key": "namespace", ...}``, with null for the server's own namespace.

    Raises:
        InvalidInputError: the file cannot be read, has another form, or contains a key twice. The message does not
            quote the file, because it may contain keys.
    """
    try:
        text = expanded(path).read_text(encoding="utf-8")
        keys = json.loads(text, object_pairs_hook=lambda pairs: _Twice() if _repeats(pairs) else dict(pairs))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InvalidInputError(f"the API key file {str(path)!r} cannot be read: {reason}.") from None
    if isinstance(keys, _Twice):
        raise InvalidInputError(
            f"the API key file {str(path)!r} contains a key twice, so its namespace is ambiguous; remove one of them."
        )
    if not isinstance(keys, dict) or not keys or not all(isinstance(v, str | None) for v in keys.values()):
        raise InvalidInputError(
            f"the API key file {str(path)!r} must contain a JSON object with at least one key: "
            '{"key": "namespace", ...}.'
        )
    return keys


class _Twice:
    """Stands for a JSON object with a repeated key."""


def _repeats(pairs: Sequence[tuple[str, object]]) -> bool:
    return len({name for name, _ in pairs}) < len(pairs)


def _require_host(host: str) -> None:
    """Raise InvalidInputError if ``host`` is not what a Host header names, apart from its port."""
    if not _HOST.fullmatch(host):
        advice = (
            f"; write {found!r}" if (found := _host_of(host.rpartition("//")[2])) and _HOST.fullmatch(found) else ""
        )
        raise InvalidInputError(
            f"the allowed host is {host!r}, but it must be a host name without scheme, port, path and wildcards"
            f"{advice}."
        )


def _require_origin(origin: str) -> None:
    """Raise InvalidInputError if no browser sends ``origin`` in exactly this form."""
    if origin == "null":
        return
    try:
        parts = urlsplit(origin)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    name = f"[{host}]" if ":" in host else host
    shown = "" if port in (None, DEFAULT_PORTS.get(parts.scheme)) else f":{port}"
    usual = f"{parts.scheme}://{name}{shown}"
    is_host = bool(_HOST.fullmatch(host)) or _is_address(host)
    if origin != usual or not parts.scheme or not is_host:
        advice = f"; write {usual!r}" if parts.scheme and is_host and not parts.username else ""
        raise InvalidInputError(
            f"the allowed origin is {origin!r}, but it must be scheme://host or scheme://host:port in lower case, as "
            f"browsers send it, without path and wildcards{advice}."
        )


class Guard:
    """ASGI middleware that rejects requests without :class:`Access` and sets ``request.state.namespace``."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._hosts = {"localhost", *(host.lower() for host in access.hosts)}
        self._any_host = bool(access.keys) and not access.hosts
        self._namespaces = {_digest(key): namespace for key, namespace in access.keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                namespace = self._namespace(scope["path"], scope["scheme"], Headers(scope=scope))
            except ApiError as error:
                return await Incoming(scope, receive).reject(error, scope, send)
            scope.setdefault("state", {})["namespace"] = namespace
        await self._app(scope, receive, send)

    def _namespace(self, path: str, scheme: str, headers: Headers) -> str | None:
        """Return the namespace for a request, or raise ApiError if the request is not allowed."""
        if len(headers.raw) > MAX_HEADERS:
            raise ApiError(431, f"the request has more than {MAX_HEADERS} headers.", "too_many_headers")
        if not self._any_host and not self._is_own_host(_host_of(headers.get("host", ""))):
            raise ApiError(
                403,
                "the Host header does not name this server; if the name is correct, start the server with "
                "--allowed-host.",
                "host_not_allowed",
            )
        own = f"{scheme}://{headers.get('host', '')}"  # the page of this server, whose name was checked above
        if headers.get("origin") not in (None, own, *self._access.origins):
            raise ApiError(
                403,
                "requests from this web page's origin are not allowed; start the server with --allowed-origin.",
                "origin_not_allowed",
            )
        if not self._namespaces or path in PATHS_WITHOUT_KEY:
            return None
        return self._namespace_of_key(headers.get("authorization", ""))

    def _is_own_host(self, host: str) -> bool:
        """Return whether the name is this server's. IP addresses are safe, because DNS rebinding needs a name."""
        return host in self._hosts or _is_address(host)

    def _namespace_of_key(self, authorization: str) -> str | None:
        scheme, _, key = authorization.partition(" ")
        sent = _digest(key.strip())
        # Compare every key, so that the time taken does not reveal which one matched.
        matches = [namespace for digest, namespace in self._namespaces.items() if hmac.compare_digest(digest, sent)]
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return matches[0]


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
