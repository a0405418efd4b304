"""Watches files and folders by looking at them again and again, which works on every system and network drive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import KVFusionError, RetrievalError
from .loaders import find_files

POLL_SECONDS = 2.0

_State = dict[Path, tuple[int, int, int]]  # inode, size and time of the last change of each file


def watch_folder(
    paths: Sequence[str | Path],
    update: Callable[[], object],
    stop: threading.Event,
    *,
    on_error: Callable[[KVFusionError], object],
    exclude: Path | None = None,
    seconds: float = POLL_SECONDS,
) -> None:
    """Call ``update`` at once, and again after each change of the files under ``paths``, until ``stop`` is set.

    A change counts when the files stay the same for ``seconds``, so a file that is still being written is not read.

    Args:
        update: usually ``lambda: index.update(paths)``.
        on_error: receives the errors of later updates, for example if ``paths`` do not exist for a while. The next
            change is tried again.
        exclude: folder that is not watched, that of the index.

    Raises:
        KVFusionError: the first update failed.
    """
    known = _state(paths, exclude)
    update()
    last = known
    while not stop.wait(seconds):
        present = _state(paths, exclude)
        is_settled = present == last
        last = present
        if present == known or not is_settled:
            continue
        known = present
        try:
            update()
        except KVFusionError as error:
            on_error(error)


def _state(paths: Sequence[str | Path], exclude: Path | None) -> _State:
    """Return the state of all files under ``paths``; nothing while one of ``paths`` does not exist."""
    state: _State = {}
    try:
        files, _ = find_files(paths, exclude=exclude)
    except RetrievalError:
        return state
    for file in files:
        try:
            found = file.stat()
        except OSError:  # it was removed meanwhile
            continue
        state[file] = (found.st_ino, found.st_size, found.st_mtime_ns)
    return state
