"""LangChain's response cache made right for separate documents.

BaseLLM looks answers up by the prompt's text and the model's parameters alone. Two prompts can have one text
and different documents, so this stands before the user's cache for one call and completes the key.
"""

from __future__ import annotations

from typing import Any

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache

from .fused import FusedPrompt


class DocumentAwareCache(BaseCache):
    """Passes everything on to ``cache``; the model part of its keys names the documents too.

    The prompt part stays the text, and caches that compare it by meaning still match the model part exactly.
    """

    def __init__(self, cache: BaseCache) -> None:
        self._cache = cache

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        return self._cache.lookup(str(prompt), self._key(prompt, llm_string))

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        self._cache.update(str(prompt), self._key(prompt, llm_string), return_val)

    def clear(self, **kwargs: Any) -> None:
        self._cache.clear(**kwargs)

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        return await self._cache.alookup(str(prompt), self._key(prompt, llm_string))

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        await self._cache.aupdate(str(prompt), self._key(prompt, llm_string), return_val)

    async def aclear(self, **kwargs: Any) -> None:
        await self._cache.aclear(**kwargs)

    def _key(self, prompt: str, llm_string: str) -> str:
        digest = prompt.digest() if isinstance(prompt, FusedPrompt) else ""
        return f"{llm_string} documents={digest}"
