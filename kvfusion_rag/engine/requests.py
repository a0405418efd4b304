"""Requests and the batches in which they are decoded: which questions share a row of documents, and how many fit.

Questions over the same documents, or nearly the same, read one row of slots. The documents are then in memory once and
are read once per step for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..fusion.constraints import Constraint
from ..fusion.interface import Question
from ..text.documents import EncodedDocuments
from ..text.layouts import Layout
from ..text.tools.reading import CallReader
from .document_kvs import Scope
from .focus import Choice, Focus
from .modes import AnswerMode, PlacedDocument, TokenLimits

MAX_BATCH = 32  # questions; the first step computes logits for every row at every distinct question length
MAX_ROW_TOKENS = 2048  # tokens of all questions of one row, since each is compared with all of them
MAX_FOREIGN = 0.25  # share of a row's document tokens that one of its questions may not attend to


@dataclass(frozen=True, slots=True)
class Request:
    """One question with its documents, encoded and checked against the limits.

    Attributes:
        fused: documents that are prefilled separately, in the order in which they are fused. None if all documents are
            in the question's own prompt.
        layout: the prompt. Its prefix is in front of the fused documents.
        namespace: tenant that the documents belong to.
        version: ``DocumentKVs.version`` that the keys were made with.
        limits: maximum tokens of the answer and of its reasoning.
        spans: token spans of each of the caller's documents in a joined prompt.
        focus: how to choose among more documents; until then ``encoded`` holds the longest ones.
        choice: the result of focus; ``encoded`` then holds the chosen documents.
        constraint: format of the answer, in front of its first token; None for any text.
        calls: finds calls of tools in the answer; None if there are no tools.
        began: ``time.perf_counter()`` at the caller's call.
        cancelled: once set, prefill ends at its next pass, and the answer at its next token.
    """

    encoded: EncodedDocuments
    question: Question
    mode: AnswerMode
    fused: tuple[PlacedDocument, ...] | None
    layout: Layout
    namespace: str
    version: str
    limits: TokenLimits
    spans: tuple[tuple[int, int], ...] = ()
    focus: Focus | None = None
    choice: Choice | None = None
    constraint: Constraint | None = None
    calls: CallReader | None = None
    began: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    @property
    def fused_tokens(self) -> int:
        """Tokens of the fused documents, without the prefix."""
        return sum(len(piece.ids) for piece in self.fused or ())

    @property
    def scope(self) -> Scope:
        """Scope of the fused documents; a joined prompt holds its prefix itself."""
        return Scope(() if self.fused is None else self.layout.prefix, self.namespace)


@dataclass(frozen=True, slots=True)
class SharedRow:
    """Documents of one row of the fused cache, and the questions that read it.

    Attributes:
        pieces: documents by key, in the order in which they are fused.
        scope: the prefix in front of them, and their namespace.
        members: indices of the questions in their batch.
        tokens: tokens of all documents together.
        fewest: smallest number of document tokens of one question.
        question_tokens: tokens of all questions together.
    """

    pieces: Mapping[str, PlacedDocument]
    scope: Scope
    members: tuple[int, ...]
    tokens: int
    fewest: int
    question_tokens: int

    @classmethod
    def of(cls, number: int, request: Request) -> SharedRow:
        """Return a row for one question."""
        pieces, tokens = {piece.key: piece for piece in request.fused or ()}, request.fused_tokens
        return cls(pieces, request.scope, (number,), tokens, tokens, len(request.question.ids))

    def joined_by(self, number: int, request: Request) -> SharedRow | None:
        """Return this row with ``request`` added, or None if the request needs a row of its own."""
        question_tokens = self.question_tokens + len(request.question.ids)
        own = {piece.key: piece for piece in request.fused or ()}
        if not own or self.scope != request.scope or question_tokens > MAX_ROW_TOKENS:
            return None
        added = sum(len(piece.ids) for key, piece in own.items() if key not in self.pieces)
        tokens, fewest = self.tokens + added, min(self.fewest, request.fused_tokens)
        if tokens - fewest > MAX_FOREIGN * tokens:
            return None
        pieces = dict(sorted({**self.pieces, **own}.items())) if added else self.pieces
        return SharedRow(pieces, self.scope, (*self.members, number), tokens, fewest, question_tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are decoded together, and the rows that they read."""

    requests: tuple[Request, ...] = ()
    rows: tuple[SharedRow, ...] = ()

    @classmethod
    def of(cls, request: Request) -> Batch:
        return cls().joined_by(request, share=False)

    @property
    def row_of(self) -> list[int]:
        """Row of each request."""
        found = {number: row for row, shared in enumerate(self.rows) for number in shared.members}
        return [found[number] for number in range(len(self.requests))]

    def is_cancelled(self) -> bool:
        """Return whether nobody waits for any of the answers."""
        return all(request.cancelled.is_set() for request in self.requests)

    @property
    def has_foreign(self) -> bool:
        """Whether some question's row holds documents of other questions."""
        return any(row.fewest < row.tokens for row in self.rows)

    @property
    def slots(self) -> int:
        """Slots of all rows together, padded to the longest documents and the longest questions."""
        longest = max(row.tokens + len(row.scope.prefix) for row in self.rows)
        return len(self.rows) * (longest + max(row.question_tokens for row in self.rows))

    def joined_by(self, request: Request, *, share: bool) -> Batch:
        """Return this batch with ``request`` added, in an existing row (if ``share``) or a new one."""
        number, rows = len(self.requests), list(self.rows)
        for index, row in enumerate(rows if share else ()):
            if (joined := row.joined_by(number, request)) is not None:
                rows[index] = joined
                break
        else:
            rows.append(SharedRow.of(number, request))
        return Batch((*self.requests, request), tuple(rows))


def batches(requests: Sequence[Request], *, max_slots: int, share: bool) -> Iterator[Batch]:
    """Yield requests in order, cut into batches whose padded slots stay within ``max_slots``.

    Args:
        share: whether questions may share rows.
    """
    batch = Batch()
    for request in requests:
        grown = batch.joined_by(request, share=share)
        if batch.requests and (len(grown.requests) > MAX_BATCH or grown.slots > max_slots):
            yield batch
            grown = Batch.of(request)
        batch = grown
    if batch.requests:
        yield batch
