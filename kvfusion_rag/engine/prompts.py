"""Decides which mode answers a question, and how that mode reads the caller's prompt.

An untuned model reads the prompt in its own chat template. A tuned decoder reads the templates it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ContextLimitError, InvalidInputError, UnsupportedModelError
from ..fusion.interface import FusionModel
from ..schema import FocusChoice, Message, Mode, ModeChoice, Prompt, PromptPart, ShownPrompt
from ..text.chat import messages_of
from ..text.encoder import PlainEncoder, PromptEncoder
from ..text.json_text import is_a
from ..text.layouts import ChatLayouts, FixedLayout, Layout
from ..text.measured_mode import Identity, Measured, measured
from ..text.settings import ModelSettings, require_focus
from ..text.tools.call_format import OWN_FORMAT, CallFormat, find_call_format
from ..text.tools.conversation import plain_messages
from ..text.tools.definitions import ToolUse
from .modes import AnswerMode, answers_tuned, choose_mode
from .requests import Request


class Prompts:
    """The modes and prompts of one model under one set of settings."""

    def __init__(self, model: FusionModel, settings: ModelSettings, plain: PlainEncoder) -> None:
        self.model, self.settings = model, settings
        self.encoder = PromptEncoder(model.tokenizer, settings, plain)
        self._base_encoder = PromptEncoder(model.tokenizer, model.base_settings, plain)
        self._chats = ChatLayouts(model.tokenizer, settings, plain)
        self._calls: CallFormat | None = None  # found at the first prompt in the chat template

    def mode(self, choice: ModeChoice | None) -> tuple[AnswerMode, str]:
        """Return the mode that answers, and the reason for it."""
        name, reason = choose_mode(choice, self.settings, self._measured)
        mark = self.encoder.evidence_mark if self.settings.tuned_evidence else None
        return AnswerMode.of(name, self.settings, mark), reason

    def focus(self, choice: FocusChoice, mode: Mode) -> int | None:
        """Return the number of documents that an answer in ``mode`` keeps, or None for all."""
        require_focus(choice)
        if choice != "auto":
            return choice
        if mode != "fusion":
            return None
        if self.settings.focus is not None:
            return self.settings.focus
        return None if (found := self._measured()) is None else found.focus

    @property
    def focus_weight(self) -> float:
        """Weight of the retriever's score: the model's own, else the measured one, else 0."""
        if self.settings.focus_weight is not None:
            return self.settings.focus_weight
        return 0.0 if (found := self._measured()) is None else found.focus_weight

    @property
    def identity(self) -> Identity:
        """The identity under which a measurement of the best mode is saved."""
        return self.model.weights_digest, str(self.model.kv_shape.dtype), self.model.adapter_digest

    def _measured(self) -> Measured | None:
        return measured(self.identity)

    def layout(
        self,
        question: str,
        prompt: Prompt,
        mode: Mode,
        *,
        has_documents: bool,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: ToolUse | None = None,
    ) -> Layout:
        """Return how the prompt of one question is read in ``mode``.

        Raises:
            InvalidInputError: the model reads bare questions, so it cannot be told of ``tools``.
            ContextLimitError: question or prompt are much longer than the context window.
        """
        self._require_short(question, prompt)
        if not self.reads_prompt(mode):
            encoder = self.encoder if self._uses_own_settings(mode) else self._base_encoder
            if tools is not None and not encoder.follows_instructions:
                raise InvalidInputError(
                    f"{self.model.model_id} reads bare questions, so it cannot be told of tools; use another model."
                )
            if tools is not None or not isinstance(prompt, str | None):
                prompt = plain_messages(messages_of(prompt, question), tools)
            return FixedLayout.of(encoder, question, prompt)
        calls = self.call_format(mode)
        kwargs, documents = template_kwargs, has_documents
        return self._chats.of(question, prompt, has_documents=documents, kwargs=kwargs, tools=tools, calls=calls)

    def call_format(self, mode: Mode) -> CallFormat:
        """Return how the model writes calls of tools in ``mode``."""
        if not self.reads_prompt(mode):
            return OWN_FORMAT
        if self._calls is None:
            tokenizer = self.model.tokenizer
            ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in self.model.end_ids]
            settings = self.settings
            self._calls = find_call_format(tokenizer, settings.chat_template_kwargs, ends, settings.reasoning)
        return self._calls

    def reads_prompt(self, mode: Mode) -> bool:
        """Whether ``mode`` reads the caller's prompt in the model's chat template instead of fixed templates."""
        settings = self.settings if self._uses_own_settings(mode) else self.model.base_settings
        return settings.layout == "prompt"

    def fused_layout(
        self,
        prompt: Prompt,
        question: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
        tools: ToolUse | None = None,
    ) -> Layout:
        """Return the layout in which documents are read for questions in the wording of ``prompt``.

        Args:
            question: the question that ``prompt`` contains, or "" if it contains none.
            template_kwargs: variables of the chat template.
            tools: those of the questions.
        """
        kwargs = template_kwargs
        if prompt is None:
            question = question.strip() or "?"  # any question is read behind the documents
        return self.layout(question, prompt, "fusion", has_documents=True, template_kwargs=kwargs, tools=tools)

    def every_layout(self) -> list[Layout]:
        """Return layouts that encode documents in all the ways that this model usually reads them."""
        messages = [Message.around("user", "", "?", titles=titles) for titles in (False, True)]
        chats = [self._chats.of("?", [message], has_documents=True) for message in messages]
        return [FixedLayout.of(self.encoder, "?", None), FixedLayout.of(self._base_encoder, "?", None), *chats]

    def shown(self, request: Request) -> ShownPrompt:
        """Return what the model reads for ``request``, as text."""

        def text(ids: Sequence[int]) -> str:
            return str(self.model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        parts: list[PromptPart] = []
        if request.fused is not None:
            names = {ids: d.id for d in reversed(request.encoded.documents) for ids in d.pieces}
            documents = [PromptPart(text(piece.ids), names[piece.ids]) for piece in request.fused]
            parts = [PromptPart(text(request.scope.prefix)), *documents, PromptPart(text(request.question.ids))]
        else:
            at, ids = 0, request.question.ids
            for document, (start, end) in zip(request.encoded.documents, request.spans, strict=True):
                if end > start:
                    parts += [PromptPart(text(ids[at:start])), PromptPart(text(ids[start:end]), document.id)]
                    at = end
            parts.append(PromptPart(text(ids[at:])))
        return ShownPrompt(request.mode.name, tuple(part for part in parts if part.text))

    def _require_short(self, question: str, prompt: Prompt) -> None:
        """Reject texts that cannot fit before they are encoded as a whole, which takes long."""
        window = self.model.context_window
        messages: Sequence[Message] = [] if prompt is None or isinstance(prompt, str) else prompt
        texts = [m.text for m in messages if is_a(m, Message) and is_a(m.text, str)]  # checked later
        wording = prompt if isinstance(prompt, str) else "\n".join(texts)
        for name, text in (("question", question), ("prompt", wording)):
            if window is not None and self.encoder.plain.exceeds(text, window):
                raise ContextLimitError(
                    f"the {name} has {len(text)} characters, but {self.model.model_id} reads at most {window} tokens; "
                    "shorten it."
                )

    def _uses_own_settings(self, mode: Mode) -> bool:
        """Whether ``mode`` reads prompts by ``self.settings`` instead of the untuned model's settings."""
        return not self.model.is_tuned or answers_tuned(mode, self.settings)


def require_fit(model: FusionModel, encoder: PromptEncoder, settings: ModelSettings) -> None:
    """Reject settings and tokenizers with which no question could be asked.

    Raises:
        UnsupportedModelError: the tokenizer belongs to another model.
        InvalidInputError: prefix and passage length leave no room for a question.
    """
    window, rows = model.context_window, model.vocabulary_size
    prefix, passage = len(encoder.prefix_ids), settings.passage_length or 1
    if window is not None and prefix + passage + 2 > window:
        raise InvalidInputError(
            f"the prefix has {prefix} tokens and passage_length is {passage}, but {model.model_id} has "
            f"{model.position_limit} positions for them, the question and the answer."
        )
    if encoder.plain.largest_id >= rows:
        raise UnsupportedModelError(
            f"the tokenizer of {model.model_id!r} has ids up to {encoder.plain.largest_id}, but the model has only "
            f"{rows} embeddings; it belongs to another model."
        )
