"""Reads the arguments of a generator's calls: questions, documents and options become requests."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, cast, get_args

from ..errors import InvalidInputError
from ..fusion.interface import FusionModel
from ..fusion.sampling import DecodingKwargs, DecodingOptions, decoding_options
from ..option_names import UnknownOptionError
from ..schema import Attributed, Document, FocusChoice, ModeChoice, Prompt, Tool
from ..text.answer_format import AnswerFormat, ResponseFormat
from ..text.json_text import is_sequence
from ..text.support import MinSupport, checked_min_support
from ..text.tools.definitions import ToolUse
from .engine import Engine
from .requests import Request


class WordingKwargs(TypedDict, total=False):
    """How a question is read.

    Attributes:
        prompt: the caller's complete wording without the documents, which models that follow instructions read instead
            of the question: a text, or the messages of a conversation. ``Message.documents``
            marks the place of the documents; by default they open the first user message.
        mode: "fusion"; "concat" (the ordinary joined prompt in the caller's order, in which the adapter only takes
            part if it was trained on joined prompts); "ape" (training-free fusion without adapter, arXiv 2502.05431);
            "auto" (``ModelSettings``).
        focus: keep this many documents, those that make the question most likely (and that the retriever scores
            highest, if the model's ``focus_weight`` is above 0). None keeps all, as in the paper. "auto" is the
            model's own number.
        chat_template_kwargs: variables of the model's chat template for this call.
        tools: functions that the model is told of and may call (``Answer.tool_calls``).
        tool_choice: "auto" (text or calls), "none", "required" (a call), or the name of the tool to call.
    """

    prompt: Prompt
    mode: ModeChoice | None
    focus: FocusChoice
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Tool] | None
    tool_choice: str | None


class AnswerKwargs(WordingKwargs, DecodingKwargs, total=False):
    """How a question is read and answered.

    Attributes:
        response_format: what the answer must look like: an ``AnswerFormat``, a Pydantic model, OpenAI's dictionary, or
            None for any text. A batch takes one for all questions, or a list with one per question.
        parallel_tool_calls: whether an answer may contain several calls. Default: if ``tool_choice`` is "auto".
        min_support: support (0 to 1) from which the answer counts as found in the documents (``Answer.found``). "auto"
            is the threshold of the model's calibration. None, unless the model's settings have one, measures nothing.
        attribution: measure each document's influence on the answer (``Answer.sources``). "attention" takes one more
            pass over question and answer. "effects" also measures the answer's probability without each document.
    """

    response_format: ResponseFormat | Sequence[ResponseFormat | None] | None
    parallel_tool_calls: bool | None
    attribution: Attributed | None
    min_support: MinSupport


_OF_BATCHES = frozenset(AnswerKwargs.__annotations__) - {"prompt"} | {"prompts"}


@dataclass(frozen=True, slots=True)
class Call:
    """The requests of one call and their questions, with its options.

    Attributes:
        min_support: support from which an answer counts as found, or "auto"; None if it is not measured.
    """

    questions: Sequence[str]
    requests: Sequence[Request]
    decoding: DecodingOptions
    attribution: Attributed | None
    min_support: MinSupport

    def cancel(self) -> None:
        """End all answers at their next token."""
        for request in self.requests:
            request.cancelled.set()

    @contextmanager
    def cancelled_with_task(self) -> Generator[None, None, None]:
        """Return a context that cancels the call if its asyncio task is cancelled inside."""
        try:
            yield
        except asyncio.CancelledError:
            self.cancel()
            raise


def read_call(
    engine: Engine[FusionModel], question: str, documents: Sequence[Document | str], options: Mapping[str, Any]
) -> Call:
    """Encode and check one question; see :func:`read_calls`."""
    rest = {name: value for name, value in options.items() if name != "prompt"}
    return read_calls(engine, [question], [documents], [options.get("prompt")], rest)


def read_calls(
    engine: Engine[FusionModel],
    questions: Sequence[str],
    documents: Sequence[Sequence[Document | str]],
    prompts: Sequence[Prompt] | None,
    options: Mapping[str, Any],
) -> Call:
    """Encode and check questions that are answered together.

    Args:
        options: as :class:`AnswerKwargs`, without ``prompt``.

    Raises:
        InvalidInputError: an argument is invalid.
        UnsupportedModelError: attribution cannot be measured on this model.
        NotCalibratedError: support was not calibrated for this model.
        ContextLimitError: documents, question and answer are too long.
        ControlTokenError: untrusted text would have become a control token.
    """
    UnknownOptionError.raise_for(options, _OF_BATCHES, "a batch")
    prompts = [None for _ in questions] if prompts is None else prompts
    if not all(is_sequence(rows) and not isinstance(rows, str) for rows in (questions, documents, prompts)):
        raise InvalidInputError("questions, documents and prompts must be lists with one item per question.")
    if not len(questions) == len(documents) == len(prompts):
        raise InvalidInputError(
            f"there are {len(questions)} questions, {len(documents)} document lists and {len(prompts)} prompts, but "
            "their numbers must be equal."
        )
    wording = dict(options)
    attribution = wording.pop("attribution", None)
    _require_attributable(engine, attribution)
    mode, focus = wording.pop("mode", None), wording.pop("focus", "auto")
    min_support = _min_support(engine, wording.pop("min_support", None))
    template_kwargs = wording.pop("chat_template_kwargs", None)
    formats = _formats(wording.pop("response_format", None), len(questions))
    tools = ToolUse.of(
        wording.pop("tools", None), wording.pop("tool_choice", None), wording.pop("parallel_tool_calls", None)
    )
    decoding = decoding_options(
        wording, max_new_tokens=engine.max_new_tokens, max_reasoning_tokens=engine.max_reasoning_tokens
    )
    _require_no_conflict(decoding, formats, tools)
    for format in dict.fromkeys(format for format in formats if format is not None):
        engine.model.constraint(format)  # a bad one is an error before documents are encoded
    requests = [
        engine.request(
            question, rows, prompt, mode, decoding, template_kwargs, focus=focus, tools=tools, format=format
        )
        for question, rows, prompt, format in zip(questions, documents, prompts, formats, strict=True)
    ]
    return Call(questions, requests, decoding, attribution, min_support)


def _formats(given: Any, questions: int) -> list[AnswerFormat | None]:
    """Return the format of each question's answer."""
    if isinstance(given, str) or not is_sequence(given):
        return [AnswerFormat.of(cast("ResponseFormat | None", given))] * questions  # it rejects other types
    if len(given) != questions:
        raise InvalidInputError(
            f"response_format has {len(given)} formats for {questions} questions, but it must have one for each."
        )
    return [AnswerFormat.of(each) for each in given]


def _require_no_conflict(
    decoding: DecodingOptions, formats: Sequence[AnswerFormat | None], tools: ToolUse | None
) -> None:
    """Reject options that both say where an answer ends."""
    if decoding.stop and (any(formats) or tools is not None):
        name = "response_format" if tools is None else "list of tools"
        raise InvalidInputError(
            f"stop is {list(decoding.stop)!r}, but a {name} decides where the answer ends; leave out stop."
        )


def _require_attributable(engine: Engine[FusionModel], attribution: object) -> None:
    """Reject a wrong ``attribution=``, or a model that cannot measure it."""
    if attribution is None:
        return
    if attribution not in get_args(Attributed):
        raise InvalidInputError(f"attribution is {attribution!r}, but it must be 'attention', 'effects' or None.")
    if attribution == "attention" or engine.model.capabilities.attention:
        engine.require_explicit_attention()


def _min_support(engine: Engine[FusionModel], given: MinSupport) -> MinSupport:
    """Return the support that answers need: the caller's, else that of the settings, else None."""
    settings = engine.settings
    wanted = settings.min_support if given is None else given
    return checked_min_support(wanted, settings.support, engine.model.model_id)
