"""``python -m kvfusion_rag.cli``: the same command as ``kvfusion``."""

from __future__ import annotations

from . import main

raise SystemExit(main())
