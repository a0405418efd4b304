"""Runs the ``kvfusion`` command with ``python -m kvfusion_rag.cli``."""

from __future__ import annotations

import sys

if not sys.flags.safe_path:
    # Python has put the current folder first, where libraries would find a user's attr.py or queue.py.
    del sys.path[0]

from . import main

raise SystemExit(main())
