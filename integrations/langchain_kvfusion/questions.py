"""Finds the bare question in a complete prompt, by labels or else by paragraphs.

A model trained on bare questions must not read instructions. Prompts with a question variable do not need this.
"""

from __future__ import annotations

import re

_QUESTION_LABEL = re.compile(r"(?<!\w)(?:question|query|q)\s*:[*_]*", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"^\W*(?:\w+ )?(?:answer|a)\s*:", re.IGNORECASE)
_ANSWER_AT_END = re.compile(r"(?<!\w)(?:(?:helpful|final|short|your) )?(?:answer|a)\s*:\W*$", re.IGNORECASE)
_LINE_AND_NEXT = re.compile(r"([^\r\n]*)\s*([^\r\n]*)")  # the rest of the line, and the next line that is not blank
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def bare_question(text: str) -> str:
    """Return the question in a prompt from which the documents have been removed.

    It is the text after the last label "Question:", "Query:" or "Q:" up to an answer label or the end of the line. If
    the label has a line to itself, it is the next line. Without such a label it is the last paragraph that is not
    empty, without an answer label ("Answer:", "Helpful Answer:", "A:") at its end, or else the whole text.
    """
    labelled = labelled_question(text)
    if labelled is not None:
        return labelled
    for paragraph in reversed(_PARAGRAPH_BREAK.split(text)):
        lines = paragraph.strip().splitlines()
        while lines and not _question_on(lines[-1]):
            lines.pop()
        if lines:
            return "\n".join([*lines[:-1], _question_on(lines[-1])]).strip()
    return text.strip()


def labelled_question(text: str) -> str | None:
    """Return the text after the last question label that is followed by a question, or None if there is none."""
    for label in reversed(list(_QUESTION_LABEL.finditer(text))):
        line, following = _LINE_AND_NEXT.match(text, label.end()).groups()  # type: ignore[union-attr] # matches all
        question = _question_on(line) or _question_on(following)
        if question:
            return question
    return None


def _question_on(line: str) -> str:
    """Return the part of ``line`` before an answer label, which is empty if the line begins with one."""
    if _ANSWER_LINE.match(line):
        return ""
    return _ANSWER_AT_END.sub("", line).strip()
