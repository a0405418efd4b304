"""Running an app: the socket it listens on, who may be let near it, and its end on a signal.

Everything here is uvicorn's but for what it leaves to its user. Knows no requests.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from ..errors import InvalidInputError, KVFusionError
from .access import Access

SHUTDOWN_SECONDS = 30  # that requests under way have to end on their own


def require_guarded(host: str, access: Access) -> None:
    """Raise InvalidInputError where other machines could ask without an API key."""
    if not access.keys and not _is_loopback(host):
        raise InvalidInputError(
            f"the host is {host!r}, which lets other machines in, but there is no API key; name one with "
            "--api-key-env or --api-keys-file, stay on 127.0.0.1, or allow it with --allow-unauthenticated."
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which refuses connections until it is served; port 0 for any that is free.

    Raises:
        InvalidInputError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"the server cannot listen on {host!r}, port {port}: {reason}.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address to ask at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C; those under way may end, within 30 seconds.

    Args:
        on_ready: called with the address once the first request can be answered.

    Raises:
        KeyboardInterrupt: it ended by Ctrl-C.
    """
    server = _Server(app, lambda: on_ready(url_of(listener)))
    former = signal.signal(signal.SIGTERM, server.handle_exit)  # uvicorn raises it once more in the end
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def running(app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The app at an address, served from another thread until the block ends: for notebooks and tests.

    Raises:
        InvalidInputError: as :func:`bind`.
        KVFusionError: the app failed as it started.
    """
    with bind(host, port) as listener:
        ready = threading.Event()
        server = _Server(app, ready.set)

        def run() -> None:
            try:
                with suppress(SystemExit):  # uvicorn's way to say that the app failed as it started
                    server.run([listener])
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="kvfusion-server", daemon=True)
        address = url_of(listener)
        thread.start()
        try:
            ready.wait()
            if not server.started:
                raise KVFusionError("the server did not start; its log says why.")
            yield address
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """Says when it is ready, and nothing else unless something is wrong."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
