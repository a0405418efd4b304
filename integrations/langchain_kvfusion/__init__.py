"""KV-Fusion for LangChain: an LLM, a chat model, prompts and a documents chain that keep documents separate.

Standard chains join all documents into one prompt. These classes pass them on one by one. The package uses only public
names of `kvfusion_rag` and needs the extra `langchain`.
"""

from __future__ import annotations

from kvfusion_rag import MissingDependencyError

try:
    import langchain_core  # noqa: F401 - here, so that the error names the missing extra
except ModuleNotFoundError as error:
    raise MissingDependencyError.of_extra("langchain_kvfusion", str(error.name), "langchain") from error

from .capture import DocumentCapture, enable_document_capture
from .chains import create_kvfusion_documents_chain
from .chat_model import ChatKVFusion
from .documents import DocumentLike
from .errors import AnswerTimeoutError
from .framing import KVFusionDocumentPrompt
from .fused import FusedPrompt
from .llm import KVFusionLLM
from .prompts import KVFusionPrompt, KVFusionPromptValue
from .questions import bare_question
from .retrievers import PrefetchingRetriever

__all__ = [
    "AnswerTimeoutError",
    "ChatKVFusion",
    "DocumentCapture",
    "DocumentLike",
    "FusedPrompt",
    "KVFusionDocumentPrompt",
    "KVFusionLLM",
    "KVFusionPrompt",
    "KVFusionPromptValue",
    "PrefetchingRetriever",
    "bare_question",
    "create_kvfusion_documents_chain",
    "enable_document_capture",
]
