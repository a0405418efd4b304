"""One batch while it is decoded: its fused cache, the origins of its documents, its answers so far and their times."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from ..fusion.fused_cache import FusedBuffer, FusedContext
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.interface import FusionModel
from ..model.kv import DocumentKV
from ..schema import Answer, KeyKind, Origin, Timings, Usage
from ..store import FetchedKVs, KVRequest, Tier
from ..text.citations import find_citations
from .document_kvs import DocumentKVs, Scope
from .requests import Batch, Request

logger = logging.getLogger(__name__)

SPARE_SLOTS = 4096  # free slots for answers behind all rows together; the buffer grows if they are used up


@dataclass(slots=True)
class Run:
    """A batch being answered.

    Attributes:
        origins, misses: origin of each document's KV, and miss reason of each that was computed, by key.
        key_kind: kind of all keys.
        prefilled_at, first_token_at: ``time.perf_counter()`` values.
        answers: answers so far.
    """

    batch: Batch
    origins: Mapping[str, Origin]
    misses: Mapping[str, str]
    key_kind: KeyKind
    prefilled_at: float
    first_token_at: float = field(default=0.0, kw_only=True)
    answers: list[GrowingAnswer] = field(default_factory=list, kw_only=True)

    def answer(self, number: int) -> Answer:
        """Return the answer of question ``number`` once decoding has ended."""
        request, answer = self.batch.requests[number], self.answers[number]
        if answer.finish_reason in (None, "length"):
            limit = request.limits.answer
            logger.info("the answer was cut at its limit of %d tokens; max_new_tokens raises it", limit)
        encoded, fuses = request.encoded, request.mode.fuses
        origins = self._origins(request)
        sources = encoded.sources(origins, self.misses, self.key_kind) if fuses else encoded.sources(origins, {})
        if request.choice is not None:
            sources = request.choice.sources(sources)
        text, calls, reason = answer.text, (), answer.finish_reason or "length"
        if request.calls is not None:
            text, calls = request.calls.read(text)
            reason = "tool_calls" if calls and reason == "stop" else reason
        cached = sum(len(ids) for key, ids in encoded.keys.items() if origins[key] in get_args(Tier))
        return Answer(
            text=text,
            mode=request.mode.name,
            sources=sources,
            citations=find_citations(text, encoded.cited_order),
            usage=Usage(
                prompt_tokens=len(request.scope.prefix) + request.fused_tokens + len(request.question.ids),
                document_tokens=encoded.tokens if fuses else sum(end - start for start, end in request.spans),
                cached_document_tokens=cached,
                completion_tokens=len(answer.ids),
                reasoning_tokens=answer.reasoning_tokens,
            ),
            timings=Timings(
                *(at - request.began for at in (self.prefilled_at, self.first_token_at, time.perf_counter()))
            ),
            finish_reason=reason,
            token_ids=tuple(answer.ids),
            reasoning=answer.reasoning or None,
            tool_calls=calls,
        )

    def _origins(self, request: Request) -> dict[str, Origin]:
        """Return the origin of each of the request's documents by key."""
        keys = request.encoded.keys
        if not request.mode.fuses:
            return dict.fromkeys(keys, "prompt")
        known: dict[str, Origin] = {}
        for other in (*self.batch.requests, request):  # what focus chose for one of them is fetched for none
            known |= other.choice.origins if other.choice else {}
        known |= self.origins
        found: dict[tuple[int, ...], Origin] = {piece.ids: known[piece.key] for piece in request.fused or ()}
        return {key: found[ids] for key, ids in keys.items()}


@dataclass(slots=True)
class FusedRun(Run):
    """A batch over a fused cache in this process.

    Attributes:
        context: the fused cache, over the memory of ``buffer``.
        plan: how the model answers it (``FusionModel.plan``).
    """

    buffer: FusedBuffer
    context: FusedContext
    plan: Any

    def release(self) -> None:
        """Return the buffer to the pool; afterwards only the answers are usable."""
        self.buffer.release()
        del self.buffer, self.context, self.plan

    def visible(self) -> torch.Tensor | None:
        """Return the slots that each question may attend to, (N, K) bool, or None if that is its whole row."""
        batch, slots = self.batch, self.context.mask.shape[1]
        if not batch.has_foreign:
            return None
        visible = torch.zeros(len(batch.requests), slots, dtype=torch.bool)
        for number, (request, row) in enumerate(zip(batch.requests, batch.row_of, strict=True)):
            at = len(batch.rows[row].scope.prefix)
            visible[number, :at] = True
            own = {piece.key for piece in request.fused or ()}
            for key, piece in batch.rows[row].pieces.items():
                visible[number, at : at + len(piece.ids)] = key in own
                at += len(piece.ids)
        return visible.to(self.context.mask.device)


def start_run(model: FusionModel, document_kvs: DocumentKVs, batch: Batch) -> FusedRun:
    """Prefill what the store lacks and fuse each row's documents.

    The buffer gets at most ``SPARE_SLOTS`` free slots for all answers together, or half as many as the documents take
    if that is more, since most answers end before their limits.

    Raises:
        InvalidInputError: weights, threads or precision changed since a request was made.
        CancelledError: all requests were cancelled meanwhile.
    """
    for request in batch.requests:
        document_kvs.require_version(request.version)
    lengths = [row.tokens + len(row.scope.prefix) for row in batch.rows]
    spare = max(SPARE_SLOTS // len(batch.rows), max(lengths) // 2)
    answers = max(sum(batch.requests[number].limits.total for number in row.members) for row in batch.rows)
    room = max(row.question_tokens for row in batch.rows) + min(spare, answers)
    buffer = model.buffer(lengths, room=room)
    fetched = FetchedKVs({}, {}, {})
    for scope in dict.fromkeys(row.scope for row in batch.rows):
        found = _fill_rows(document_kvs, batch, buffer, scope)
        fetched.origins.update(found.origins)
        fetched.misses.update(found.misses)
    mode, context = batch.requests[0].mode, buffer.context()
    prefixes = [len(row.scope.prefix) for row in batch.rows]
    plan = model.plan(context, prefixes, tuned=mode.tuned, ape=mode.ape)
    return FusedRun(
        batch, fetched.origins, fetched.misses, document_kvs.key_kind, time.perf_counter(), buffer, context, plan
    )


def _fill_rows(document_kvs: DocumentKVs, batch: Batch, buffer: FusedBuffer, scope: Scope) -> FetchedKVs:
    """Put the prefix and the documents of the rows of ``scope`` into the buffer."""
    requests: dict[str, KVRequest] = {}
    copies: list[tuple[str, DocumentKV]] = []  # further slots of documents that several rows share
    starts: dict[str, int] = {}
    prefix = document_kvs.prefix_kv(scope)
    chosen = {key: kv for r in batch.requests if r.choice is not None for key, kv in r.choice.kvs.items()}
    for row, shared in enumerate(batch.rows):
        if shared.scope != scope:
            continue
        if prefix is not None:
            prefix.copy_into(buffer.slots(row, 0, prefix.token_ids, 0))
        at = len(scope.prefix)
        for piece in shared.pieces.values():
            slots = buffer.slots(row, at, piece.ids, piece.start)
            if piece.key in chosen:
                chosen[piece.key].copy_into(slots)
            elif piece.key in requests:
                copies.append((piece.key, slots))
            else:
                requests[piece.key] = KVRequest(piece.ids, slots, piece.stored)
                starts[piece.key] = piece.start
            at += len(piece.ids)
    fetched = document_kvs.fetch(requests, starts, batch.requests[0].version, scope, is_cancelled=batch.is_cancelled)
    for key, slots in copies:
        fetched.kvs[key].copy_into(slots)
    return fetched
