"""Judging answers: the metrics of open-domain question answering."""

from .metrics import answer_in_text, exact_match, normalize_answer, token_f1

__all__ = ["answer_in_text", "exact_match", "normalize_answer", "token_f1"]
