"""Measures how well systems answer questions: metrics, and the harness of ``kvfusion evaluate``.

Rows and systems enter, and figures with intervals leave, as a report, tables and plots. ``orders`` decides which
documents are given in which order, ``systems`` what is compared, and ``ape`` searches APE's factors. ``runner`` asks,
``journal`` records ``predictions``, ``summary`` and ``bootstrap`` compute figures, and ``report``, ``tables`` and
``plots`` show them. ``modes`` finds a model's best mode. The room must not know how models are loaded or trained.
"""

from ..data.answer_match import answer_in_text, exact_match, normalize_answer, token_f1

__all__ = ["answer_in_text", "exact_match", "normalize_answer", "token_f1"]
