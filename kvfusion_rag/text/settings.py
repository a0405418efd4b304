"""How one model reads documents and questions: templates, prefix, passage length and default mode.

A model folder may contain these settings as ``kvfusion.json``. Otherwise they are derived from the chat template, or
from plain text if there is no chat template. This module reads and checks settings. It does not encode text.

Templates are trusted text from the model's owner, so control tokens in them are control tokens. ``encoder.py`` fills
the fields ``{text}``, ``{title}``, ``{question}``, ``{prompt}`` and ``{answer}`` with untrusted text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from ..errors import InvalidInputError, ModelLoadError, NotCalibratedError
from ..schema import MODES, ModeChoice
from .chat import render, typed
from .json_text import is_a, is_mapping, is_number, is_sequence, parse_json
from .reasoning import Reasoning, find_format
from .support import MinSupport, SupportCalibration, require_min_support

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "kvfusion.json"
RECORD_NAME = "training.json"  # training record of an adapter or decoder
DOCUMENTS_MARK = "\u2983documents\u2984"
MARK = re.compile("\u2983[a-z0-9]+\u2984")  # a placeholder for text while a chat template is rendered
FIELD = re.compile(r"\{(?:text|title|question|prompt|answer)\}")  # filled by encoder.py
LongDocuments = Literal["error", "split"]
Positions = Literal["uniform", "global"]
Layout = Literal["prompt", "fixed"]

DEFAULT_INSTRUCTION = "Answer the question from the documents above, in as few words as possible."
DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_MAX_REASONING_TOKENS = 4096
TUNED_MAX_NEW_TOKENS = 48  # for a decoder that was trained on short answers


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How to feed a model, beyond its ``config.json``.

    Attributes:
        layout: "prompt": the model reads the caller's prompt in its own chat template, with the documents where the
            prompt places them. "fixed": the model reads the templates below, which a tuned decoder was trained with.
        chat_template_kwargs: further variables of the chat template, as ``apply_chat_template`` takes them.
        prefix: text that is prefilled once at positions 0..p-1 and seen by every document ("" in the paper).
        document_template: a document without a title; field ``{text}``.
        titled_document_template: a document with a title; fields ``{title}`` and ``{text}``.
        question_template: a bare question; field ``{question}``.
        prompt_template: the caller's complete wording; field ``{prompt}``. None for a model that was trained on bare
            questions and reads only the question.
        passage_length: number n of document tokens after which the question starts (192 in the paper). None means the
            length of the longest document, so that fusing one document equals the ordinary joined prompt. Mode "ape"
            always uses the longest document.
        max_document_tokens: longest document to prefill in one piece. None means what the window allows.
        long_documents: reject or split longer documents.
        answer_template: answers in training, including white space; field ``{answer}``.
        evidence_separator: text between an answer and its evidence, for a model that was trained on both.
        max_new_tokens: default limit of an answer in tokens. None means the model's generation config, else 512.
        reasoning: marks of the reasoning that the model writes in front of its answers. "auto" finds them in the chat
            template and tokenizer; "none" leaves everything in the answer; "harmony" are the channels of gpt-oss; a
            pair has the opening and the closing tag. In the fixed layout answers have no reasoning.
        max_reasoning_tokens: default limit of the reasoning in tokens. None means 4096, or what the window has room
            for.
        mode: default mode. "auto" is "fusion" for a model that was trained for it, else the best mode that
            ``kvfusion doctor --measure`` found, else "concat".
        positions: positions of documents in mode "fusion". "uniform": all documents start right after the prefix, so
            their order does not matter. "global": they follow one another in the caller's order, then comes the
            question; this measures the cost of order invariance.
        focus: number of documents that mode "fusion" keeps by default, those that make the question most likely. None
            keeps all.
        focus_weight: weight of the retriever's score, standardized over the documents, next to
            log p(question | document). None means what ``kvfusion doctor --measure`` found best, else 0.
        ape_temperature: T of mode "ape", which divides the logits of the documents' slots.
        ape_scale: S of mode "ape", which multiplies the log-sum-exp of the documents' slots.
        support: how ``Answer.support`` follows from what the model measures (``kvfusion calibrate``). None if it was
            not calibrated.
        min_support: support from which an answer counts as found, by default: a number from 0 to 1, or "auto" for the
            calibration's own threshold. None measures no support.
        tuned: the weights themselves were trained to read fused caches.
        tuned_concat: the adapter or decoder was also trained on joined prompts, so it answers in mode "concat" too.
            Otherwise the base model does.
        tuned_evidence: the adapter or decoder was trained to continue with the evidence. Its answers end where the
            evidence would begin.
    """

    layout: Layout = "fixed"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
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
    reasoning: Reasoning = "auto"
    max_reasoning_tokens: int | None = None
    mode: ModeChoice = "auto"
    positions: Positions = "uniform"
    focus: int | None = None
    focus_weight: float | None = None
    ape_temperature: float = 0.9
    ape_scale: float = 0.9
    support: SupportCalibration | None = None
    min_support: MinSupport = None
    tuned: bool = False
    tuned_concat: bool = False
    tuned_evidence: bool = False

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a value that is not allowed."""
        for name, required, optional in TEMPLATE_FIELDS:
            if name != "prompt_template" or self.prompt_template is not None:
                _require_template(name, getattr(self, name), required, optional)
        if is_a(self.focus, str) and self.focus == "auto":
            raise InvalidInputError("focus is 'auto', but a model's own setting must be a whole number or None.")
        require_focus(self.focus)
        require_mode(self.mode)
        for name, (is_allowed, allowed) in ALLOWED_VALUES.items():
            if not is_allowed(value := getattr(self, name)):
                raise InvalidInputError(f"{name} is {value!r}, but it must be {allowed}.")
        require_min_support(self.min_support)
        if self.min_support is not None and self.support is None:
            raise NotCalibratedError.of(self.min_support, "the model")
        if self.support is not None and not is_a(self.support, SupportCalibration):
            object.__setattr__(self, "support", SupportCalibration.of(self.support))
        if isinstance(self.reasoning, list):  # JSON has no tuples
            object.__setattr__(self, "reasoning", tuple(self.reasoning))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_settings(model: str, tokenizer: PreTrainedTokenizerBase, *, model_id: str, **hub: Any) -> ModelSettings:
    """Return the settings of ``model`` (a folder or a hub name): its ``kvfusion.json``, else derived defaults.

    Args:
        model_id: name of the model in errors.
        hub: revision, token and other options of transformers' loaders.

    Raises:
        ModelLoadError: the file is not JSON, or contains an unknown field or a wrong value.
    """
    path = cached_settings_file(model, **hub)
    if path is None:
        return default_settings(tokenizer)
    label = f"{FILE_NAME} of {model_id!r}"
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{label} is not readable JSON: {error}.") from error
    if not is_mapping(values):
        raise ModelLoadError(f"{label} contains a {type(values).__name__}, but it must be an object.")
    allowed = {f.name for f in fields(ModelSettings)}
    if unknown := sorted(set(values) - allowed):
        raise ModelLoadError(f"{label} has the unknown field {unknown[0]!r}; allowed: {sorted(allowed)}.")
    try:
        return ModelSettings(**values)
    except InvalidInputError as error:
        raise ModelLoadError(f"in {label}, {error}") from error


def cached_settings_file(model: str, **hub: Any) -> str | None:
    """Return the path of a model's ``kvfusion.json``, downloaded if necessary, or None if the model has none."""
    return cached_model_file(model, FILE_NAME, **hub)


def cached_model_file(model: str, name: str, **hub: Any) -> str | None:
    """Return the path of a file of ``model`` (a folder or a hub name), or None if there is no such file."""
    from transformers.utils.hub import cached_file  # pyright: ignore[reportUnknownVariableType]

    return cached_file(
        model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )


def default_settings(tokenizer: PreTrainedTokenizerBase) -> ModelSettings:
    """Derive settings from the tokenizer's chat template, cut at the places of documents and question."""
    if typed(tokenizer).chat_template is None:
        return ModelSettings(layout="prompt", prefix=leading_bos(tokenizer))
    request = mark("request")
    try:
        text = render_answered(tokenizer, [("user", documents_turn(request))], template_kwargs(ModelSettings()))
    except TemplateError as error:
        raise ModelLoadError(
            f"the model's chat template fails for a single user message ({error}); write a {FILE_NAME} beside it."
        ) from error
    prefix, documents_mark, rest = text.partition(DOCUMENTS_MARK)
    between, request_mark, suffix = rest.partition(request)
    if not (documents_mark and request_mark) or between or MARK.search(prefix + suffix):
        raise ModelLoadError(
            "the model's chat template changes a user message, so documents have no place in it; "
            f"write a {FILE_NAME} beside the model."
        )
    return ModelSettings(
        layout="prompt",
        prefix=prefix,
        question_template=f"{DEFAULT_INSTRUCTION}\nQuestion: {{question}}{suffix}",
        prompt_template=f"{{prompt}}{suffix}",
        answer_template="{answer}",
    )


def render_answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], kwargs: Mapping[str, Any]
) -> str:
    """Return the chat template around ``messages`` (role, text), up to where the answer begins without reasoning."""
    text = render(tokenizer, messages, kwargs, fixed_date=True)
    form = find_format(tokenizer)
    return text if form is None else text + form.closing_text(text)


def documents_turn(text: str) -> str:
    """Return the first user turn of the fixed layout: the documents, then ``text``."""
    return f"Documents:\n\n{DOCUMENTS_MARK}{text}"


def mark(name: object) -> str:
    """Return a placeholder for text while a chat template is rendered."""
    return f"\u2983{name}\u2984"


def template_kwargs(settings: ModelSettings) -> dict[str, Any]:
    """Return the chat template's variables in the fixed layout, whose short answers have no reasoning before them."""
    return {"enable_thinking": False, **settings.chat_template_kwargs}


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that a tokenizer puts in front of plain text, or "" if it adds none."""
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


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number from 0."""
    return is_count(value) or (type(value) is int and value == 0)


# Each template with the field that it must contain once, and a field that it may contain once.
TEMPLATE_FIELDS = (
    ("prefix", None, None),
    ("document_template", "{text}", None),
    ("titled_document_template", "{text}", "{title}"),
    ("question_template", "{question}", None),
    ("prompt_template", "{prompt}", None),
    ("answer_template", "{answer}", None),
)
_Rule = tuple[Callable[[Any], bool], str]
_TOKENS: _Rule = (lambda value: is_count(value) or value is None, "a whole number of tokens above 0")
_FACTOR: _Rule = (lambda value: is_number(value) and value > 0, "a number above 0")
_FLAG: _Rule = (lambda value: isinstance(value, bool), "true or false")
ALLOWED_VALUES: dict[str, _Rule] = {
    "passage_length": _TOKENS,
    "max_document_tokens": _TOKENS,
    "max_new_tokens": _TOKENS,
    "max_reasoning_tokens": (lambda value: value is None or is_whole(value), "a whole number of tokens from 0"),
    "reasoning": (lambda value: _is_reasoning(value), "'auto', 'none', 'harmony', or an opening and a closing tag"),
    "focus_weight": (lambda value: value is None or (is_number(value) and value >= 0), "a number from 0, or None"),
    "long_documents": (lambda value: value in ("error", "split"), "'error' or 'split'"),
    "layout": (lambda value: value in ("prompt", "fixed"), "'prompt' or 'fixed'"),
    "chat_template_kwargs": (
        lambda value: is_mapping(value) and all(isinstance(name, str) for name in value),
        "a dict with names as keys",
    ),
    "positions": (lambda value: value in ("uniform", "global"), "'uniform' or 'global'"),
    "ape_temperature": _FACTOR,
    "ape_scale": _FACTOR,
    "evidence_separator": (lambda value: isinstance(value, str) and value.strip() != "", "a text that is not blank"),
    "tuned": _FLAG,
    "tuned_concat": _FLAG,
    "tuned_evidence": _FLAG,
}


def _is_reasoning(value: object) -> bool:
    if is_sequence(value) and isinstance(value, list | tuple):
        return len(value) == 2 and all(isinstance(tag, str) and tag.strip() for tag in value)
    return value in ("auto", "none", "harmony")


def _require_template(name: str, template: object, required: str | None, optional: str | None) -> None:
    """Raise InvalidInputError unless the template has ``required`` once, ``optional`` at most once, and no more."""
    if not isinstance(template, str):
        raise InvalidInputError(f"{name} is {template!r}, but it must be a text.")
    found = FIELD.findall(template)
    is_valid = set(found) <= {required, optional} and len(found) == len(set(found))
    if not is_valid or (required and required not in found):
        allowed = f", {optional} at most once" if optional else ""
        needed = f"contain {required} exactly once{allowed}, and no other field" if required else "not contain a field"
        raise InvalidInputError(f"{name} is {template!r}, but it must {needed}.")
