"""What fuzz tests share: numbers of examples, damaged bytes, JSON of any form, and the law of our own errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from kvfusion_rag.errors import KVFusionError

T = TypeVar("T")

MAX_MESSAGE = 4000  # characters of an error
DEEP = "[" * 100_000
LARGE = 10**400  # an integer that no float can hold

TEXTS = st.text(st.characters(), max_size=40)  # with control characters and lone surrogates
NUMBERS = st.integers() | st.floats() | st.sampled_from([LARGE, -LARGE, 2**63, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda items: st.lists(items, max_size=4) | st.dictionaries(TEXTS, items, max_size=4),
    max_leaves=8,
)


def examples(usual: int) -> settings:
    """Return settings with ``usual`` examples, and thirty times as many in the nightly run."""
    return settings(max_examples=usual * settings.default.max_examples // 100)


def ours(call: Callable[[], T]) -> T | None:
    """Return the result of ``call``, or None if it raised one of our errors, which must be short."""
    try:
        return call()
    except KVFusionError as error:
        assert 0 < len(str(error)) < MAX_MESSAGE
        return None


def damaged(data: bytes, most: int = 8) -> st.SearchStrategy[bytes]:
    """Return a strategy for versions of a file that are cut, overwritten, repeated in part or have changed bytes."""
    place = st.integers(0, len(data))
    spans = st.tuples(place, place).map(sorted)

    def changed(changes: list[tuple[int, bytes]]) -> bytes:
        new = bytearray(data)
        for at, value in changes:
            new[at : at + len(value)] = value
        return bytes(new)

    return st.one_of(
        place.map(lambda end: data[:end]),
        st.lists(st.tuples(place, st.binary(min_size=1, max_size=4)), min_size=1, max_size=most).map(changed),
        spans.map(lambda span: data[: span[0]] + data[span[1] :]),
        spans.map(lambda span: data[: span[1]] + data[span[0] :]),
    )
