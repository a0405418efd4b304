"""What a mode means for one model: where documents are positioned, which weights answer, with which attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ContextLimitError
from ..fusion.interface import ApeFactors, FusionModel
from ..fusion.sampling import DecodingOptions
from ..model.positions import global_starts, question_start
from ..schema import Mode, ModeChoice
from ..text.documents import EncodedDocuments
from ..text.measured_mode import Measured
from ..text.reasoning import ReasoningStart
from ..text.settings import ModelSettings, Positions, require_mode

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedDocument:
    """Ids that are prefilled separately, at positions from ``start`` on.

    Attributes:
        key: store key of the KV.
        stored: whether the KV goes into the store. False if its position depends on the question's other documents.
    """

    key: str
    ids: Ids
    start: int
    stored: bool = True


@dataclass(frozen=True, slots=True)
class AnswerMode:
    """A mode with the settings that apply to it. Requests of equal modes can be decoded together.

    Attributes:
        tuned: whether the adapter or the fully tuned decoder answers, if there is one.
        positions: positions of fused documents.
        passage_length: positions reserved for each document, or None for the longest document's length.
        ape: factors of APE, or None for the model's own attention.
        stop: strings that end an answer besides the caller's.
    """

    name: Mode
    tuned: bool
    positions: Positions = "uniform"
    passage_length: int | None = None
    ape: ApeFactors | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: Mode, settings: ModelSettings, evidence_mark: str | None) -> AnswerMode:
        """Return mode ``name`` of a model with these settings.

        Args:
            evidence_mark: text in front of the evidence, if the tuned decoder was trained to give evidence.
        """
        tuned = answers_tuned(name, settings)
        return cls(
            name,
            tuned,
            positions=settings.positions if name == "fusion" else "uniform",
            passage_length=None if name == "ape" else settings.passage_length,
            ape=ApeFactors(settings.ape_temperature, settings.ape_scale) if name == "ape" else None,
            stop=(evidence_mark,) if tuned and evidence_mark is not None else (),
        )

    @property
    def fuses(self) -> bool:
        """Whether documents are prefilled separately and fused; otherwise they are part of the question's prompt."""
        return self.name != "concat"

    @property
    def window_hint(self) -> str:
        """Return advice for a prompt that does not fit into the context window."""
        if not self.fuses:
            return "; modes 'fusion' and 'ape' let documents share positions"
        return "; with positions='uniform' documents share positions" if self.positions == "global" else ""

    def place(self, encoded: EncodedDocuments, *, prefix_tokens: int) -> tuple[tuple[PlacedDocument, ...] | None, int]:
        """Return the documents to prefill, in the order in which they are fused, and the question's first position.

        The documents are None if the mode does not fuse.
        """
        if not self.fuses:
            return None, 0
        if self.positions == "global":
            pieces = encoded.distinct
            *starts, end = global_starts(prefix_tokens, [len(ids) for ids in pieces.values()])
            return tuple(_one_after_another(pieces, starts, prefix_tokens)), end
        placed = tuple(PlacedDocument(key, ids, prefix_tokens) for key, ids in encoded.keys.items())
        return placed, question_start(prefix_tokens, self.passage_length, encoded.longest)


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Maximum tokens of one answer, of the reasoning in front of it, and of the marks around the reasoning."""

    answer: int
    reasoning: int = 0
    marks: int = 0

    @property
    def total(self) -> int:
        return self.answer + self.reasoning + self.marks

    def least(self, options: DecodingOptions) -> int:
        """Return the tokens that are needed if limits that are defaults are lowered as far as possible."""
        return (
            (1 if options.may_shorten else self.answer)
            + (0 if options.may_shorten_reasoning else self.reasoning)
            + self.marks
        )

    def within(self, room: int, options: DecodingOptions) -> TokenLimits:
        """Return the limits with those that are defaults lowered to ``room`` tokens, which are at least ``least``.

        If both are defaults, answer and reasoning get at least half of the room each.
        """
        room -= self.marks
        answer = self.answer
        if options.may_shorten:
            rest = room - self.reasoning
            answer = min(answer, max(1, room // 2, rest) if options.may_shorten_reasoning else rest)
        return TokenLimits(answer, min(self.reasoning, room - answer), self.marks)


def token_limits(
    model: FusionModel,
    mode: AnswerMode,
    options: DecodingOptions,
    reasoning: ReasoningStart | None,
    *,
    before: int,
    question_tokens: int,
) -> TokenLimits:
    """Return the limits of an answer behind ``before`` positions and a question.

    Limits that are defaults are lowered to the room that the window has.

    Args:
        reasoning: the answer's reasoning, or None if it has none.

    Raises:
        ContextLimitError: the window has no room for the limits that the caller set.
    """
    limits = TokenLimits(options.max_new_tokens)
    what = "the answer"
    if reasoning is not None and options.max_reasoning_tokens is not None:
        limits = TokenLimits(options.max_new_tokens, options.max_reasoning_tokens, reasoning.overhead)
        what = "reasoning and answer"
    needed = what, limits.least(options)
    room = _room_left(model, mode, before=before, question_tokens=question_tokens, answer=needed)
    return limits if room is None else limits.within(room, options)


def _room_left(
    model: FusionModel, mode: AnswerMode, *, before: int, question_tokens: int, answer: tuple[str, int]
) -> int | None:
    """Return the tokens that are left behind ``before`` positions and a question; None if unlimited.

    Args:
        answer: what the tokens are for, and how many it needs.

    Raises:
        ContextLimitError: fewer tokens are left.
    """
    window, (name, new_tokens) = model.context_window, answer
    if window is None or before + question_tokens + new_tokens <= window:
        return None if window is None else window - before - question_tokens
    raise ContextLimitError(
        f"prefix and documents take {before} positions, the question {question_tokens} and {name} up to "
        f"{new_tokens}, but {model.model_id} has {model.position_limit}; shorten one of them{mode.window_hint}."
    )


def choose_mode(
    choice: ModeChoice | None, settings: ModelSettings, measured: Callable[[], Measured | None]
) -> tuple[Mode, str]:
    """Return the mode that answers, and the reason for it.

    Args:
        choice: the caller's mode. None and "auto" mean the model's default.
        measured: returns what ``kvfusion doctor --measure`` found best.
    """
    choice = choice or "auto"
    require_mode(choice)
    if choice != "auto":
        return choice, "requested"
    if settings.mode != "auto":
        return settings.mode, "set for this model"
    if settings.tuned:
        return "fusion", "the weights were trained to read fused documents"
    if (best := measured()) is not None:
        return best.mode, "measured best by kvfusion doctor --measure"
    return "concat", "the model was not trained to read fused documents"


def answers_tuned(name: Mode, settings: ModelSettings) -> bool:
    """Return whether the adapter or the tuned decoder, if there is one, answers in mode ``name``."""
    return name == "fusion" or (name == "concat" and settings.tuned_concat)


def _one_after_another(pieces: dict[str, Ids], starts: list[int], prefix_tokens: int) -> Iterator[PlacedDocument]:
    """Yield documents in the caller's order, each behind the one before it (``positions="global"``)."""
    for (key, ids), start in zip(pieces.items(), starts, strict=True):
        is_usual = start == prefix_tokens  # the first document is where uniform positions put it
        yield PlacedDocument(key if is_usual else f"{key}@{start}", ids, start, stored=is_usual)
