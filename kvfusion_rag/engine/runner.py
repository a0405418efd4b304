"""Answers requests in batches that fit into memory: gets the documents, fuses them and decodes.

One runner serves all threads, settings and namespaces of a model. Requests carry everything that differs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch

from ..errors import MemoryLimitError
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.interface import FusionModel, Question
from ..fusion.memory import is_out_of_memory, memory_errors
from ..fusion.sampling import DecodingOptions
from ..schema import Answer
from ..text.documents import EncodedDocuments
from ..text.encoder import PlainEncoder
from ..text.layouts import Layout
from .document_kvs import DocumentKVs, Scope
from .focus import choose
from .modes import AnswerMode, token_limits
from .requests import Batch, Request, batches
from .running_batch import FusedRun, Run, start_run

logger = logging.getLogger(__name__)

T = TypeVar("T")
M_co = TypeVar("M_co", bound=FusionModel, covariant=True)


class Runner(Generic[M_co]):
    """The answering half of an engine, shared by generators over the same weights and store.

    A subclass may answer elsewhere, by other ``begin`` and ``answer_steps``. Explanations are always measured here, by
    ``start`` and ``decode``.

    Attributes:
        gathers: whether callers that wait at the same time should be answered in one batch.

    Args:
        document_kvs: the KVs of the model's documents.
        max_fused_tokens: limit of document tokens of one question, and of padded slots of one batch.
    """

    gathers = True

    def __init__(self, model: M_co, document_kvs: DocumentKVs, *, max_fused_tokens: int) -> None:
        self.model = model
        self.plain = PlainEncoder(model.tokenizer)
        self.document_kvs = document_kvs
        self.max_fused_tokens = max_fused_tokens

    # Requests

    def request_for(
        self,
        encoded: EncodedDocuments,
        layout: Layout,
        mode: AnswerMode,
        namespace: str,
        options: DecodingOptions,
        began: float,
    ) -> Request:
        """Return a request over encoded documents.

        Raises:
            ContextLimitError: documents, question and answer do not fit into the context window.
        """
        fused, start = mode.place(encoded, prefix_tokens=len(layout.prefix))
        ids, spans = layout.question, ()
        if fused is None:
            joined = layout.joined(encoded)
            ids, spans = joined.ids, joined.spans
        limits = token_limits(self.model, mode, options, layout.reasoning, before=start, question_tokens=len(ids))
        return Request(
            encoded,
            Question(ids, start),
            mode,
            fused,
            layout,
            namespace,
            self.document_kvs.version,
            limits=limits,
            spans=spans,
            began=began,
        )

    def current(self, request: Request) -> Request:
        """Return ``request`` with keys of the model as it is now, in the thread that answers.

        While a request waited, weights may have changed, and torch's number of threads differs between threads.
        """
        self.document_kvs.refresh()
        if request.version == self.document_kvs.version:
            return request
        prefix = request.layout.prefix
        scope = Scope(prefix, request.namespace)
        encoded = request.encoded.with_keys(lambda ids: self.document_kvs.key(ids, scope))
        fused, _ = request.mode.place(encoded, prefix_tokens=len(prefix))
        focus = request.focus and request.focus.with_keys(self.document_kvs, scope)
        return replace(request, encoded=encoded, fused=fused, focus=focus, version=self.document_kvs.version)

    def prepare(self, request: Request, options: DecodingOptions) -> Request:
        """Return ``request`` as it is answered: with current keys, and only the documents that focus keeps.

        Raises:
            MemoryLimitError: there is not enough memory to read the question over all documents.
        """
        request = self.current(request)
        focus = request.focus
        if focus is None or request.choice is not None:
            return request
        errors = partial(
            memory_errors, self.model.device, questions=len(focus.scored.keys), tokens=focus.scored.longest
        )
        choice = self._retry(lambda: choose(self.document_kvs, focus, request.cancelled.is_set), errors)
        chosen = focus.encoded.only(choice.kept)
        prepared = self.request_for(chosen, request.layout, request.mode, request.namespace, options, request.began)
        return replace(
            prepared, focus=focus, choice=choice, constraint=request.constraint, calls=request.calls,
            cancelled=request.cancelled,
        )  # fmt: skip

    def batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """Yield requests in order, cut into batches whose padded slots stay within the limit on fused tokens."""
        return batches(requests, max_slots=self.max_fused_tokens, share=self.model.capabilities.shared_rows)

    # Answering

    def answer_all(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Answer requests of one mode, in as few batches as the limit on fused tokens allows."""
        requests = [self.prepare(request, options) for request in requests]
        return [answer for batch in self.batches(requests) for answer in self._answer_batch(batch, options)]

    def begin(self, batch: Batch) -> Run:
        """Get the documents of a batch that :meth:`answer_steps` answers.

        Raises:
            MemoryLimitError: memory ran out.
        """
        return self.start(batch)

    def answer_steps(self, run: Run, options: DecodingOptions) -> Generator[None, None, None]:
        """Let ``run.answers`` grow, and pause after each step.

        Raises:
            MemoryLimitError: memory ran out.
        """
        assert isinstance(run, FusedRun)
        return self.decode(run, options)

    def start(self, batch: Batch) -> FusedRun:
        """Prefill what is missing and fuse each row's documents, in canonical order if positions are uniform.

        If memory runs out, pooled memory is freed and the pass is repeated once.

        Raises:
            MemoryLimitError: memory ran out again.
        """
        run = partial(start_run, self.model, self.document_kvs, batch)
        return self._retry(run, lambda: self.memory_errors(batch))

    def decode(
        self, run: FusedRun, options: DecodingOptions, on_logits: Callable[[torch.Tensor], None] | None = None
    ) -> Generator[None, None, None]:
        """Decode ``running_batch`` step by step and release its memory at the end.

        Raises:
            MemoryLimitError: memory ran out.
        """
        requests = run.batch.requests
        run.answers = [self.empty_answer(request, options) for request in requests]
        steps = self.model.decode(
            run.plan,
            run.context,
            [request.question for request in requests],
            run.answers,
            options,
            row_of=run.batch.row_of,
            visible=run.visible(),
            on_logits=on_logits,
            is_cancelled=lambda number: requests[number].cancelled.is_set(),
        )
        try:
            with self.memory_errors(run.batch):
                for _ in steps:
                    run.first_token_at = run.first_token_at or time.perf_counter()
                    yield
        finally:
            steps.close()
            run.release()

    def empty_answer(self, request: Request, options: DecodingOptions) -> GrowingAnswer:
        """Return the answer of a request before its first token."""
        reasoning = None if options.max_reasoning_tokens is None else request.layout.reasoning
        constraint = request.constraint and request.constraint.copy()
        return GrowingAnswer(
            self.plain.decode if request.calls is None else self.plain.decode_all,
            () if constraint is not None else (*options.stop, *request.mode.stop),
            self.plain.unsettling_ids,
            limit=request.limits.answer,
            reader=None if reasoning is None else reasoning.reader(),
            reasoning_limit=request.limits.reasoning,
            constraint=constraint,
            exact=constraint is not None and request.calls is None,
        )

    def _answer_batch(self, batch: Batch, options: DecodingOptions) -> list[Answer]:
        """Answer one batch, in two halves if it needs more memory than there is."""
        requests = batch.requests
        try:
            return self._answers(batch, options)
        except MemoryLimitError:
            if len(requests) == 1:
                raise
        self.model.release_memory()  # after the except block, which kept the failed run alive
        half = len(requests) // 2
        logger.warning("a batch of %d questions needs too much memory and is answered in halves", len(requests))
        return [
            answer
            for part in (requests[:half], requests[half:])
            for smaller in self.batches(part)
            for answer in self._answer_batch(smaller, options)
        ]

    def _answers(self, batch: Batch, options: DecodingOptions) -> list[Answer]:
        run = self.begin(batch)
        for _ in self.answer_steps(run, options):
            pass
        return [run.answer(number) for number in range(len(batch.requests))]

    # Memory

    def memory_errors(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context that raises MemoryLimitError if memory runs out."""
        tokens = max(row.tokens for row in batch.rows)
        return memory_errors(self.model.device, questions=len(batch.requests), tokens=tokens)

    def _retry(self, run: Callable[[], T], errors: Callable[[], AbstractContextManager[None]]) -> T:
        """Return the result of ``running_batch``, repeated once inside ``errors()`` if memory runs out."""
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, which kept the failed pass's tensors alive.
        released = self.document_kvs.store.release_memory(self.model.device) + self.model.release_memory()
        logger.warning("memory ran out; %d bytes were freed, and the pass is repeated", released)
        with errors():
            return run()
