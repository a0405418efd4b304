"""A request whose documents are lost is repeated once, behind the tokens that vLLM has generated before."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from kvfusion_rag.fusion.growing_answer import GrowingAnswer
from kvfusion_rag.vllm.runner import VllmRunner
from kvfusion_rag.vllm.server import DocumentsLostError

LOST = -1


class Scripted(VllmRunner):
    """A runner whose vLLM returns the given tokens, one list per request."""

    def __init__(self, *requests: list[int]) -> None:
        self.requests: Iterator[list[int]] = iter(requests)
        self.checks = 0

    def _grow(self, request: Any, answer: GrowingAnswer, options: Any) -> Generator[None, None, None]:
        for token in next(self.requests):
            if token == LOST:
                raise DocumentsLostError("lost")
            answer.push(token, is_end=False)
            yield

    def _stored(self, request: Any, *, again: bool) -> Any:
        self.checks += again


def grown(runner: Scripted) -> list[int]:
    answer = GrowingAnswer(str, limit=3)
    unused: Any = None
    for _ in runner.growing(unused, answer, unused):
        pass
    return answer.ids


@pytest.mark.parametrize("requests", [([LOST], [1, 2, 3]), ([1], [LOST], [2, 3])], ids=["first", "behind reasoning"])
def test_lost_documents_are_checked_and_the_request_is_repeated(requests):
    runner = Scripted(*requests)
    assert grown(runner) == [1, 2, 3] and runner.checks == 1


@pytest.mark.parametrize("requests", [([LOST], [LOST]), ([1, LOST],)], ids=["twice", "after a token"])
def test_documents_that_stay_lost_are_an_error(requests):
    with pytest.raises(DocumentsLostError):
        grown(Scripted(*requests))
