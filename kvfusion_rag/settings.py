"""How one model is to be fed: templates, prefix, passage length and default mode (``kvfusion.json``).

A model folder may carry a ``kvfusion.json``; a model without one gets settings derived from its chat
template, or plain text ones where it has none. This module reads and checks files; it does not encode text.

Templates are trusted text of the model's owner: control tokens in them stand for themselves. The fields
``{text}``, ``{title}``, ``{question}`` and ``{prompt}`` are filled with untrusted text by ``prompts.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .errors import ModelLoadError
from .schema import Mode

FILE_NAME = "kvfusion.json"
LongDocuments = Literal["error", "split"]

DEFAULT_INSTRUCTION = "Answer the question from the documents above, in as few words as possible."
# Llama-3.x templates print today's date unless given one; a date in the prefix would change every key at midnight.
FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Everything about feeding a model that is not in its ``config.json``.

    Attributes:
        prefix: text prefilled once at positions 0..p-1 and seen by every document ("" is the paper).
        document_template: one document without a title; field ``{text}``.
        titled_document_template: one document with a title; fields ``{title}`` and ``{text}``.
        question_template: a bare question; field ``{question}``.
        prompt_template: the caller's complete wording; field ``{prompt}``. ``None`` for a model trained on
            bare questions, which then reads the question alone.
        passage_length: document tokens n after which the question starts (paper: 192); ``None`` means the
            longest document's, which makes one document equal to the ordinary joined prompt.
        max_document_tokens: longest document to prefill in one piece; ``None`` means what the window allows.
        long_documents: what happens to a longer one.
        max_new_tokens: default length of an answer in tokens.
        mode: default mode.
        tuned: True when the weights themselves were trained to read fused caches.
    """

    prefix: str = ""
    document_template: str = "{text}\n\n"
    titled_document_template: str = "Title: {title}\n{text}\n\n"
    question_template: str = "Question: {question}\nAnswer:"
    prompt_template: str | None = "{prompt}"
    passage_length: int | None = None
    max_document_tokens: int | None = None
    long_documents: LongDocuments = "error"
    max_new_tokens: int = 48
    mode: Mode = "fusion"
    tuned: bool = False

    def __post_init__(self) -> None:
        _require_field("document_template", self.document_template, "{text}")
        _require_field("titled_document_template", self.titled_document_template, "{text}")
        _require_field("question_template", self.question_template, "{question}")
        if self.prompt_template is not None:
            _require_field("prompt_template", self.prompt_template, "{prompt}")
        for name in ("passage_length", "max_document_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ModelLoadError(f"{name} is {value!r}, but it must be a whole number of tokens above 0.")
        if self.long_documents not in ("error", "split"):
            raise ModelLoadError(f"long_documents is {self.long_documents!r}, but it must be 'error' or 'split'.")
        if self.mode not in ("fusion", "concat"):
            raise ModelLoadError(f"mode is {self.mode!r}, but it must be 'fusion' or 'concat'.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_settings(model: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> ModelSettings:
    """Settings of ``model`` (a folder or a hub name): its ``kvfusion.json``, else derived defaults.

    Raises:
        ModelLoadError: the file is not JSON, or holds an unknown field or a wrong value.
    """
    path = cached_file(
        model,
        FILE_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return default_settings(tokenizer)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{FILE_NAME} of {model!r} is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{FILE_NAME} of {model!r} holds {type(found).__name__}, but it must be an object.")
    allowed = {f.name for f in fields(ModelSettings)}
    if unknown := sorted(set(found) - allowed):
        raise ModelLoadError(
            f"{FILE_NAME} of {model!r} has the unknown field {unknown[0]!r}; allowed: {sorted(allowed)}."
        )
    return ModelSettings(**found)


def default_settings(tokenizer: PreTrainedTokenizerBase) -> ModelSettings:
    """Settings for a model without a ``kvfusion.json``: its chat template, cut where documents and question go."""
    if tokenizer.chat_template is None:
        return ModelSettings(prefix=_leading_bos(tokenizer))
    documents, request = "\u2983documents\u2984", "\u2983request\u2984"  # unlikely marks, cut out again below
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"Documents:\n\n{documents}{request}"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string=FIXED_DATE,
    )
    assert isinstance(text, str)
    prefix, found, rest = text.partition(documents)
    between, found_request, suffix = rest.partition(request)
    if not (found and found_request) or between:
        raise ModelLoadError(
            "the model's chat template does not pass a user message on unchanged, so documents have no place in it; "
            f"write a {FILE_NAME} beside the model."
        )
    return ModelSettings(
        prefix=prefix,
        question_template=f"{DEFAULT_INSTRUCTION}\nQuestion: {{question}}{suffix}",
        prompt_template=f"{{prompt}}{suffix}",
    )


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if has_bos else ""


def _require_field(name: str, template: str, field: str) -> None:
    if not isinstance(template, str) or template.count(field) != 1:
        raise ModelLoadError(f"{name} is {template!r}, but it must hold {field} exactly once.")
