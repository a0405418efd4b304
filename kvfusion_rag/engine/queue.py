"""Batches callers that wait at the same time.

The first waiting thread that finds the queue idle answers for itself and others. Tasks share one worker thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import OverloadError
from ..fusion.sampling import DecodingOptions
from ..schema import Answer
from .requests import MAX_BATCH, Request

MAX_WAITING = 256  # questions


@dataclass(eq=False, slots=True)
class _Job:
    """The questions of one caller, answered with one set of options, and their answers so far."""

    requests: Sequence[Request]
    options: DecodingOptions
    answers: list[Answer] = field(default_factory=list)
    future: Future[list[Answer]] = field(default_factory=Future)

    @property
    def next_part(self) -> Sequence[Request]:
        """The next questions, at most one batch, so that other callers are served between two parts."""
        return self.requests[len(self.answers) :][:MAX_BATCH]

    @property
    def namespace(self) -> str:
        return self.requests[0].namespace

    def can_join(self, other: _Job) -> bool:
        return (self.options, self.requests[0].mode) == (other.options, other.requests[0].mode)

    def add(self, answers: Sequence[Answer]) -> None:
        self.answers += answers
        if len(self.answers) == len(self.requests):
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.future.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Drop the job if it has not started, or end its answers at their next token."""
        for request in self.requests:
            request.cancelled.set()
        self.future.cancel()


class RequestQueue:
    """Answers questions of any number of threads and tasks, batching those with the same mode and options.

    Args:
        answer: function that answers requests of one mode, in order.
        max_waiting: questions that may wait. One caller may ask more than that at once.
    """

    def __init__(
        self, answer: Callable[[Sequence[Request], DecodingOptions], list[Answer]], max_waiting: int = MAX_WAITING
    ) -> None:
        self._answer_all = answer
        self._max_waiting = max_waiting
        self._reset()
        reset = weakref.WeakMethod(self._reset)
        os.register_at_fork(after_in_child=lambda: (in_child := reset()) and in_child())

    def _reset(self) -> None:
        """Start with an empty queue, also in a forked process, which has none of its parent's threads."""
        self._lock = threading.Lock()  # guards the waiting jobs
        self._turn = threading.RLock()  # held by the answering thread; a store callback may ask again inside it
        self._waiting: list[_Job] = []
        self._worker: ThreadPoolExecutor | None = None  # one thread for all tasks
        self._turns = 0  # number of batches so far
        self._last_turn: dict[str, int] = {}  # last batch of each namespace

    def ask(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Return answers in order. An interrupt cancels the caller's questions.

        Raises:
            OverloadError: too many questions are waiting.
        """
        if not requests:
            return []
        job = self._submit(requests, options)
        try:
            self._finish(job)
            return job.future.result()
        except BaseException:
            job.cancel()
            raise

    async def aask(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Like :meth:`ask`, without blocking the event loop. Cancelling the task cancels its questions."""
        if not requests:
            return []
        job = self._submit(requests, options)
        try:
            self._tasks_worker().submit(self._finish, job)
            return await asyncio.wrap_future(job.future)
        except BaseException:
            job.cancel()
            raise

    def _tasks_worker(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvfusion-answers")
            return self._worker

    def _submit(self, requests: Sequence[Request], options: DecodingOptions) -> _Job:
        job = _Job(requests, options)
        with self._lock:
            self._waiting = [other for other in self._waiting if not other.future.done()]
            waiting = sum(len(other.requests) for other in self._waiting)
            if waiting and waiting + len(requests) > self._max_waiting:
                raise OverloadError(
                    f"the queue is full: {waiting} waiting plus {len(requests)} new questions exceed the limit of "
                    f"{self._max_waiting}; retry later."
                )
            self._waiting.append(job)
        return job

    def _finish(self, job: _Job) -> None:
        """Return once ``job`` is done, whichever thread answered it."""
        while not job.future.done():
            with self._turn:
                if not job.future.done():
                    self._answer_next(job)

    def _answer_next(self, own: _Job) -> None:
        """Answer the oldest job of the namespace that was served longest ago, and those that can join it."""
        taken: list[_Job] = []
        try:
            with self._lock:
                if own not in self._waiting:  # the thread that had taken it was interrupted
                    self._waiting.append(own)
                self._waiting = [job for job in self._waiting if not job.future.done()]
                questions, waiting = 0, sorted(self._waiting, key=lambda job: self._last_turn.get(job.namespace, 0))
                for job in waiting:
                    if not taken or (job.can_join(taken[0]) and questions + len(job.next_part) <= MAX_BATCH):
                        taken.append(job)
                        questions += len(job.next_part)
                self._waiting = [job for job in self._waiting if job not in taken]
                self._turns += 1
                self._last_turn |= dict.fromkeys((job.namespace for job in taken), self._turns)
            self._answer(taken)
        finally:  # some have parts left, or this thread was interrupted and another one resumes
            unfinished = [job for job in taken if not job.future.done()]
            with self._lock:
                self._waiting += unfinished

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Answer jobs together. If that fails, answer each one alone, so that a caller only gets its own error."""
        parts = [job.next_part for job in jobs]
        requests = [request for part in parts for request in part]
        try:
            found = iter(self._answer_all(requests, jobs[0].options) if jobs else [])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
        else:
            for job, part in zip(jobs, parts, strict=True):
                job.add([next(found) for _ in part])
            return
        for job in jobs:  # outside the except block, which kept the failed batch's memory
            if not job.future.done():
                self._answer([job])
