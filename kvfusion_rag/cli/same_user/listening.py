"""Lets a server listen on a socket that only its user can open."""

from __future__ import annotations

import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .client import is_answering
from .place import is_private_folder

logger = logging.getLogger(__name__)


@contextmanager
def private_listener(place: Path) -> Generator[socket.socket | None, None, None]:
    """Yield a socket bound to ``place``, which is removed at the end.

    Yield None, and log why, if another server is there already, or the folder cannot have a private socket.
    """
    if is_answering(place):
        logger.info("another server answers 'kvfusion ask' for these documents and settings")
        yield None
        return
    listener = socket.socket(socket.AF_UNIX)
    try:
        _bind(listener, place)
    except OSError as error:
        listener.close()
        logger.info("'kvfusion ask' cannot use this server: %s: %s", place, error)
        yield None
        return
    try:
        yield listener
    finally:
        listener.close()
        place.unlink(missing_ok=True)


def _bind(listener: socket.socket, place: Path) -> None:
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private_folder(place.parent):
        raise PermissionError("its folder must belong to this user, with mode 0700")
    place.unlink(missing_ok=True)  # left by a server that was killed
    listener.bind(str(place))
    place.chmod(0o600)
