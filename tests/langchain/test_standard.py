"""LangChain's standard tests for chat models with ChatKVFusion and a small random model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("langchain_tests")

import tiny
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from kvfusion_rag import KVFusionGenerator
from langchain_kvfusion import ChatKVFusion


@cache
def generator() -> KVFusionGenerator:
    return tiny.generator().with_settings(max_new_tokens=12)


class OfChatKVFusion:
    """Configuration of the suites: class, generator and missing features."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVFusion

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"generator": generator()}

    @property
    def has_tool_calling(self) -> bool:
        return False  # a random model ends neither texts nor arguments; see test_standard_tools.py

    @property
    def has_structured_output(self) -> bool:
        return False  # like tools

    @property
    def supports_model_override(self) -> bool:
        return False  # another model name is rejected


class TestUnit(OfChatKVFusion, ChatModelUnitTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Without "api_key", which a local model does not have."""
        return {name: value for name, value in super().standard_chat_model_params.items() if name != "api_key"}


class TestIntegration(OfChatKVFusion, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """A random model never ends its answer, so the limit is lower than the suite's 100 tokens."""
        return {**super().standard_chat_model_params, "max_tokens": 12}
