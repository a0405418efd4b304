"""Adds support and found to the answers of a call that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...fusion.interface import FusionModel
from ...schema import Answer
from ...text.support import Signals, SupportCalibration
from ..calls import Call
from ..engine import Engine
from .signals import Answered, measure_signals

UNSUPPORTED = 0.0  # support of an empty answer


def judged(engine: Engine[FusionModel], call: Call, answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers with their support, or unchanged if the call has no ``min_support``.

    An empty answer has support 0. Calls of tools and answers without documents have none.
    """
    threshold, calibration = call.min_support, engine.settings.support
    if threshold is None or calibration is None:
        return list(answers)
    supports = [_support(engine, one, calibration) for one in _answered(call, answers)]
    return [
        answer if support is None else replace(answer, support=support, found=support >= threshold)
        for answer, support in zip(answers, supports, strict=True)
    ]


def signals_of(engine: Engine[FusionModel], call: Call, answers: Sequence[Answer]) -> list[Signals | None]:
    """Return the signals of each answer; None for an empty one and for one that has no support."""
    return [
        measure_signals(engine, one) if _can_be_supported(one.answer) and one.answer.text.strip() else None
        for one in _answered(call, answers)
    ]


def _support(engine: Engine[FusionModel], answered: Answered, calibration: SupportCalibration) -> float | None:
    if not _can_be_supported(answered.answer):
        return None
    if not answered.answer.text.strip():
        return UNSUPPORTED
    return calibration.probability(measure_signals(engine, answered))


def _can_be_supported(answer: Answer) -> bool:
    """Return whether an answer was read from documents, is complete enough to judge, and calls no tools."""
    is_read = any(source.used for source in answer.sources)
    return is_read and not answer.tool_calls and answer.finish_reason != "cancelled"


def _answered(call: Call, answers: Sequence[Answer]) -> list[Answered]:
    return [Answered(*each) for each in zip(call.questions, call.requests, answers, strict=True)]
