"""Runs an app in uvicorn: opens its socket, checks that it is protected, and stops it on a signal."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InvalidInputError, KVFusionError
from .access import Access

SHUTDOWN_SECONDS = 5  # for requests in progress to finish
HEADER_BYTES = 16 << 10  # for the request line and all headers


def require_guarded(host: str, access: Access) -> None:
    """Raise InvalidInputError if other machines could send requests without an API key."""
    if not access.keys and not _is_loopback(host):
        raise InvalidInputError(
            f"host is {host!r}, which other machines can reach, but there is no API key; set one with --api-key-env "
            "or --api-keys-file, use 127.0.0.1, or pass --allow-unauthenticated."
        )


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not accept connections yet. Port 0 selects a free port.

    Raises:
        InvalidInputError: the address is in use, or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"the server cannot listen on host {host!r}, port {port}: {reason}.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI,
    listener: socket.socket,
    on_ready: Callable[[str], None],
    on_signal: Callable[[int], None] = lambda number: None,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve requests until SIGTERM or Ctrl-C, and then give those in progress ``SHUTDOWN_SECONDS`` to finish.

    The others end with an error. Returns when their work has ended, too: a pass of the model cannot be interrupted.

    Args:
        on_ready: called with the base URL when the server accepts requests.
        on_signal: called with the number of the signal that stops the server.
        trusted_proxies: IP addresses of proxies whose ``X-Forwarded-Proto`` is the scheme that browsers used.

    Raises:
        KeyboardInterrupt: the server was stopped with Ctrl-C.
    """
    server = _Server(app, lambda: on_ready(url_of(listener)), on_signal, trusted_proxies)
    former = signal.signal(signal.SIGTERM, server.handle_exit)  # uvicorn raises the signal again when it has stopped
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def running(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, trusted_proxies: Sequence[str] = ()
) -> Generator[str, None, None]:
    """Serve the app from another thread until the block ends, for notebooks and tests. Yields the base URL.

    Raises:
        InvalidInputError: see :func:`bind`.
        KVFusionError: the app could not start.
    """
    with bind(host, port) as listener:
        address = url_of(listener)
        with running_on(listener, app, trusted_proxies):
            yield address


@contextmanager
def running_on(
    listener: socket.socket, app: FastAPI, trusted_proxies: Sequence[str] = ()
) -> Generator[None, None, None]:
    """Serve the app on a bound socket from another thread until the block ends.

    Raises:
        KVFusionError: the app could not start.
    """
    ready = threading.Event()
    server = _Server(app, ready.set, trusted_proxies=trusted_proxies)

    def run() -> None:
        try:
            with suppress(SystemExit):  # raised by uvicorn if the app could not start
                server.run([listener])
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="kvfusion-server", daemon=True)
    thread.start()
    try:
        ready.wait()
        if not server.started:
            raise KVFusionError("the server did not start; its log contains the cause.")
        yield
    finally:
        server.should_exit = True
        thread.join()


class _Server(uvicorn.Server):
    """A uvicorn server that logs only warnings and reports when it is ready."""

    def __init__(
        self,
        app: FastAPI,
        on_ready: Callable[[], None],
        on_signal: Callable[[int], None] = lambda number: None,
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
                server_header=False,
                http=_Protocol,
                h11_max_incomplete_event_size=HEADER_BYTES,
                ws="none",
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._on_ready, self._on_signal = on_ready, on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._on_signal(sig)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


class _Protocol(H11Protocol):
    """HTTP/1.1 with a limit on the request line and headers. httptools, uvicorn's other parser, has none.

    h11 checks its limit after each read, so it gets no more than that at once.
    """

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), HEADER_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + HEADER_BYTES])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
