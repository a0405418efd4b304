"""Keeps questions and contexts of evaluation files out of training rows.

Passages of evaluation rows are often truncated, and training contexts are cut later, so contexts are compared by
containment.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from .answer_match import normalize_answer
from .formats import Example
from .mining import text_key

RUN, STEP = 5, 4  # words per run, and from one indexed run of an excluded context to the next
SHORTEST = RUN + STEP - 1  # words; a part of an excluded context with this many words always contains an indexed run


class Exclusion:
    """Index of the questions and contexts of evaluation files."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._questions: set[bytes] = set()
        self._contexts: dict[str, int] = {}  # numbers of normalised contexts
        self._judged: dict[bytes, bool] = {}
        hashes, owners = array("q"), array("q")
        for example in examples:
            self._questions.add(text_key(example.question))
            for passage in example.passages:
                text = normalize_answer(passage.text)
                if text not in self._contexts:
                    kept = _runs(text, STEP)
                    hashes.extend(kept)
                    owners.extend([len(self._contexts)] * len(kept))
                    self._contexts[text] = len(self._contexts)
        self._texts = list(self._contexts)
        order = np.argsort(np.asarray(hashes), kind="stable")
        self._hashes, self._owners = np.asarray(hashes)[order], np.asarray(owners)[order]

    def has_question(self, key: bytes) -> bool:
        """Return whether the question with this ``text_key`` is excluded."""
        return key in self._questions

    def has_context(self, key: bytes, text: str) -> bool:
        """Return whether ``text``, with this ``text_key``, is an excluded context, contains one or is part of one.

        Texts of fewer than ``SHORTEST`` words, such as a name, only match whole contexts.
        """
        if key not in self._judged:  # one context comes with many questions
            normal = normalize_answer(text)
            self._judged[key] = normal in self._contexts or any(
                other in normal or normal in other for other in self._near(normal)
            )
        return self._judged[key]

    def _near(self, normal: str) -> list[str]:
        """Return the excluded contexts that share a run of words with a text."""
        runs = _runs(normal, 1)
        first, last = (np.searchsorted(self._hashes, runs, side) for side in ("left", "right"))
        numbers = {n for start, end in zip(first, last, strict=True) for n in self._owners[start:end].tolist()}
        return [self._texts[n] for n in numbers]


def _runs(normal: str, step: int) -> list[int]:
    """Return the hashes of the runs that start at every ``step``-th word, or none if the text is too short."""
    words = normal.split()
    if len(words) < SHORTEST:
        return []
    return [hash(tuple(words[n : n + RUN])) for n in range(0, len(words) - RUN + 1, step)]
