"""Measures which documents an answer came from: the attention each received, and the answer's probability without it.

Both are measured after the answer is known, over the same fused caches: one pass adds up attention, and one computes
the answer's probability with all documents and with each one left out.
"""

from __future__ import annotations

import html
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from ..errors import InvalidInputError, MissingDependencyError
from ..fusion.interface import FusionModel
from ..fusion.sampling import DecodingOptions
from ..plotting.style import COLORS, TEXT, plot_style
from ..schema import Answer, Attributed, Document, Mode
from ..text.json_text import is_a
from .calls import Call, read_call
from .engine import Engine
from .requests import Batch, Request
from .runner import Runner
from .running_batch import FusedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGITS_AT_ONCE = 1 << 27


@dataclass(frozen=True, slots=True)
class Influence:
    """The influence of one document on an answer.

    Attributes:
        attention: mean share of attention, over layers and heads, while the answer's tokens were chosen. The rest up
            to 1 went to prefix, question and answer. Duplicates share one value. None if the engine cannot measure it.
        log_probability: log-probability of the answer without this document.
        effect: how much the document raises the answer's log-probability, in nats. 0 if a duplicate of it remains.
    """

    id: str
    title: str | None
    attention: float | None
    log_probability: float
    effect: float


@dataclass(frozen=True, slots=True, repr=False)
class Attribution:
    """An answer, its natural log-probability with all documents, and the influence of each document.

    ``documents`` are in the caller's order. Effects do not add up if several documents contain the same information.
    """

    question: str
    answer: str
    log_probability: float
    mode: Mode
    documents: tuple[Influence, ...]

    def __repr__(self) -> str:
        best = max(self.documents, key=lambda document: document.effect, default=None)
        most = "" if best is None else f", most={best.id!r} ({best.effect:+.2f} nats)"
        return f"Attribution({self.answer!r}, documents={len(self.documents)}{most})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw two bars per document: its effect (nats) and, if measured, its share of attention (%).

        Each has its own scale, and both have their zero at the same place. The title contains the question and the
        answer, shortened.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        if find_spec("matplotlib") is None:
            raise MissingDependencyError.of_extra("a plot", "matplotlib", "evaluation")
        with plot_style():
            return self._draw(axes)

    def _draw(self, axes: Any) -> Axes:  # Any, because matplotlib's own types are incomplete
        from matplotlib import pyplot

        heading = "\n".join([*_lines(f"Question: {self.question}"), *_lines(f"Answer: {self.answer}")])
        if axes is None:
            size = (7.0, 2.0 + 0.42 * len(self.documents))
            figure, axes = cast(Any, pyplot).subplots(figsize=size, layout="constrained")
            figure.suptitle(heading, x=0.01, ha="left", fontsize=9)
        else:
            axes.set_title(heading, loc="left", fontsize=9)
        places = range(len(self.documents))
        effects = [document.effect for document in self.documents]
        left = axes.barh([y - 0.2 for y in places], effects, 0.38, color=COLORS[0])
        names = [_plain(document.title or document.id) for document in self.documents]
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.set_xlabel("effect on the answer's log-probability, nats")
        shares = [100 * d.attention for d in self.documents if d.attention is not None]
        if len(shares) < len(self.documents):
            return axes
        shared = axes.twiny()
        right = shared.barh([y + 0.2 for y in places], shares, 0.38, color=COLORS[4])
        shared.set_xlabel("share of attention, %")
        _join_zeros(axes, shared, effects, shares)
        shared.legend([left, right], ["effect", "attention"], loc="best")
        return axes

    def _repr_html_(self) -> str:
        """Return HTML for notebooks. Documents and answers are untrusted text, so everything is escaped."""
        rows = "".join(
            f"<tr><td>{html.escape(d.id)}</td><td>{html.escape(d.title or '')}</td><td>{d.effect:+.2f}</td>"
            f"<td>{'' if d.attention is None else f'{100 * d.attention:.1f} %'}</td></tr>"
            for d in self.documents
        )
        return (
            f"<p>{html.escape(self.question)}<br><b>{html.escape(self.answer)}</b> "
            f"<small>({self.mode}, log-probability {self.log_probability:.2f})</small></p>"
            f"<table><tr><th>document</th><th>title</th><th>effect, nats</th><th>attention</th></tr>{rows}</table>"
        )


def with_attribution(engine: Engine[FusionModel], request: Request, answer: Answer, kind: Attributed) -> Answer:
    """Return ``answer`` with attention shares and, for "effects", effects in its sources.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced by an explicit one.
    """
    runner = engine.runner
    request = runner.prepare(request, DecodingOptions(max_new_tokens=len(answer.token_ids)))
    if kind == "attention":
        shares = attention_shares(runner, request, answer.token_ids)
        measured = [{"attention": share} for share in shares]
    else:
        _, found = _influences(engine, request, answer.token_ids)
        measured = [{"attention": influence.attention, "effect": influence.effect} for influence in found]
    unused = {"attention": 0.0 if runner.model.capabilities.attention else None}
    unused["effect"] = None if kind == "attention" else 0.0
    sources = [replace(source, **unused) for source in answer.sources]
    numbers = range(len(request.encoded.documents)) if request.choice is None else request.choice.kept
    for number, facts in zip(numbers, measured, strict=True):
        sources[number] = replace(sources[number], **facts)
    return replace(answer, sources=tuple(sources))


def attributed(engine: Engine[FusionModel], call: Call, answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers of a call with the attribution that it asks for, if any, in their sources."""
    kind = call.attribution
    if kind is None:
        return list(answers)
    pairs = zip(call.requests, answers, strict=True)
    return [with_attribution(engine, request, answer, kind) for request, answer in pairs]


def attribute_call(
    engine: Engine[FusionModel],
    question: str,
    documents: Sequence[Document | str],
    answer: Answer | str,
    options: Mapping[str, Any],
) -> Attribution:
    """Attribute an answer of the generator or a text (``KVFusionGenerator.attribute``).

    Raises:
        InvalidInputError: ``answer`` is of the wrong type or has no tokens.
        UnsupportedModelError: the model's attention cannot be replaced by an explicit one.
    """
    if isinstance(answer, Answer):
        ids, text = answer.token_ids, answer.text
        options = {**options, "mode": options.get("mode") or answer.mode}
    elif is_a(answer, str):
        end = engine.model.end_id
        ids, text = (*engine.encoder.encode_answer(answer), *([] if end is None else [end])), answer
    else:
        raise InvalidInputError(f"the answer is {answer!r}, but it must be an Answer, a text or None.")
    if not ids:
        raise InvalidInputError("the answer has no tokens, so no document can have caused it.")
    [request] = read_call(engine, question, documents, {**options, "max_new_tokens": len(ids)}).requests
    if isinstance(answer, str) and (start := request.layout.reasoning) is not None:
        ids = (*start.closing(), *ids)  # a text is an answer, not the beginning of reasoning
    whole, influences = _influences(engine, request, ids)
    return Attribution(question, text, whole, request.mode.name, influences)


def _influences(
    engine: Engine[FusionModel], request: Request, answer: Sequence[int]
) -> tuple[float, tuple[Influence, ...]]:
    """Return the log-probability of ``answer`` (ids) with all documents of ``request``, and each document's influence.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced by an explicit one.
    """
    runner = engine.runner
    if runner.model.capabilities.attention:
        engine.require_explicit_attention()
    options, began = DecodingOptions(max_new_tokens=len(answer)), time.perf_counter()
    request = runner.prepare(request, options)  # variants use its keys, so they must be current
    documents = request.encoded.documents
    # In canonical order, because a variant's place in its batch affects rounding.
    filled = sorted(
        (number for number, document in enumerate(documents) if document.pieces), key=lambda n: documents[n].pieces
    )
    variants = {
        number: runner.request_for(
            request.encoded.without(number), request.layout, request.mode, request.namespace, options, began
        )
        for number in filled
    }
    if request.fused is not None:  # removing a document whose duplicate remains changes nothing
        variants = {number: variant for number, variant in variants.items() if variant.fused != request.fused}
    whole, *others = _log_probabilities(runner, [request, *variants.values()], answer)
    log_probability_without = dict(zip(variants, others, strict=True))
    shares: Sequence[float | None] = [None] * len(documents)
    if runner.model.capabilities.attention:
        shares = attention_shares(runner, request, answer)
    influences = tuple(
        Influence(document.id, document.document.title, share, without, whole - without)
        for n, (document, share) in enumerate(zip(documents, shares, strict=True))
        for without in [log_probability_without.get(n, whole)]
    )
    return whole, influences


def attention_shares(runner: Runner[FusionModel], request: Request, answer: Sequence[int]) -> list[float]:
    """Return each document's mean share, over layers and heads, of the attention that chose the answer's tokens."""
    request = runner.prepare(request, DecodingOptions(max_new_tokens=len(answer)))
    run = runner.start(Batch.of(request))
    try:
        with runner.memory_errors(run.batch):
            return runner.model.attention_shares(
                run.plan,
                run.context,
                request.question,
                answer,
                _spans(request),
                before_pass=lambda: _raise_if_cancelled(request),
            )
    finally:
        run.release()


def _log_probabilities(runner: Runner[FusionModel], requests: Sequence[Request], answer: Sequence[int]) -> list[float]:
    """Return the log-probability of ``answer`` in each request. Requests over similar documents share a row."""
    at_once = max(1, LOGITS_AT_ONCE // (len(answer) * runner.model.vocabulary_size))
    found: dict[int, float] = {}
    for start in range(0, len(requests), at_once):
        first = start
        for batch in runner.batches([runner.current(request) for request in requests[start : start + at_once]]):
            for row in batch.rows:  # one row at a time: every row computes logits at the columns of all rows
                _raise_if_cancelled(requests[0])
                only_row = replace(row, members=tuple(range(len(row.members))))
                run = runner.start(Batch(tuple(batch.requests[n] for n in row.members), (only_row,)))
                numbers = (first + n for n in row.members)
                found |= zip(numbers, _row_log_probabilities(runner, run, answer), strict=True)
            first += len(batch.requests)
    return [found[number] for number in range(len(requests))]


def _row_log_probabilities(runner: Runner[FusionModel], run: FusedRun, answer: Sequence[int]) -> list[float]:
    try:
        questions = [request.question for request in run.batch.requests]
        with runner.memory_errors(run.batch):
            return runner.model.answer_likelihoods(run.plan, run.context, questions, answer, visible=run.visible())
    finally:
        run.release()


def _raise_if_cancelled(request: Request) -> None:
    if request.cancelled.is_set():
        raise CancelledError


def _spans(request: Request) -> list[list[tuple[int, int]]]:
    """Return the slots (start, end) of the pieces of each of the caller's documents."""
    documents, at = request.encoded.documents, len(request.scope.prefix)
    if request.fused is None:
        return [[span] for span in request.spans]
    slots = {}
    for piece in request.fused:
        slots[piece.ids] = (at, at + len(piece.ids))
        at += len(piece.ids)
    return [[slots[ids] for ids in dict.fromkeys(document.pieces)] for document in documents]


def _plain(name: str) -> str:
    """Return a name that is short enough for an axis and contains no mathematics for matplotlib."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")


def _lines(text: str) -> list[str]:
    """Return ``text`` as at most three short lines without mathematics for matplotlib."""
    return textwrap.wrap(text.replace("$", r"\$"), width=70, max_lines=3, placeholder=" …")


def _join_zeros(axes: Any, shared: Any, effects: Sequence[float], shares: Sequence[float]) -> None:
    """Put the zeros of both scales at the same place, and label only one of them."""
    low, high = 1.1 * min([0.0, *effects]), 1.1 * max([0.0, *effects])
    high = max(high, -low / 4, 0.01)  # attention needs room to the right
    scale = 1.1 * max([1.0, *shares]) / high
    axes.set_xlim(low, high)
    shared.set_xlim(low * scale, high * scale)
    shared.set_xticks([tick for tick in shared.get_xticks() if 0 < tick <= high * scale])
