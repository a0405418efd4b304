"""What a forked process lacks: the threads of its parent, and certainty that no lock is held by one of them."""

from __future__ import annotations

import os
import threading

import torch

from ..errors import ForkedProcessError


def fork_safe_lock() -> threading.Lock:
    """Return a lock that a fork waits for, so that the new process finds it free and what it guards complete."""
    lock = threading.Lock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


class ForkGuard:
    """Belongs to an object that computes with torch, and remembers the first process that did."""

    def __init__(self) -> None:
        self._process: int | None = None

    def require_threads(self) -> None:
        """Raise ForkedProcessError in a forked process that would wait forever for its parent's torch threads."""
        self._process = self._process or os.getpid()
        threads = torch.get_num_threads()
        if os.getpid() != self._process and threads > 1:
            raise ForkedProcessError(
                f"this process was forked and has none of its parent's {threads} torch threads, so it would hang; "
                "call torch.set_num_threads(1) in it first, or start it with the method 'spawn'."
            )
