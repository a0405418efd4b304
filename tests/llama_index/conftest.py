"""Fixtures of the LlamaIndex tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Settings
from llama_index.core.instrumentation import get_dispatcher
from llama_index_helpers import EventLog


@pytest.fixture
def events() -> Iterator[EventLog]:
    """Record all instrumentation events."""
    log = EventLog()
    root = get_dispatcher()
    root.add_event_handler(log)
    yield log
    root.event_handlers.remove(log)


@pytest.fixture
def no_default_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that a test does not use LlamaIndex's default LLM, which is OpenAI's."""
    monkeypatch.setattr(Settings, "_llm", None)
    yield
    assert Settings._llm is None
