"""A wrapper that makes LangChain's response cache correct for separate documents.

BaseLLM uses the prompt's text and the model's parameters as the cache key, but two prompts with equal text can have
different documents.
"""

from __future__ import annotations

from typing import Any

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache

from .fused import FusedPrompt


class DocumentAwareCache(BaseCache):
    """Adds a digest of the documents to the model part of the keys of ``cache``.

    The prompt part is unchanged, so caches that compare prompts by meaning still work.
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
