"""Adds support and found to the answers of a call that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

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
    calibration = engine.settings.support
    if call.min_support is None or calibration is None:
        return list(answers)
    return [_judged(engine, one, calibration, call.min_support) for one in _answered(call, answers)]


def signals_of(engine: Engine[FusionModel], call: Call, answers: Sequence[Answer]) -> list[Signals | None]:
    """Return the signals of each answer; None for an empty one and for one that has no support."""
    return [
        measure_signals(engine, one) if _can_be_supported(one.answer) and one.answer.text.strip() else None
        for one in _answered(call, answers)
    ]


def _judged(
    engine: Engine[FusionModel], answered: Answered, calibration: SupportCalibration, wanted: float | Literal["auto"]
) -> Answer:
    answer, support, used = answered.answer, UNSUPPORTED, calibration
    if not _can_be_supported(answer):
        return answer
    if answer.text.strip():
        signals = measure_signals(engine, answered)
        support, used = calibration.probability(signals), calibration.for_signals(signals)
    return replace(answer, support=support, found=support >= (used.threshold if wanted == "auto" else wanted))


def _can_be_supported(answer: Answer) -> bool:
    """Return whether an answer was read from documents, is complete enough to judge, and calls no tools."""
    is_read = any(source.used for source in answer.sources)
    return is_read and not answer.tool_calls and answer.finish_reason != "cancelled"


def _answered(call: Call, answers: Sequence[Answer]) -> list[Answered]:
    return [Answered(*each) for each in zip(call.questions, call.requests, answers, strict=True)]
