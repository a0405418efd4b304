"""Document capture: separate documents from unchanged chains while ``enable_document_capture()`` is active.

LangChain's callbacks report the documents that retrievers found in a run. A model called in the same run finds their
texts in its prompt. Only retrieved texts can become documents, whatever the prompt contains.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar, Token
from typing import Any, Self
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.documents import Document as LangChainDocument
from langchain_core.tracers.context import register_configure_hook

from kvfusion_rag import InvalidInputError

MAX_DOCUMENTS = 1024
_TOP_LEVEL = UUID(int=0)  # stands for the run of retrievers and models that are called outside any chain

_active: ContextVar[DocumentCapture | None] = ContextVar("kvfusion_document_capture", default=None)


class DocumentCapture(BaseCallbackHandler):
    """An active capture and context manager. The thread or task that opened it must close it."""

    run_inline = True  # a document is recorded before its retriever returns

    def __init__(self, most_documents: int = MAX_DOCUMENTS) -> None:
        if most_documents < 1:
            raise InvalidInputError(f"most_documents is {most_documents}, but it must be at least 1.")
        self._max_documents = most_documents
        self._lock = threading.Lock()
        self._roots: dict[UUID, UUID] = {}  # outermost run of each active run
        self._found: OrderedDict[tuple[UUID, str], LangChainDocument] = OrderedDict()
        self._token: Token[DocumentCapture | None] | None = _active.set(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop capturing. Chains join their documents again, also in tasks that are still running.

        Raises:
            InvalidInputError: another thread or task opened the capture.
        """
        if self._token is None:
            return
        try:
            _active.reset(self._token)
        except ValueError as error:
            raise InvalidInputError(
                "the document capture was closed by a thread or task that did not open it; close it where "
                "enable_document_capture was called, preferably with a with statement."
            ) from error
        with self._lock:
            self._token = None
            self._found.clear()

    def found_in(self, parent: UUID | None) -> list[LangChainDocument]:
        """Return the documents found in the outermost run of ``parent``, and those found outside any run."""
        with self._lock:
            roots = (self._root(parent), _TOP_LEVEL)
            return [document for (run, _), document in self._found.items() if run in roots]

    def on_chain_start(self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any) -> None:
        with self._lock:
            self._roots[run_id] = run_id if parent_run_id is None else self._root(parent_run_id)

    on_tool_start = on_chain_start

    def on_retriever_start(self, *args: Any, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any) -> None:
        with self._lock:  # unlike a chain, a retriever without a parent belongs to the top level
            self._roots[run_id] = self._root(parent_run_id)

    def on_chain_end(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        with self._lock:
            if self._roots.pop(run_id, None) == run_id:  # the outermost run has ended, so its documents are dropped
                self._found = OrderedDict((k, d) for k, d in self._found.items() if k[0] != run_id)

    on_chain_error = on_tool_end = on_tool_error = on_retriever_error = on_chain_end

    def on_retriever_end(
        self, documents: Sequence[LangChainDocument], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        with self._lock:
            root = self._root(parent_run_id)
            for document in documents if self._token is not None else ():
                key = (root, document.page_content)
                self._found[key] = document
                self._found.move_to_end(key)
            while len(self._found) > self._max_documents:
                self._found.popitem(last=False)
        self.on_chain_end(run_id=run_id)

    def _root(self, run_id: UUID | None) -> UUID:
        return _TOP_LEVEL if run_id is None else self._roots.get(run_id, run_id)


def enable_document_capture(most_documents: int = MAX_DOCUMENTS) -> DocumentCapture:
    """Keep documents separate in unchanged chains, for this thread or task and those that it starts.

    ``with enable_document_capture(): chain.invoke(question)``. The chain's model must be a KVFusionLLM or a
    ChatKVFusion. Documents are found in the prompt by their text. A chain that shortens or rewrites documents, or uses
    a plain function instead of a retriever, keeps its joined prompt. Documents keep their place in the prompt. If each
    has its own number or label, all are read in the place of the first. Documents retrieved outside any chain are
    visible to all calls in the capture, so open one capture per request.

    Args:
        most_documents: maximum number of recorded documents. The oldest are dropped first.

    Raises:
        InvalidInputError: ``most_documents`` is below 1.
    """
    _register()
    return DocumentCapture(most_documents)


def retrieved_for(callbacks: Any) -> list[LangChainDocument]:
    """Return the documents retrieved in the run of a call with ``callbacks``, or none if no capture is active."""
    capture = _active.get()
    if capture is None:
        return []
    return capture.found_in(callbacks.parent_run_id if isinstance(callbacks, BaseCallbackManager) else None)


def retrieved_for_each(callbacks: Any, prompts: int) -> list[list[LangChainDocument]]:
    """Like :func:`retrieved_for` for a batch, whose callbacks are shared or a list with one item per prompt."""
    is_each = isinstance(callbacks, list) and len(callbacks) == prompts
    return [retrieved_for(each) for each in (callbacks if is_each else [callbacks] * prompts)]


@functools.cache
def _register() -> None:
    # LangChain never removes hooks. This one has no effect while no capture is active.
    register_configure_hook(_active, inheritable=True)
