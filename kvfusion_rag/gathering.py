"""Callers that come while others are being answered wait, and are then answered together.

There is no thread of its own: whoever waits and finds nobody at work answers for all. Knows neither models nor
tensors.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from .batching import MAX_BATCH, Request
from .decoding import DecodingOptions
from .errors import OverloadError
from .schema import Answer

MOST_WAITING = 256  # questions


@dataclass(eq=False, slots=True)
class _Job:
    """Questions of one caller, which are answered with one set of options."""

    requests: Sequence[Request]
    options: DecodingOptions
    future: Future[list[Answer]] = field(default_factory=Future)

    def cancel(self) -> None:
        """Never begin it, or end its answers at their next token."""
        for request in self.requests:
            request.cancelled.set()
        self.future.cancel()

    def goes_with(self, other: _Job) -> bool:
        return (self.options, self.requests[0].mode) == (other.options, other.requests[0].mode)


class Gatherer:
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
        self._lock = threading.Lock()  # of what waits
        self._turn = threading.Lock()  # of who answers
        self._waiting: list[_Job] = []

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
        """As :meth:`ask`, while the event loop stays free; answers of a task that is cancelled are given up.

        Everything is queued at once, however few threads the loop's executor has.
        """
        if not requests:
            return []
        job = self._submit(requests, options)
        worker = asyncio.get_running_loop().run_in_executor(None, self._see_to, job)
        try:
            await asyncio.shield(worker)
            return job.future.result()
        except BaseException:
            job.cancel()
            raise

    def _submit(self, requests: Sequence[Request], options: DecodingOptions) -> _Job:
        job = _Job(requests, options)
        with self._lock:
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
                    self._answer(self._take())

    def _take(self) -> list[_Job]:
        """The oldest job, and those that go with it."""
        with self._lock:
            self._waiting = [job for job in self._waiting if not job.future.cancelled()]
            taken: list[_Job] = []
            questions = 0
            for job in self._waiting:
                if not taken or (job.goes_with(taken[0]) and questions + len(job.requests) <= MAX_BATCH):
                    taken.append(job)
                    questions += len(job.requests)
            self._waiting = [job for job in self._waiting if job not in taken]
        return taken

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Answer jobs together; where that fails, each alone, so that every caller gets an error of its own alone."""
        requests = [request for job in jobs for request in job.requests]
        try:
            answers = iter(self._answer_all(requests, jobs[0].options) if requests else ())
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
            else:
                with suppress(InvalidStateError):  # cancelled meanwhile
                    jobs[0].future.set_exception(error)
            return
        except BaseException:  # the caller who works for all is interrupted: another one goes on
            with self._lock:
                self._waiting[:0] = jobs
            raise
        for job in jobs:
            own = [next(answers) for _ in job.requests]
            with suppress(InvalidStateError):  # cancelled meanwhile
                job.future.set_result(own)
