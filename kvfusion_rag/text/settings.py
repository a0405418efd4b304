"""How one model is to be fed: templates, prefix, passage length and default mode (``kvfusion.json``).

A model folder may carry a ``kvfusion.json``; a model without one gets settings derived from its chat
template, or plain text ones where it has none. This module reads and checks files; it does not encode text.

Templates are trusted text of the model's owner: control tokens in them stand for themselves. The fields
``{text}``, ``{title}``, ``{question}``, ``{prompt}`` and ``{answer}`` are filled with untrusted text by
``prompts.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..errors import InvalidInputError, ModelLoadError
from ..schema import MODES, ModeChoice
from .chat import render

FILE_NAME = "kvfusion.json"
RECORD_NAME = "training.json"  # beside a trained decoder: everything that made it
DOCUMENTS_MARK = "\u2983documents\u2984"
MARK = re.compile("\u2983[a-z0-9]+\u2984")  # stands for a text while a chat template is rendered
FIELD = re.compile(r"\{(?:text|title|question|prompt|answer)\}")  # what prompts.py fills in
LongDocuments = Literal["error", "split"]
Positions = Literal["uniform", "global"]
Layout = Literal["prompt", "fixed"]

DEFAULT_INSTRUCTION = "Answer the question from the documents above, in as few words as possible."
DEFAULT_MAX_NEW_TOKENS = 512
TUNED_MAX_NEW_TOKENS = 48  # of a decoder that was trained on short answers


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Everything about feeding a model that is not in its ``config.json``.

    Attributes:
        layout: "prompt": the model reads the caller's prompt in its own chat template, documents where the prompt
            shows them. "fixed": it reads the templates below, which a tuned decoder was trained with.
        chat_template_kwargs: further variables of the chat template, as ``apply_chat_template`` takes them.
        prefix: text prefilled once at positions 0..p-1 and seen by every document ("" is the paper).
        document_template: one document without a title; field ``{text}``.
        titled_document_template: one document with a title; fields ``{title}`` and ``{text}``.
        question_template: a bare question; field ``{question}``.
        prompt_template: the caller's complete wording; field ``{prompt}``. ``None`` for a model trained on
            bare questions, which then reads the question alone.
        passage_length: document tokens n after which the question starts (paper: 192); ``None`` means the
            longest document's, which makes one document equal to the ordinary joined prompt. Mode "ape" always
            takes the longest document's.
        max_document_tokens: longest document to prefill in one piece; ``None`` means what the window allows.
        long_documents: what happens to a longer one.
        answer_template: what the model is trained to answer; field ``{answer}``, white space and all.
        evidence_separator: what stands between an answer and its evidence where a model is trained on both.
        max_new_tokens: default limit of an answer in tokens; ``None`` for the model's generation config, else 512.
        mode: default mode; "auto" is "fusion" for a model that was trained for it, else what
            ``kvfusion doctor --measure`` found best, else "concat".
        positions: of documents in mode "fusion". "uniform": all stand right after the prefix, so no order of theirs
            is told from another. "global": one after another in the caller's order, the question behind the last;
            it measures what order invariance costs.
        focus: documents that mode "fusion" keeps by default, those that make the question likeliest; None for all.
        focus_weight: of the retriever's score, standardized over the documents, beside log p(question | document);
            None for what ``kvfusion doctor --measure`` found best, else 0.
        ape_temperature: T of mode "ape", which divides the logits of the documents' slots.
        ape_scale: S of mode "ape", which multiplies the log-sum-exp of the documents' slots.
        tuned: True when the weights themselves were trained to read fused caches.
        tuned_concat: True when the adapter or decoder was trained on joined prompts too, and so answers in mode
            "concat" as well; otherwise the base model does.
        tuned_evidence: True when the adapter or decoder was trained to go on with the evidence; its answers end
            where that would begin.
    """

    layout: Layout = "fixed"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prefix: str = ""
    document_template: str = "{text}\n\n"
    titled_document_template: str = "Title: {title}\n{text}\n\n"
    question_template: str = "Question: {question}\nAnswer:"
    prompt_template: str | None = "{prompt}"
    answer_template: str = " {answer}"
    evidence_separator: str = "\nEvidence: "
    passage_length: int | None = None
    max_document_tokens: int | None = None
    long_documents: LongDocuments = "error"
    max_new_tokens: int | None = None
    mode: ModeChoice = "auto"
    positions: Positions = "uniform"
    focus: int | None = None
    focus_weight: float | None = None
    ape_temperature: float = 0.9
    ape_scale: float = 0.9
    tuned: bool = False
    tuned_concat: bool = False
    tuned_evidence: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        _require_template("prefix", self.prefix)
        _require_template("document_template", self.document_template, "{text}")
        _require_template("titled_document_template", self.titled_document_template, "{text}", optional="{title}")
        _require_template("question_template", self.question_template, "{question}")
        if self.prompt_template is not None:
            _require_template("prompt_template", self.prompt_template, "{prompt}")
        _require_template("answer_template", self.answer_template, "{answer}")
        for name in ("passage_length", "max_document_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if not (is_count(value) or value is None):
                raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number of tokens above 0.")
        if self.focus == "auto":
            raise InvalidInputError("focus is 'auto', but a model's own setting must be a whole number or None.")
        require_focus(self.focus)
        if self.focus_weight is not None and (not _is_number(self.focus_weight) or self.focus_weight < 0):
            raise InvalidInputError(f"focus_weight is {self.focus_weight!r}, but it must be a number from 0, or None.")
        if self.long_documents not in ("error", "split"):
            raise InvalidInputError(f"long_documents is {self.long_documents!r}, but it must be 'error' or 'split'.")
        if self.layout not in ("prompt", "fixed"):
            raise InvalidInputError(f"layout is {self.layout!r}, but it must be 'prompt' or 'fixed'.")
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise InvalidInputError(f"chat_template_kwargs is {kwargs!r}, but it must be a dict with names as keys.")
        if self.positions not in ("uniform", "global"):
            raise InvalidInputError(f"positions is {self.positions!r}, but it must be 'uniform' or 'global'.")
        require_mode(self.mode)
        for name in ("ape_temperature", "ape_scale"):
            if not _is_positive(getattr(self, name)):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be a number above 0.")
        if not isinstance(self.evidence_separator, str) or not self.evidence_separator.strip():
            raise InvalidInputError(
                f"evidence_separator is {self.evidence_separator!r}, but it must be a text that is not blank."
            )
        for name in ("tuned", "tuned_concat", "tuned_evidence"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}, but it must be true or false.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_settings(model: str, tokenizer: PreTrainedTokenizerBase, *, model_id: str, **hub: Any) -> ModelSettings:
    """Settings of ``model`` (a folder or a hub name): its ``kvfusion.json``, else derived defaults.

    Args:
        model_id: how the model is named in errors.
        hub: revision, token, ... as transformers' loaders take them.

    Raises:
        ModelLoadError: the file is not JSON, or holds an unknown field or a wrong value.
    """
    path = cached_file(
        model,
        FILE_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    if path is None:
        return default_settings(tokenizer)
    where = f"{FILE_NAME} of {model_id!r}"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{where} is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{where} holds a {type(found).__name__}, but it must be an object.")
    allowed = {f.name for f in fields(ModelSettings)}
    if unknown := sorted(set(found) - allowed):
        raise ModelLoadError(f"{where} has the unknown field {unknown[0]!r}; allowed: {sorted(allowed)}.")
    try:
        return ModelSettings(**found)
    except InvalidInputError as error:
        raise ModelLoadError(f"in {where}, {error}") from error


def default_settings(tokenizer: PreTrainedTokenizerBase) -> ModelSettings:
    """Settings for a model without a ``kvfusion.json``: its chat template, cut where documents and question go."""
    if tokenizer.chat_template is None:
        return ModelSettings(layout="prompt", prefix=leading_bos(tokenizer))
    request = mark("request")
    try:
        text = render(
            tokenizer, [("user", documents_turn(request))], template_kwargs(ModelSettings()), fixed_date=True
        )
    except TemplateError as error:
        raise ModelLoadError(
            f"the model's chat template fails for a single user message ({error}); write a {FILE_NAME} beside it."
        ) from error
    prefix, found, rest = text.partition(DOCUMENTS_MARK)
    between, found_request, suffix = rest.partition(request)
    if not (found and found_request) or between or MARK.search(prefix + suffix):
        raise ModelLoadError(
            "the model's chat template does not pass a user message on unchanged, so documents have no place in it; "
            f"write a {FILE_NAME} beside the model."
        )
    return ModelSettings(
        layout="prompt",
        prefix=prefix,
        question_template=f"{DEFAULT_INSTRUCTION}\nQuestion: {{question}}{suffix}",
        prompt_template=f"{{prompt}}{suffix}",
        answer_template="{answer}",
    )


def documents_turn(text: str) -> str:
    """The first user turn of the fixed layout: the documents, then ``text``."""
    return f"Documents:\n\n{DOCUMENTS_MARK}{text}"


def mark(name: object) -> str:
    """A text that stands for another one while a chat template is rendered."""
    return f"\u2983{name}\u2984"


def template_kwargs(settings: ModelSettings) -> dict[str, Any]:
    """Variables of the chat template in the fixed layout, whose short answers have no reasoning before them."""
    return {"enable_thinking": False, **settings.chat_template_kwargs}


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that a tokenizer puts in front of a plain text, or "" if there is none."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if has_bos else ""


def require_mode(mode: object) -> None:
    """Raise InvalidInputError unless ``mode`` is one of the modes or "auto"."""
    if mode not in (*MODES, "auto"):
        raise InvalidInputError(f"mode is {mode!r}, but it must be 'auto', 'fusion', 'concat' or 'ape'.")


def require_focus(focus: object) -> None:
    """Raise InvalidInputError unless ``focus`` is a number of documents, "auto" or None."""
    if not (is_count(focus) or focus is None or focus == "auto"):
        raise InvalidInputError(f"focus is {focus!r}, but it must be a number of documents from 1, 'auto' or None.")


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0


def _require_template(name: str, template: object, field: str | None = None, *, optional: str | None = None) -> None:
    """``field`` has to stand in the template exactly once, ``optional`` at most once, and no other field at all."""
    if not isinstance(template, str):
        raise InvalidInputError(f"{name} is {template!r}, but it must be a text.")
    found = FIELD.findall(template)
    wanted = [f for f in (field, optional) if f is not None]
    if any(f not in wanted for f in found) or len(found) != len(set(found)) or (field and field not in found):
        needed = f"hold {field} exactly once" if field else "hold no field"
        allowed = f", and {optional} once at most" if optional else ""
        raise InvalidInputError(f"{name} is {template!r}, but it must {needed}{allowed}, and no other field.")
