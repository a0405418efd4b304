"""Calls of KVFusionLLM and ChatKVFusion by all methods, for tests that hold for both."""

from __future__ import annotations

from typing import Any

import pytest
from conversation_fakes import ChatRecorder
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import BaseMessage

from langchain_kvfusion import ChatKVFusion, KVFusionLLM

MODELS = pytest.mark.parametrize("make", [KVFusionLLM, ChatKVFusion])
FOUND = [LangChainDocument("x", id="i", metadata={"title": "T"}), LangChainDocument("y")]
ALL_OPTIONS = {
    "temperature": 0.5,
    "max_reasoning_tokens": 6,
    "top_p": 0.9,
    "top_k": 4,
    "seed": 1,
    "mode": "concat",
    "focus": 2,
    "attribution": "effects",
    "min_support": "auto",
    "stop": ["and so on", "\n"],
    "chat_template_kwargs": {"enable_thinking": True},
}
DEFAULTS = {
    "temperature": 0.0,
    "max_new_tokens": None,
    "max_reasoning_tokens": None,
    "top_p": 1.0,
    "top_k": None,
    "seed": None,
    "mode": None,
    "focus": "auto",
    "attribution": None,
    "min_support": None,
    "chat_template_kwargs": None,
    "stop": [],
}


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.text


async def run(call: Any, prompt: Any, **options: Any) -> None:
    """Call a sync or async method. Of a stream, read the first piece."""
    result = call(prompt, **options)
    if hasattr(result, "__await__"):
        await result
    elif hasattr(result, "__anext__"):
        await anext(result)
    elif hasattr(result, "__next__"):
        next(result)


async def call_all(model: Any, given: Any, **options: Any) -> list[str]:
    """Return the answers of all six methods that answer one input."""
    return [
        text(model.invoke(given, **options)),
        text(await model.ainvoke(given, **options)),
        "".join(text(piece) for piece in model.stream(given, **options)),
        "".join([text(piece) async for piece in model.astream(given, **options)]),
        *(text(answer) for answer in model.batch([given], **options)),
        *(text(answer) for answer in await model.abatch([given], **options)),
    ]


def chat(fake: Any = None, **fields: Any) -> ChatKVFusion:
    return ChatKVFusion(generator=fake or ChatRecorder(), **fields)


class Recorder(BaseCallbackHandler):
    """Records the calls of callbacks of a chat model."""

    def __init__(self) -> None:
        self.starts: list[Any] = []
        self.prompts: list[list[list[BaseMessage]]] = []
        self.tokens: list[str] = []
        self.errors: list[BaseException] = []

    def on_chat_model_start(self, serialized: Any, messages: list[list[BaseMessage]], **kwargs: Any) -> None:
        self.starts.append({"serialized": serialized, **kwargs})
        self.prompts.append(messages)

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)
