"""Which part of a finished wording is the bare question: labels first, then the shape of the text.

Needed because a model trained on bare questions must not read instructions. Templates that name their question
variable never come here. Pure functions of a string.
"""

from __future__ import annotations

import re

_QUESTION_LABEL = re.compile(r"(?<!\w)(?:question|query|q)\s*:[*_]*", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"^\W*(?:\w+ )?(?:answer|a)\s*:", re.IGNORECASE)
_ANSWER_AT_END = re.compile(r"(?<!\w)(?:(?:helpful|final|short|your) )?(?:answer|a)\s*:\W*$", re.IGNORECASE)
_LINE_AND_NEXT = re.compile(r"([^\r\n]*)\s*([^\r\n]*)")  # the rest of a line, and the next one that is not blank
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def bare_question(text: str) -> str:
    """The question inside a complete wording (documents already taken out).

    The text after the last "Question:", "Query:" or "Q:" label, up to an answer label or the line's end (the
    next line where the label stands alone). Without such a label: the last paragraph that is not empty,
    less a closing answer label ("Answer:", "Helpful Answer:", "A:"). Text without either is its own question.
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
    """The question after the last question label that has one, or None where no label says which it is."""
    for label in reversed(list(_QUESTION_LABEL.finditer(text))):
        line, following = _LINE_AND_NEXT.match(text, label.end()).groups()  # type: ignore[union-attr] # matches all
        question = _question_on(line) or _question_on(following)
        if question:
            return question
    return None


def _question_on(line: str) -> str:
    """The part of ``line`` before an answer label; empty where the line is an answer label."""
    if _ANSWER_LINE.match(line):
        return ""
    return _ANSWER_AT_END.sub("", line).strip()
