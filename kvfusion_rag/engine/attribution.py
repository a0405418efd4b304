"""Which documents an answer came from: the attention that each got, and what the answer is worth without it.

Both are measured after the answer is known, over the caches that it was decoded from: one pass that adds attention up,
and one in which the answer's probability is asked for with every document, and with each in turn left out.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MissingDependencyError
from ..fusion.decode import log_probabilities
from ..fusion.sampling import DecodingOptions
from ..fusion.slot_table import StepInputs
from ..model.attention_weights import AttentionSum
from ..schema import Answer, Attributed, Mode
from .engine import Engine, Run
from .requests import Batch, Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGITS_AT_ONCE = 1 << 27  # numbers
WEIGHTS_AT_ONCE = 1 << 26  # numbers of one layer's attention weights


@dataclass(frozen=True, slots=True)
class Influence:
    """What one document did for an answer.

    Attributes:
        attention: its share of the attention of all layers and heads while the answer's tokens were chosen. What is
            left to 1 went to prefix, question and answer. Twins that are fused once have the same one.
        log_probability: of the answer without this document.
        effect: how much the document raises the answer's log-probability, in nats. 0 for one whose twin stays.
    """

    id: str
    title: str | None
    attention: float
    log_probability: float
    effect: float


@dataclass(frozen=True, slots=True, repr=False)
class Attribution:
    """An answer, its natural log-probability with all documents, and what each of them did for it.

    ``documents`` are in the caller's order. Effects need not add up: documents that say the same stand in for each
    other.
    """

    answer: str
    log_probability: float
    mode: Mode
    documents: tuple[Influence, ...]

    def __repr__(self) -> str:
        best = max(self.documents, key=lambda document: document.effect, default=None)
        most = "" if best is None else f", most={best.id!r} ({best.effect:+.2f} nats)"
        return f"Attribution({self.answer!r}, documents={len(self.documents)}{most})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Two bars a document: its effect (nats) and its share of attention (%), on axes of their own scale.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                'a plot needs matplotlib, which is not installed: pip install "kvfusion-rag[evaluation]".'
            ) from error
        if axes is None:
            size = (7.0, 1.4 + 0.42 * len(self.documents))
            axes = pyplot.subplots(figsize=size, layout="constrained")[1]
        places = range(len(self.documents))
        effects = [document.effect for document in self.documents]
        shares = [100 * document.attention for document in self.documents]
        left = axes.barh([y - 0.2 for y in places], effects, 0.38, color="#0072B2")
        shared = axes.twiny()
        right = shared.barh([y + 0.2 for y in places], shares, 0.38, color="#E69F00")
        names = [_plain(document.title or document.id) for document in self.documents]
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("effect on the answer's log-probability, nats")
        shared.set_xlabel("share of attention, %")
        axes.legend([left, right], ["effect", "attention"], loc="lower right")
        return axes

    def _repr_html_(self) -> str:
        """Rich output in notebooks. Documents and answers are untrusted text, so all of it is escaped."""
        rows = "".join(
            f"<tr><td>{html.escape(d.id)}</td><td>{html.escape(d.title or '')}</td><td>{d.effect:+.2f}</td>"
            f"<td>{100 * d.attention:.1f} %</td></tr>"
            for d in self.documents
        )
        return (
            f"<p><b>{html.escape(self.answer)}</b> <small>({self.mode}, log-probability {self.log_probability:.2f})"
            f"</small></p><table><tr><th>document</th><th>title</th><th>effect, nats</th><th>attention</th></tr>{rows}"
            "</table>"
        )


def with_attribution(engine: Engine, request: Request, answer: Answer, wanted: Attributed) -> Answer:
    """``answer`` with the attention that its sources got, and with "effects" what it is worth without each."""
    request = engine.prepare(request, DecodingOptions(max_new_tokens=len(answer.token_ids)))
    if wanted == "attention":
        shares = attention_shares(engine, request, answer.token_ids)
        measured = [{"attention": share} for share in shares]
    else:
        found = attribute(engine, request, answer.token_ids, answer.text).documents
        measured = [{"attention": influence.attention, "effect": influence.effect} for influence in found]
    sources = [replace(s, attention=0.0, effect=None if wanted == "attention" else 0.0) for s in answer.sources]
    for number, facts in zip(_read(request), measured, strict=True):
        sources[number] = replace(sources[number], **facts)
    return replace(answer, sources=tuple(sources))


def _read(request: Request) -> Sequence[int]:
    """Places of the documents that the model reads among the caller's documents."""
    return range(len(request.reading.documents)) if request.choice is None else request.choice.kept


def attribute(engine: Engine, request: Request, answer: Sequence[int], text: str) -> Attribution:
    """What each document of ``request`` did for ``answer`` (ids), which reads as ``text``.

    Raises:
        UnsupportedModelError: the model's attention cannot be exchanged for one that adds it up.
    """
    engine.require_explicit_attention()
    options, began = DecodingOptions(max_new_tokens=len(answer)), time.perf_counter()
    request = engine.prepare(request, options)  # as the model is now, since variants have its keys
    documents = request.reading.documents
    # In an order of theirs, not the caller's: where a variant stands among the others rounds its numbers.
    full = sorted((number for number, read in enumerate(documents) if read.pieces), key=lambda n: documents[n].pieces)
    fewer = {number: request.reading.without(number) for number in full}
    left = {n: engine.request_for(rest, request.layout, request.mode, options, began) for n, rest in fewer.items()}
    if request.fused is not None:  # nothing leaves with a document whose twin stays fused
        left = {number: variant for number, variant in left.items() if variant.fused != request.fused}
    whole, *without = _log_probabilities(engine, [request, *left.values()], answer)
    found = dict(zip(left, without, strict=True))
    shares = attention_shares(engine, request, answer)
    influences = (
        Influence(read.id, read.document.title, share, found.get(n, whole), whole - found.get(n, whole))
        for n, (read, share) in enumerate(zip(documents, shares, strict=True))
    )
    return Attribution(text, whole, request.mode, tuple(influences))


@torch.inference_mode()
def attention_shares(engine: Engine, request: Request, answer: Sequence[int]) -> list[float]:
    """Each document's mean share, over layers and heads, of the attention that chose the tokens of ``answer``."""
    request = engine.prepare(request, DecodingOptions(max_new_tokens=len(answer)))
    spans = _spans(request)
    run = engine.start(Batch.of(request), DecodingOptions(max_new_tokens=len(answer)))
    try:
        plan = engine.plan(run)
        decoder = plan.decoder
        attention = AttentionSum(max((end for own in spans for _, end in own), default=0), decoder.device)
        ids, first = [*request.question.ids, *answer[:-1]], len(request.question.ids) - 1
        slots = run.context.mask.shape[1] + len(ids)
        step = max(1, WEIGHTS_AT_ONCE // (slots * decoder.config.num_attention_heads))
        cuts = [0, *([first] if first else []), *range(first + step, len(ids), step), len(ids)]
        mask = torch.cat([run.context.mask, run.context.mask.new_ones(1, len(ids))], dim=1)
        at = request.question.start
        for start, end in pairwise(cuts):
            _require_wanted(request)
            with engine.memory_errors(run.batch):
                inputs = StepInputs(
                    torch.tensor([ids[start:end]], device=decoder.device),
                    torch.arange(at + start, at + end, device=decoder.device)[None],
                    mask[:, : run.context.mask.shape[1] + end],
                    torch.tensor([0], device=decoder.device),
                    torch.tensor([end - start - 1], device=decoder.device),
                )
                plan.logits(run.context, inputs, attention if start >= first else None)
    finally:
        run.release()
    return attention.shares(spans)


def _log_probabilities(engine: Engine, requests: Sequence[Request], answer: Sequence[int]) -> list[float]:
    """Of ``answer`` in each request; those over nearly the same documents read one fused row."""
    at_once = max(1, LOGITS_AT_ONCE // (len(answer) * engine.backbone.config.vocab_size))
    options = DecodingOptions(max_new_tokens=len(answer))
    found: dict[int, float] = {}
    for start in range(0, len(requests), at_once):
        first = start
        for batch in engine.batches([engine.current(request) for request in requests[start : start + at_once]]):
            for row in batch.rows:  # one at a time, since every row would compute the logits that others ask for
                _require_wanted(requests[0])
                alone = replace(row, members=tuple(range(len(row.members))))
                run = engine.start(Batch(tuple(batch.requests[n] for n in row.members), (alone,)), options)
                numbers = (first + n for n in row.members)
                found |= zip(numbers, _row_log_probabilities(engine, run, answer), strict=True)
            first += len(batch.requests)
    return [found[number] for number in range(len(requests))]


def _row_log_probabilities(engine: Engine, run: Run, answer: Sequence[int]) -> list[float]:
    try:
        questions = [request.question for request in run.batch.requests]
        with engine.memory_errors(run.batch):
            return log_probabilities(engine.plan(run), run.context, questions, answer, visible=engine.visible(run))
    finally:
        run.release()


def _require_wanted(request: Request) -> None:
    """Stop where the task that asked was cancelled; it is told nothing."""
    if request.cancelled.is_set():
        raise CancelledError


def _spans(request: Request) -> list[list[tuple[int, int]]]:
    """Slots (start, end) of the pieces of each of the caller's documents."""
    documents, at = request.reading.documents, len(request.prefix)
    if request.fused is None:
        return [[span] for span in request.spans]
    place = {}
    for piece in request.fused or ():
        place[piece.ids] = (at, at + len(piece.ids))
        at += len(piece.ids)
    return [[place[ids] for ids in dict.fromkeys(document.pieces)] for document in documents]


def _plain(name: str) -> str:
    """A name short enough for an axis, with nothing that matplotlib reads as mathematics."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")
