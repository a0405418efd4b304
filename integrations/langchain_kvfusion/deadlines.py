"""Limits on how long an answer may take, and calls that are made once more. Knows no model and no messages.

Time counts while an answer is computed, not while a reader of its stream does something else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import AnswerTimeoutError

T = TypeVar("T")


async def answered_within(seconds: float | None, answer: Awaitable[T]) -> T:
    """The awaited answer; its task is cancelled, and so its work ended, once ``seconds`` have passed.

    Raises:
        AnswerTimeoutError: they have passed.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise _too_late(seconds) from None
        raise


def answer_within(seconds: float, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As :func:`answered_within` for callers without an event loop of their own, or inside a running one."""
    with ThreadPoolExecutor(1, thread_name_prefix="kvfusion-timeout") as worker:
        return worker.submit(lambda: asyncio.run(answered_within(seconds, ask()))).result()


def pieces_within(seconds: float | None, pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a stream, as long as all together take no more than ``seconds``.

    A piece that is being computed is waited for: only between two pieces can a stream be stopped.

    Raises:
        AnswerTimeoutError: they took more.
    """
    spent = 0.0
    while True:
        begun = time.monotonic()
        piece = next(pieces, None)
        spent += time.monotonic() - begun
        if piece is None:
            return
        if seconds is not None and spent > seconds:
            raise _too_late(seconds)
        yield piece


async def apieces_within(seconds: float | None, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """As :func:`pieces_within`, but whoever waits for a piece is let go as soon as ``seconds`` have passed."""
    spent = 0.0
    while True:
        begun = time.monotonic()
        left = None if seconds is None else seconds - spent
        try:
            piece = await answered_within(left, anext(pieces))
        except StopAsyncIteration:
            return
        except AnswerTimeoutError:
            raise _too_late(seconds) from None
        spent += time.monotonic() - begun
        yield piece


def _too_late(seconds: float | None) -> AnswerTimeoutError:
    return AnswerTimeoutError(
        f"the answer took more than timeout={seconds} s and was stopped; allow more, set max_tokens lower, or keep "
        "the documents in a store, because computing them anew takes most of the time."
    )
