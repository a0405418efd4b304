"""Decides which questions and answers are useful for training, and why the others are dropped."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..data.answer_match import normalize_answer
from ..data.mining import MatchText
from ..data.rows import Passage

FEWEST_WORDS, MOST_WORDS = 4, 40  # words of a question
NAMED_SHARE = 0.5  # minimum share of a question's content words that are in its passage
GROUNDED_SHARE = 0.7  # minimum share of an answer's new content words that are in the passage
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
_MENTIONS_TEXT = re.compile(r"\b(?:text|passage|paragraph|sentence|following|above|below|author|article)s?\b", re.I)


def question_fault(question: str, passage: Passage, seen: Collection[str]) -> str | None:
    """Return why a question that the model wrote is not useful, or None.

    Args:
        seen: normalised questions that were kept.
    """
    words = question.split()
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS:
        return "question too short or too long"
    if not question.rstrip().endswith(("?", "？", "؟")):
        return "no question mark at its end"
    if _MENTIONS_TEXT.search(question):
        return "question about the text itself"
    own = content_words(question)
    if not own or len(own & content_words(f"{passage.title or ''} {passage.text}")) < NAMED_SHARE * len(own):
        return "question does not name what the passage is about"
    if normalize_answer(question) in seen:
        return "question repeated"
    return None


def whole_sentences(answer: str) -> str:
    """Return a truncated answer up to the end of its last complete sentence, or "" if there is none.

    An answer need not be complete, since the base model's distribution is learned at each token.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
    return answer[: ends[-1]] if ends else ""


def answer_fault(answer: str, question: str, passage: Passage) -> str | None:
    """Return why an answer to a useful question is not useful, or None."""
    if not normalize_answer(answer):
        return "answer empty or without a complete sentence"
    new = own_words(answer, question)
    if not new:
        return "answer only repeats the question"
    if len(new & content_words(f"{passage.title or ''} {passage.text}")) < GROUNDED_SHARE * len(new):
        return "answer not from the passage"
    return None


def says(text: str, answer: str, question: str) -> bool:
    """Return whether ``text`` contains every content word of ``answer`` that is not in the question.

    The question's words do not count ("The mill was built by ..."), and the wording of the sentence does not matter.
    """
    own = own_words(answer, question)
    return bool(own) and own <= content_words(text)


def repeats(answer: str, again: str, question: str, min_f1: float) -> bool:
    """Return whether ``again`` says the same as ``answer``, or their own words have at least ``min_f1``."""
    first, second = own_words(answer, question), own_words(again, question)
    if not first or not second:
        return False
    return says(again, answer, question) or 2 * len(first & second) >= min_f1 * (len(first) + len(second))


def own_words(answer: str, question: str) -> set[str]:
    """Return the content words of an answer that are not in its question."""
    return content_words(answer) - content_words(question)


def content_words(text: str) -> set[str]:
    """Return the words except the most common English ones. Each character of a script without spaces is a word."""
    return {word for word in MatchText.of(text).words.split() if word not in _COMMON}
