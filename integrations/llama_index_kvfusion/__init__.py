"""KV-Fusion for LlamaIndex: an LLM, a response synthesizer and chat engines that keep documents separate.

`KVFusionSynthesizer` replaces LlamaIndex's synthesizers, which join all node texts into one prompt. The package uses
only public names of `kvfusion_rag` and needs the extra `llama-index`.
"""

from __future__ import annotations

from kvfusion_rag import MissingDependencyError

try:
    import llama_index.core  # noqa: F401 - here, so that the error names the missing extra
except ModuleNotFoundError as error:
    raise MissingDependencyError.of_extra("llama_index_kvfusion", str(error.name), "llama-index") from error

from .chat_engines import KVFusionCondensePlusContextChatEngine, KVFusionContextChatEngine
from .citation_engine import KVFusionCitationQueryEngine, source_numbers
from .documents import DocumentLike
from .llm import KVFusionLlamaIndexLLM
from .prefill import KVFusionPrefetch, KVFusionPrefill
from .synthesizer import KVFusionSynthesizer

__all__ = [
    "DocumentLike",
    "KVFusionCitationQueryEngine",
    "KVFusionCondensePlusContextChatEngine",
    "KVFusionContextChatEngine",
    "KVFusionLlamaIndexLLM",
    "KVFusionPrefetch",
    "KVFusionPrefill",
    "KVFusionSynthesizer",
    "source_numbers",
]
