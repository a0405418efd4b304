"""Prefills and removes documents in steps in one thread, fairly between tenants, and with answers first.

Encoding and prefill use the processor fully. In the threads of answers, a few long documents would delay all
answers. Here each tenant has at most one step that waits for the thread, so tenants take turns. While requests of
other kinds are in progress, the thread pauses after each step for as long as the step took.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from .admission import Load
from .streams import in_thread

T = TypeVar("T")


class DocumentWork:
    """The work of all requests on documents.

    Args:
        load: requests in progress, including those that call :meth:`run`.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._requests = 0
        self._turn = asyncio.Lock()  # locks are given to waiting tasks in the order in which they asked
        self._turn_of_tenant: defaultdict[str | None, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvfusion-documents")

    async def run(self, tenant: str | None, steps: Generator[None, None, T]) -> T:
        """Return the result of ``steps``. A cancelled call ends after the step in progress."""
        self._requests += 1
        try:
            while True:
                async with self._turn_of_tenant[tenant], self._turn:
                    began = time.perf_counter()
                    result: tuple[T] | None = await in_thread(partial(_next, steps), pool=self._thread)
                    if result is not None:
                        return result[0]
                    if self._load.total > self._requests:
                        await asyncio.sleep(time.perf_counter() - began)
        finally:
            self._requests -= 1
            steps.close()


def _next(steps: Generator[None, None, T]) -> tuple[T] | None:
    """Run one step. Return the result in a tuple if that was the last one."""
    try:
        next(steps)
    except StopIteration as end:
        return (end.value,)
    return None
