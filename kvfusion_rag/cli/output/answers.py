"""Output of ``kvfusion ask``: text for people, and JSON data for scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...text.citations import narrowed_place
from ...text.sentences import sentence_spans
from ..console import say, shown_path

if TYPE_CHECKING:
    from ... import Answer, AnswerPiece, Attribution, Document, InvarianceReport

MAX_SENTENCE_CHARACTERS = 300


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Return start and end of the sentence or paragraph around ``text[start:end]``, shortened if it is long."""
    spans = sentence_spans(text)
    first = max(begin for begin, _ in spans if begin <= start)
    last = first + len(text[first : min(stop for _, stop in spans if stop >= end)].rstrip())
    half = MAX_SENTENCE_CHARACTERS // 2
    return max(first, start - half), min(max(last, end), end + half)


def answer_to_json(
    answer: Answer, documents: Sequence[Document], shuffle_check: InvarianceReport | None
) -> dict[str, Any]:
    """Return the answer as plain data: ``answer`` in the source's spelling, ``text`` in the model's words."""
    cited = {citation.document_id for citation in answer.citations}
    by_id = {document.id: document for document in documents}
    data = answer.to_dict()
    for source in data["sources"]:
        source["cited"] = source["id"] in cited
    for citation in data["citations"]:
        text = by_id[citation["document_id"]].text
        start, end = sentence_around(text, citation["start"], citation["end"])
        citation["sentence"] = text[start:end]
        citation["place"] = place_of(by_id[citation["document_id"]], citation["start"])
    return {
        "answer": answer.cited_text,
        **data,
        "shuffle_check": None if shuffle_check is None else shuffle_check.to_dict(),
    }


def say_answer(answer: Answer) -> None:
    """Print the answer in its source's spelling, and in the model's words if they differ."""
    say(answer.cited_text.strip() or "(no answer)")
    if answer.cited_text.strip() != answer.text.strip():
        say(f"  in the model's words: {answer.text.strip()}")


def say_notice(answer: Answer) -> None:
    """Print that the answer was probably not found in the documents, if it was measured and was not."""
    if answer.notice is not None:
        say(f"  not found: {answer.notice}")


def say_reasoning(answer: Answer) -> None:
    """Print what the model wrote in front of its answer, and a blank line."""
    if answer.reasoning is not None:
        say(f"{answer.reasoning}\n")


def say_pieces(pieces: Iterable[AnswerPiece], *, show_reasoning: bool) -> None:
    """Print a streamed answer while it is computed, with or without its reasoning, which ends with a blank line."""
    is_open = False  # the line has reasoning on it
    for piece in pieces:
        if piece.is_reasoning and not show_reasoning:
            continue
        if is_open and not piece.is_reasoning:
            say("\n")
        is_open = piece.is_reasoning
        say(piece.text, end="")
    say()


def say_spelling(answer: Answer) -> None:
    """Print the source's spelling if it differs from the streamed answer."""
    if answer.cited_text.strip() != answer.text.strip():
        say(f"  in the source's spelling: {answer.cited_text.strip()}")


def say_sources(answer: Answer, question: str, documents: Sequence[Document]) -> None:
    """Print every document, and quote those that contain the answer, or else most of its words.

    If focus chose among the documents, print their scores and mark those that it dropped.
    """
    from ...text.citations import find_shared_phrases

    head, citations = "sources (* contains the answer)", answer.citations
    pairs = list(zip(answer.sources, documents, strict=True))
    if not citations:
        used = [(source.id, document) for source, document in pairs if source.used]
        citations = find_shared_phrases(answer.text, question, used)
        head = "sources (* shares the most words with the answer)" if citations else "sources (none has the answer)"
    by_document = {citation.document_id: citation for citation in citations}
    has_scores = any(source.focus_score is not None for source in answer.sources)
    say()
    say(f"{head}, with focus scores" if has_scores else head)
    for source, document in pairs:
        citation = by_document.get(source.id)
        place = f"{shown_path(document.metadata['source'])}, {place_of(document, citation and citation.start)}"
        same = f", same text as {source.duplicate_of}" if source.duplicate_of else ""
        score = f"{'' if source.focus_score is None else format(source.focus_score, '.2f'):>8}  " if has_scores else ""
        dropped = "" if source.used else ", dropped"
        say(f"  {'*' if citation else ' '} {score}{source.title} ({place}{same}{dropped})")
        if citation is not None:
            start, end = sentence_around(document.text, citation.start, citation.end)
            quote = f"{document.text[start : citation.start]}»{citation.text}«{document.text[citation.end : end]}"
            say(f"      {' '.join(quote.split())}")


def place_of(document: Document, start: int | None) -> str:
    """Return the place of a chunk in its file, or that of its character ``start``, as a reader would write it."""
    place = document.metadata.get("place")
    if place is None:
        return f"part {document.metadata['chunk']}"
    return place if start is None else narrowed_place(place, document.text, start)


def say_facts(answer: Answer) -> None:
    """Print mode, documents and times, and a note if the answer was cut off."""
    usage, timings = answer.usage, answer.timings
    count = len(answer.sources)
    used = sum(source.used for source in answer.sources)
    of = "" if used == count else f"{used} of "
    say()
    thought = f" · {usage.reasoning_tokens} tokens of reasoning" if usage.reasoning_tokens else ""
    say(
        f"mode {answer.mode} · {of}{count} document{'s' * (count != 1)} ({usage.document_tokens} tokens, "
        f"{usage.cached_document_tokens} from the store){thought} · prefill {timings.prefill:.2f} s, "
        f"first token {timings.first_token:.2f} s, total {timings.total:.2f} s"
    )
    if answer.finish_reason == "length":
        length = usage.completion_tokens - usage.reasoning_tokens
        say(f"the answer was cut off at {length} tokens; raise the limit with --max-new-tokens")


def say_attribution(attribution: Attribution) -> None:
    """Print how much each document raises the answer's log-probability, and its share of attention, largest first."""
    say()
    say(f"attribution (the answer's log-probability is {attribution.log_probability:.2f})")
    for influence in sorted(attribution.documents, key=lambda document: -document.effect):
        share = "" if influence.attention is None else f"{influence.attention:6.1%} of attention  "
        say(f"  {influence.effect:+7.2f}  {share}{influence.title or influence.id}")


def say_shuffle_check(report: InvarianceReport) -> None:
    """Print whether the order of the documents changed the answer or its logits."""
    count = f"{report.permutations} other order{'s' * (report.permutations != 1)} of the documents"
    if report.identical:
        say(f"shuffle check: {count}, identical answers, identical logits")
        return
    answers = "identical" if len(report.answers) == 1 else "different"
    say(f"shuffle check: {count}, {answers} answers, different logits (by up to {report.max_logit_difference:.3g})")
    for text in report.answers:
        say(f"  - {text}")
