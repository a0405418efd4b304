"""One answer while it is decoded: its tokens, its text so far, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..schema import FinishReason

_INCOMPLETE = "\ufffd"  # what a character with missing bytes is decoded to


class GrowingAnswer:
    """Tokens and text of one answer so far, and why it ended.

    White space around an answer is dropped; leading white space is dropped before stop strings are searched.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str], unsettling_ids: frozenset[int] = frozenset()
    ) -> None:
        self._decode = decode
        self._stop = stop
        self._unsettling_ids = unsettling_ids
        self._emitted = 0  # characters
        self._length = self._settled = 0  # number of text tokens, and of those whose text is final
        self._spelt = 0, ""  # number of tokens, and their text
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int, *, is_end: bool, is_last: bool) -> None:
        """Add a token; ``is_end`` marks an end token, ``is_last`` the last one within the limit."""
        self.ids.append(token)
        if is_end:
            self.finish_reason = "stop"
            return
        self._length = len(self.ids)
        if token not in self._unsettling_ids:
            self._settled = self._length
        if self._stop and self._stopped_at(self._spell(self._length)) is not None:
            self.finish_reason = "stop"
        elif is_last:
            self.finish_reason = "length"

    @property
    def text(self) -> str:
        """The answer so far. It is decoded on access, because decoding takes time proportional to the length."""
        return self._text(self._length)

    def take(self) -> str:
        """Return the final text that has not been returned yet.

        Incomplete characters, runs of byte tokens and endings that may become a stop string are held back.
        """
        text = self.text
        ready = len(text) if self.finish_reason else len(text) - self._uncertain()
        piece = text[self._emitted : max(ready, self._emitted)]
        self._emitted += len(piece)
        return piece

    def _uncertain(self) -> int:
        """Return the length of the ending that may still change."""
        text = self.text
        settled = text[: len(self._text(self._settled))].rstrip(_INCOMPLETE)
        open_stop = max((_overlap(settled, stop) for stop in self._stop), default=0)
        return len(text) - len(settled) + open_stop

    def _text(self, length: int) -> str:
        """Return the text of the first ``length`` tokens, up to a stop string."""
        spelt = self._spell(length)
        return spelt[: self._stopped_at(spelt)].rstrip()

    def _spell(self, length: int) -> str:
        if self._spelt[0] != length:
            self._spelt = length, self._decode(self.ids[:length]).lstrip() if length else ""
        return self._spelt[1]

    def _stopped_at(self, text: str) -> int | None:
        """Return the start of the first stop string, or None."""
        return min((end for stop in self._stop if (end := text.find(stop)) >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
