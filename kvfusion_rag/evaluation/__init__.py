"""Judging answers: the metrics of open-domain question answering, and the harness of ``kvfusion evaluate``.

The metrics are imported from here. The harness is imported by module: ``orders`` (which documents in which order),
``systems`` (what is judged), ``ape`` (the search for its factors), ``runner`` (asking), ``summary`` and ``bootstrap``
(figures and intervals), ``report``, ``tables`` and ``plots`` (showing them), ``speed`` and ``store_speed`` (times).
"""

from ..data.answer_match import answer_in_text, exact_match, normalize_answer, token_f1

__all__ = ["answer_in_text", "exact_match", "normalize_answer", "token_f1"]
