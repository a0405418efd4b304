"""Document capture: separate documents from chains that nobody changes, while ``enable_document_capture()`` is open.

LangChain's callbacks tell what retrievers found in a run, and a model called in the same run looks for those texts in
its prompt. Only what was retrieved can become a document, however a prompt is worded. Knows no generator.
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

MOST_DOCUMENTS = 1024  # that one capture remembers, the oldest leave first
_TOP_LEVEL = UUID(int=0)  # where retrievers and models are called by themselves, outside any chain

_active: ContextVar[DocumentCapture | None] = ContextVar("kvfusion_document_capture", default=None)


class DocumentCapture(BaseCallbackHandler):
    """An open capture: a context manager, or closed with :meth:`close` by the thread or task that opened it."""

    run_inline = True  # a document is remembered before its retriever returns

    def __init__(self, most_documents: int = MOST_DOCUMENTS) -> None:
        if most_documents < 1:
            raise InvalidInputError(f"most_documents is {most_documents}, but a capture must remember at least 1.")
        self._most = most_documents
        self._lock = threading.Lock()
        self._roots: dict[UUID, UUID] = {}  # of every run that is under way, the outermost one
        self._found: OrderedDict[tuple[UUID, str], LangChainDocument] = OrderedDict()
        self._token: Token[DocumentCapture | None] | None = _active.set(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Remember nothing any more; chains join their documents again, also those of tasks that still run.

        Raises:
            InvalidInputError: another thread or task opened it.
        """
        if self._token is None:
            return
        try:
            _active.reset(self._token)
        except ValueError as error:
            raise InvalidInputError(
                "a document capture is closed by a thread or task that did not open it; close it where "
                "enable_document_capture was called, best by a with statement."
            ) from error
        with self._lock:
            self._token = None
            self._found.clear()

    def found_in(self, parent: UUID | None) -> list[LangChainDocument]:
        """What retrievers found in the run that the run ``parent`` belongs to, or outside of all runs."""
        with self._lock:
            roots = (self._root(parent), _TOP_LEVEL)
            return [document for (run, _), document in self._found.items() if run in roots]

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        self._begin(run_id, parent_run_id)

    def on_tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        self._begin(run_id, parent_run_id)

    def on_retriever_start(
        self, serialized: Any, query: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        # A retriever around others has runs below it; one called by itself is at the top level, as its caller is.
        with self._lock:
            self._roots[run_id] = self._root(parent_run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    def on_retriever_end(
        self, documents: Sequence[LangChainDocument], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        with self._lock:
            root = self._root(parent_run_id)
            for document in documents if self._token is not None else ():
                key = (root, document.page_content)
                self._found[key] = document
                self._found.move_to_end(key)
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        self._end(run_id)

    def _begin(self, run_id: UUID, parent: UUID | None) -> None:
        with self._lock:
            self._roots[run_id] = run_id if parent is None else self._root(parent)

    def _end(self, run_id: UUID) -> None:
        with self._lock:
            if self._roots.pop(run_id, None) == run_id:  # the outermost run is over, and so is what it found
                self._found = OrderedDict((k, d) for k, d in self._found.items() if k[0] != run_id)

    def _root(self, run_id: UUID | None) -> UUID:
        return _TOP_LEVEL if run_id is None else self._roots.get(run_id, run_id)


def enable_document_capture(most_documents: int = MOST_DOCUMENTS) -> DocumentCapture:
    """Keep documents apart in unchanged chains, for this thread or task and those it starts, until it is closed.

    ``with enable_document_capture(): chain.invoke(question)``, where the chain's model is a KVFusionLLM or a
    ChatKVFusion. A prompt's documents are found by their text, so a chain that shortens or rewrites them, or a plain
    function in place of a retriever, keeps its joined prompt. The documents keep their place in the prompt; if each
    has a number or label of its own, all are read in the place of the first. What is retrieved outside of chains is
    shared by all that is called in the capture, so open one for each request that you serve.

    Args:
        most_documents: how many the capture remembers; the oldest leave first.

    Raises:
        InvalidInputError: ``most_documents`` is below 1.
    """
    _register()
    return DocumentCapture(most_documents)


def retrieved_for(callbacks: Any) -> list[LangChainDocument]:
    """What was retrieved in the run that a call with these ``callbacks`` belongs to, if a capture is open."""
    capture = _active.get()
    if capture is None:
        return []
    return capture.found_in(callbacks.parent_run_id if isinstance(callbacks, BaseCallbackManager) else None)


def retrieved_for_each(callbacks: Any, prompts: int) -> list[list[LangChainDocument]]:
    """As :func:`retrieved_for`, for a batch: its callbacks are those of every prompt, or a list of them for each."""
    is_each = isinstance(callbacks, list) and len(callbacks) == prompts
    return [retrieved_for(each) for each in (callbacks if is_each else [callbacks] * prompts)]


@functools.cache
def _register() -> None:
    # LangChain keeps its hooks for good; this one does nothing while no capture is open.
    register_configure_hook(_active, inheritable=True)
