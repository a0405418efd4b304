"""How ``kvfusion ask`` shows an answer: for people, and as plain data for scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .console import say, shown_path

if TYPE_CHECKING:
    from .. import Answer, Attribution, Document, InvarianceReport

_SENTENCE_BORDER = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
MAX_SENTENCE_CHARACTERS = 300


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Borders of the sentence or paragraph of ``text`` that holds ``text[start:end]``, a long one shortened."""
    before = [border.end() for border in _SENTENCE_BORDER.finditer(text, 0, start)]
    after = _SENTENCE_BORDER.search(text, end)
    half = MAX_SENTENCE_CHARACTERS // 2
    return (max(before[-1] if before else 0, start - half), min(after.start() if after else len(text), end + half))


def answer_to_json(
    answer: Answer, documents: Sequence[Document], shuffle_check: InvarianceReport | None
) -> dict[str, Any]:
    """Return the answer as plain data: ``answer`` in the source's spelling, ``text`` in the model's words."""
    cited = {citation.document_id for citation in answer.citations}
    texts = {document.id: document.text for document in documents}
    data = answer.to_dict()
    for source in data["sources"]:
        source["cited"] = source["id"] in cited
    for citation in data["citations"]:
        text = texts[citation["document_id"]]
        start, end = sentence_around(text, citation["start"], citation["end"])
        citation["sentence"] = text[start:end]
    return {
        "answer": answer.cited_text,
        **data,
        "shuffle_check": None if shuffle_check is None else shuffle_check.to_dict(),
    }


def say_answer(answer: Answer) -> None:
    """The answer as its source spells it, and the model's own words where they differ."""
    say(answer.cited_text.strip() or "(no answer)")
    if answer.cited_text.strip() != answer.text.strip():
        say(f"  in the model's own words: {answer.text.strip()}")


def say_spelling(answer: Answer) -> None:
    """After a stream has shown the model's own words: the source's spelling where it differs."""
    if answer.cited_text.strip() != answer.text.strip():
        say(f"  as the source spells it: {answer.cited_text.strip()}")


def say_sources(answer: Answer, question: str, documents: Sequence[Document]) -> None:
    """Every document with its place; those that hold the answer, or most of its words, are quoted.

    If focus chose among them, each one has its score, and those that it left out are marked.
    """
    from ..text.citations import find_shared_phrases

    head, found = "sources (* holds the answer)", answer.citations
    if not found:
        pairs = zip(answer.sources, documents, strict=True)
        named = [(source.id, document) for source, document in pairs if source.used]
        found = find_shared_phrases(answer.text, question, named)
        head = (
            "sources (* shares most words with the answer)"
            if found
            else "sources (none holds the answer word for word)"
        )
    citations = {citation.document_id: citation for citation in found}
    has_scores = any(source.focus_score is not None for source in answer.sources)
    say()
    say(f"{head}, each with its focus score" if has_scores else head)
    for source, document in zip(answer.sources, documents, strict=True):
        citation = citations.get(source.id)
        place = f"{shown_path(document.metadata['source'])}, part {document.metadata['chunk']}"
        same = f", same text as {source.duplicate_of}" if source.duplicate_of else ""
        score = f"{_score(source.focus_score)}  " if has_scores else ""
        left_out = "" if source.used else ", left out"
        say(f"  {'*' if citation else ' '} {score}{source.title} ({place}{same}{left_out})")
        if citation is not None:
            start, end = sentence_around(document.text, citation.start, citation.end)
            quote = f"{document.text[start : citation.start]}»{citation.text}«{document.text[citation.end : end]}"
            say(f"      {' '.join(quote.split())}")


def say_facts(answer: Answer) -> None:
    """One line on mode, documents and times, and one more if the answer was cut."""
    usage, timings = answer.usage, answer.timings
    count = len(answer.sources)
    used = sum(source.used for source in answer.sources)
    kept = "" if used == count else f"{used} of "
    say()
    say(
        f"mode {answer.mode} · {kept}{count} document{'s' * (count != 1)} ({usage.document_tokens} tokens, "
        f"{usage.cached_document_tokens} from the store) · prefill {timings.prefill:.2f} s, "
        f"first token {timings.first_token:.2f} s, total {timings.total:.2f} s"
    )
    if answer.finish_reason == "length":
        say(f"the answer was cut at {usage.completion_tokens} tokens; --max-new-tokens raises the limit")


def say_attribution(attribution: Attribution) -> None:
    """What the answer gains in log-probability by each document, and the attention it got; the greatest gain first."""
    say()
    say(f"attribution (the answer's log-probability is {attribution.log_probability:.2f})")
    for influence in sorted(attribution.documents, key=lambda document: -document.effect):
        say(f"  {influence.effect:+7.2f}  {influence.attention:6.1%} of attention  {influence.title or influence.id}")


def _score(score: float | None) -> str:
    return f"{score:8.2f}" if score is not None else " " * 8


def say_shuffle_check(report: InvarianceReport) -> None:
    """Whether the order of the documents made any difference."""
    count = f"{report.permutations} other order{'s' * (report.permutations != 1)} of the documents"
    if report.identical:
        say(f"shuffle check: {count}, identical answer bytes, identical logits")
        return
    bytes_word = "identical" if len(report.answers) == 1 else "different"
    say(
        f"shuffle check: {count}, {bytes_word} answer bytes, different logits (by up to "
        f"{report.max_logit_difference:.3g})"
    )
    for text in report.answers:
        say(f"  - {text}")
