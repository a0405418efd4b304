"""Which questions and answers teach something: pure functions on text, each with the reason for a drop."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..data.answer_match import normalize_answer
from ..data.mining import MatchText
from ..data.rows import Passage

FEWEST_WORDS, MOST_WORDS = 4, 40  # of a question
NAMED_SHARE = 0.5  # of a question's content words that stand in its passage
GROUNDED_SHARE = 0.7  # of an answer's new content words that stand in the passage
_COMMON = frozenset([
    "a", "about", "after", "all", "also", "an", "and", "any", "are", "as", "at", "be", "been", "before", "but",
    "by", "can", "could", "did", "do", "does", "for", "from", "had", "has", "have", "he", "her", "his", "how",
    "i", "if", "in", "into", "is", "it", "its", "many", "may", "more", "most", "much", "must", "name", "no",
    "not", "of", "on", "one", "or", "other", "she", "should", "so", "some", "such", "than", "that", "the",
    "their", "them", "then", "there", "these", "they", "this", "those", "to", "under", "up", "was", "we",
    "were", "what", "when", "where", "which", "who", "whom", "whose", "why", "will", "with", "would", "you",
    "your", "yes",
])  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？]")
_TALKS_OF_TEXT = re.compile(r"\b(?:text|passage|paragraph|sentence|following|above|below|author|article)s?\b", re.I)


def question_fault(question: str, passage: Passage, seen: Collection[str]) -> str | None:
    """Why a question that the model wrote is of no use, or None.

    Args:
        seen: questions that were kept, normalised.
    """
    words = question.split()
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS:
        return "question too short or too long"
    if not question.rstrip().endswith(("?", "？", "؟")):
        return "no question mark at its end"
    if _TALKS_OF_TEXT.search(question):
        return "question about the text itself"
    asked = content_words(question)
    if not asked or len(asked & content_words(f"{passage.title or ''} {passage.text}")) < NAMED_SHARE * len(asked):
        return "question does not name what the passage is about"
    if normalize_answer(question) in seen:
        return "question repeated"
    return None


def whole_sentences(answer: str) -> str:
    """An answer that ended at its limit of tokens, up to its last whole sentence; "" without one.

    The base model's distribution is learned at each token, so an answer need not be complete.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
    return answer[: ends[-1]] if ends else ""


def answer_fault(answer: str, question: str, passage: Passage) -> str | None:
    """Why an answer to a useful question is of no use, or None."""
    if not normalize_answer(answer):
        return "answer empty, or without a whole sentence"
    new = own_words(answer, question)
    if not new:
        return "answer only repeats the question"
    if len(new & content_words(f"{passage.title or ''} {passage.text}")) < GROUNDED_SHARE * len(new):
        return "answer not from the passage"
    return None


def says(text: str, answer: str, question: str) -> bool:
    """Whether ``text`` holds every content word of ``answer`` that the question does not have.

    Sentences that only share the question's words with the answer ("The mill was built by ...") do not say it, and
    those that put its words into another sentence do.
    """
    own = own_words(answer, question)
    return bool(own) and own <= content_words(text)


def repeats(answer: str, again: str, question: str, min_f1: float) -> bool:
    """Whether ``again``, given among other passages, says the same as ``answer``: F1 of the words of their own."""
    mine, theirs = own_words(answer, question), own_words(again, question)
    if not mine or not theirs:
        return False
    return says(again, answer, question) or 2 * len(mine & theirs) >= min_f1 * (len(mine) + len(theirs))


def own_words(answer: str, question: str) -> set[str]:
    """Content words of an answer that are not in its question."""
    return content_words(answer) - content_words(question)


def content_words(text: str) -> set[str]:
    """Words that are not among the commonest of English; each sign of a script without spaces is a word."""
    return {word for word in MatchText.of(text).words.split() if word not in _COMMON}
