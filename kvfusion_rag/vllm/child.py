"""Runs ``vllm serve`` in a process that ends with its parent, however the parent ends.

The parent holds the other end of the standard input.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from importlib import import_module

GRACE_SECONDS = 5.0  # for vLLM to end its own processes


def _end_with_parent() -> None:
    """Wait for the end of the standard input, and then end all processes of this group."""
    while sys.stdin.buffer.read(1024):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run ``vllm serve`` with the arguments of the command line."""
    threading.Thread(target=_end_with_parent, name="kvfusion-parent", daemon=True).start()
    # What ``vllm serve`` runs. The command itself fails in builds whose name is not vllm.
    import_module("vllm.entrypoints.launchers.api_server.entry").main()


if __name__ == "__main__":  # vLLM's own processes import this module too
    main()
