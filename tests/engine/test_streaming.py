"""AnswerStream as an async iterator: its pieces, and how it ends early."""

import asyncio
import threading

import pytest
from fakes import RecordingGenerator


async def test_async_iteration_yields_all_pieces_and_sets_the_answer():
    generator = RecordingGenerator()
    async with generator.stream("q") as stream:
        assert [piece async for piece in stream] == ["in", " lima"]
    assert stream.answer is not None and stream.answer.text == "in lima"
    assert threading.get_ident() not in generator.threads


async def test_aclose_does_not_wait_for_the_current_piece():
    generator = RecordingGenerator(hold=threading.Event())
    stream = generator.stream("q")
    piece = asyncio.create_task(anext(stream, None))
    while not generator.threads:
        await asyncio.sleep(0.001)
    await stream.aclose()
    assert not stream.closed
    generator.hold.set()
    assert await piece == "in"
    assert stream.closed and await anext(stream, None) is None


async def test_cancelled_wait_for_a_piece_closes_the_stream():
    generator = RecordingGenerator(hold=threading.Event())
    stream = generator.stream("q")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(stream)
    generator.hold.set()
    stream.close()  # waits for the piece
    assert stream.closed and stream.answer is None
    assert await anext(stream, None) is None
