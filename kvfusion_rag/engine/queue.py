"""Callers that come while others are being answered wait, and are then answered together.

Whoever waits and finds nobody at work answers for all; tasks have one thread that does it for them. Knows neither
models nor tensors.
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

MOST_WAITING = 256  # questions


@dataclass(eq=False, slots=True)
class _Job:
    """Questions of one caller, which are answered with one set of options, and the answers so far."""

    requests: Sequence[Request]
    options: DecodingOptions
    answers: list[Answer] = field(default_factory=list)
    future: Future[list[Answer]] = field(default_factory=Future)

    @property
    def next_part(self) -> Sequence[Request]:
        """As many of its questions as a batch takes, so that others have their turn between two parts."""
        return self.requests[len(self.answers) :][:MAX_BATCH]

    def goes_with(self, other: _Job) -> bool:
        return (self.options, self.requests[0].mode) == (other.options, other.requests[0].mode)

    def take(self, answers: Sequence[Answer]) -> None:
        self.answers += answers
        if len(self.answers) == len(self.requests):
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.future.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Never begin it, or end its answers at their next token."""
        for request in self.requests:
            request.cancelled.set()
        self.future.cancel()


class RequestQueue:
    """Answers for any number of threads and tasks, in batches of those that wait and ask with the same options.

    Args:
        answer: answers requests of one mode, in order.
        most_waiting: questions that may wait; one caller may ask more than that at once.
    """

    def __init__(
        self, answer: Callable[[Sequence[Request], DecodingOptions], list[Answer]], most_waiting: int = MOST_WAITING
    ) -> None:
        self._answer_all = answer
        self._most_waiting = most_waiting
        self._begin()
        in_child = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := in_child()) and begin())

    def _begin(self) -> None:
        """Nobody waits: so at first, and in a forked process, which has none of its parent's threads."""
        self._lock = threading.Lock()  # of what waits
        self._turn = threading.RLock()  # of who answers; a callback of the store's may ask in the midst of it
        self._waiting: list[_Job] = []
        self._worker: ThreadPoolExecutor | None = None  # of tasks, which share one thread however many they are

    def ask(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Answers in order; an interrupted caller's are given up.

        Raises:
            OverloadError: too many questions wait.
        """
        if not requests:
            return []
        job = self._submit(requests, options)
        try:
            self._see_to(job)
            return job.future.result()
        except BaseException:
            job.cancel()
            raise

    async def aask(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """As :meth:`ask`, while the event loop stays free; answers of a task that is cancelled are given up."""
        if not requests:
            return []
        job = self._submit(requests, options)
        try:
            self._tasks_worker().submit(self._see_to, job)
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
            if waiting and waiting + len(requests) > self._most_waiting:
                raise OverloadError(
                    f"{waiting} questions wait already, and {len(requests)} more would pass the most, "
                    f"{self._most_waiting}; ask again later."
                )
            self._waiting.append(job)
        return job

    def _see_to(self, job: _Job) -> None:
        """Return once ``job`` is done, by whoever's work."""
        while not job.future.done():
            with self._turn:
                if not job.future.done():
                    self._lead(job)

    def _lead(self, own: _Job) -> None:
        """Answer who has waited longest, and those that go with it."""
        taken: list[_Job] = []
        try:
            with self._lock:
                if own not in self._waiting:  # the one who had taken it was interrupted
                    self._waiting.append(own)
                self._waiting = [job for job in self._waiting if not job.future.done()]
                questions = 0
                for job in self._waiting:
                    if not taken or (job.goes_with(taken[0]) and questions + len(job.next_part) <= MAX_BATCH):
                        taken.append(job)
                        questions += len(job.next_part)
                self._waiting = [job for job in self._waiting if job not in taken]
            self._answer(taken)
        finally:  # parts are left to do, or this one is interrupted and another one goes on
            left = [job for job in taken if not job.future.done()]
            with self._lock:
                self._waiting += left

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Answer jobs together; where that fails, each alone, so that every caller gets an error of its own alone."""
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
                job.take([next(found) for _ in part])
            return
        for job in jobs:  # here the error is gone, and with it the memory that its frames held
            if not job.future.done():
                self._answer([job])
