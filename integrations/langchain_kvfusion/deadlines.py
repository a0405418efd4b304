"""Time limits of answers. Only the time to compute an answer counts, not the time its consumer takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import AnswerTimeoutError

T = TypeVar("T")


async def aanswer_within(seconds: float | None, answer: Awaitable[T]) -> T:
    """Await ``answer``, and cancel its task after ``seconds``.

    Raises:
        AnswerTimeoutError: the time limit was exceeded.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise _timeout(seconds) from None
        raise


def answer_within(seconds: float, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Like :func:`aanswer_within`, for synchronous callers with or without a running event loop."""
    with ThreadPoolExecutor(1, thread_name_prefix="kvfusion-timeout") as worker:
        return worker.submit(lambda: asyncio.run(aanswer_within(seconds, ask()))).result()


def pieces_within(seconds: float | None, pieces: Iterator[T]) -> Iterator[T]:
    """Yield the pieces of a stream as long as computing them has taken at most ``seconds`` in total.

    The time is checked between two pieces, because a piece that is being computed cannot be interrupted.

    Raises:
        AnswerTimeoutError: the time limit was exceeded.
    """
    spent = 0.0
    while True:
        begun = time.monotonic()
        piece = next(pieces, None)
        spent += time.monotonic() - begun
        if piece is None:
            return
        if seconds is not None and spent > seconds:
            raise _timeout(seconds)
        yield piece


async def apieces_within(seconds: float | None, pieces: AsyncIterator[T]) -> AsyncIterator[T]:
    """Like :func:`pieces_within`, but the time limit also interrupts the wait for a piece."""
    spent = 0.0
    while True:
        begun = time.monotonic()
        remaining = None if seconds is None else seconds - spent
        try:
            piece = await aanswer_within(remaining, anext(pieces))
        except StopAsyncIteration:
            return
        except AnswerTimeoutError:
            raise _timeout(seconds) from None
        spent += time.monotonic() - begun
        yield piece


def _timeout(seconds: float | None) -> AnswerTimeoutError:
    return AnswerTimeoutError(
        f"the answer took more than timeout={seconds} s and was stopped; raise the timeout, lower max_tokens, or use "
        "a store, because computing document KVs takes most of the time."
    )
