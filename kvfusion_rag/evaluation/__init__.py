"""Measures how well systems answer questions: metrics, and the harness of ``kvfusion evaluate``.

Rows and systems come in. Figures with intervals go out, as a report, tables and plots. ``orders`` decides which
documents are given in which order, ``systems`` defines what is compared, and ``ape`` searches APE's temperature and
scale. ``runner`` asks the questions, ``journal`` records the ``predictions``, ``summary`` and ``bootstrap`` compute
figures, and ``report``, ``tables`` and ``plots`` show them. ``modes`` finds a model's best mode. The room must not
know how models are loaded or trained.
"""

from ..data.answer_match import answer_in_text, exact_match, normalize_answer, token_f1

__all__ = ["answer_in_text", "exact_match", "normalize_answer", "token_f1"]
