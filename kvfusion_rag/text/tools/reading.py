"""Splits an answer, or what a stream has of it so far, into its text and its calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ...schema import AnswerPiece, ToolCall
from .call_format import CallFormat


@dataclass(frozen=True, slots=True)
class CallReader:
    """Reads answers to one prompt.

    Attributes:
        prompt: ids of the prompt, from which the ids of calls are made, so that a stream and its answer agree.
    """

    format: CallFormat
    prompt: Sequence[int]

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text in front of the calls, and the calls. The arguments of a call that was cut are cut."""
        opening = self.format.opening
        plain, found, rest = text.partition(opening)
        return plain.rstrip() if found else text, tuple(self._calls(rest))

    def splitter(self) -> CallSplitter:
        """Return what splits the pieces of a stream."""
        return CallSplitter(self)

    def _calls(self, rest: str) -> list[ToolCall]:
        calls: list[ToolCall] = []
        while True:
            name, found, rest = rest.partition(self.format.middle)
            if not found:
                return calls
            end = _json_end(rest)
            calls.append(ToolCall(name, rest[:end], self._id(len(calls))))
            between = self.format.between
            if end is None or between is None or not rest[end:].startswith(between):
                return calls
            rest = rest[end + len(between) :]

    def _id(self, number: int) -> str:
        made = hashlib.blake2b(repr((tuple(self.prompt), number)).encode(), digest_size=12)
        return f"call_{made.hexdigest()}"


class CallSplitter:
    """Turns the pieces of an answer's whole text into pieces of its text and of its calls."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader
        self._whole = ""
        self._emitted = 0  # characters of the text
        self._arguments: list[int] = []  # characters emitted of each call's arguments

    def add(self, piece: str, *, is_complete: bool = False) -> list[AnswerPiece]:
        """Return the final pieces that ``piece`` adds. What may become the beginning of a call is held back."""
        self._whole += piece
        text, calls = self._reader.read(self._whole)
        opening = self._reader.format.opening
        if not is_complete and opening not in self._whole:
            text = text[: len(text) - _overlap(text, opening)].rstrip()
        pieces = [AnswerPiece(text[self._emitted :])] if len(text) > self._emitted else []
        self._emitted = max(self._emitted, len(text))
        for number, call in enumerate(calls):
            if number == len(self._arguments):
                self._arguments.append(0)
                start = ToolCall(call.name, "", call.id)
                pieces.append(AnswerPiece("", call_index=number, call=start))
            if len(call.arguments) > self._arguments[number]:
                pieces.append(AnswerPiece(call.arguments[self._arguments[number] :], call_index=number))
                self._arguments[number] = len(call.arguments)
        return pieces


def _json_end(text: str) -> int | None:
    """Return where the JSON value at the beginning of ``text`` ends, or None if it is not complete."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``mark``."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
