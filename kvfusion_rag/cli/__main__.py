"""Runs the ``kvfusion`` command with ``python -m kvfusion_rag.cli``."""

from __future__ import annotations

from . import main

raise SystemExit(main())
