"""Decides which mode answers a question, and how that mode reads the caller's prompt.

An untuned model reads the prompt in its own chat template, a tuned decoder the templates that it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model.backbone import Backbone
from ..schema import FocusChoice, Message, Mode, ModeChoice, Prompt, PromptPart, ShownPrompt
from ..text.encoder import PlainEncoder, PromptEncoder
from ..text.layouts import ChatLayouts, FixedLayout, Layout
from ..text.settings import ModelSettings, require_focus, require_mode
from .measured import Measured, measured
from .requests import Request


class PromptReader:
    """The prompts of one backbone and its decoder.

    Args:
        decoder: the backbone itself, or a decoder with weights of its own.
        settings: of the tuned decoder if there is one, else of the backbone.
    """

    def __init__(self, backbone: Backbone, decoder: Backbone, settings: ModelSettings) -> None:
        self.backbone, self.decoder, self.settings = backbone, decoder, settings
        plain = PlainEncoder(backbone.tokenizer)
        self.encoder = PromptEncoder(backbone.tokenizer, settings, plain)
        self._base_encoder = PromptEncoder(backbone.tokenizer, backbone.base_settings, plain)
        self._chats = ChatLayouts(backbone.tokenizer, settings, plain)

    @property
    def is_tuned(self) -> bool:
        """Whether an adapter or a decoder with weights of its own is loaded."""
        return self.decoder is not self.backbone or self.backbone.has_adapter

    def mode_of(self, wanted: ModeChoice | None) -> tuple[Mode, str]:
        """The mode that answers, and the reason for it."""
        require_mode("auto" if wanted is None else wanted)
        chosen = wanted or "auto"
        if chosen != "auto":
            return chosen, "asked for"
        if self.settings.mode != "auto":
            return self.settings.mode, "set for this model"
        if self.settings.tuned:
            return "fusion", "the weights were trained to read fused documents"
        if (found := self._measured()) is not None:
            return found.mode, "measured best by kvfusion doctor --measure"
        return "concat", "the model was not trained to read fused documents"

    def focus_of(self, wanted: FocusChoice, mode: Mode) -> int | None:
        """How many documents an answer in ``mode`` keeps; None for all."""
        require_focus(wanted)
        if wanted != "auto":
            return wanted
        if mode != "fusion" or self.settings.focus is not None:
            return self.settings.focus if mode == "fusion" else None
        return None if (found := self._measured()) is None else found.focus

    @property
    def focus_weight(self) -> float:
        """Weight of the retriever's score: the model's own, else the measured one, else 0."""
        if self.settings.focus_weight is not None:
            return self.settings.focus_weight
        return 0.0 if (found := self._measured()) is None else found.focus_weight

    def _measured(self) -> Measured | None:
        return measured(self.backbone, self.backbone.adapter_digest)

    def layout(
        self,
        question: str,
        prompt: Prompt,
        mode: Mode,
        *,
        has_documents: bool,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Layout:
        """How the prompt of one question is read in ``mode``."""
        if not self.reads_prompt(mode):
            return FixedLayout.of(
                self.encoder if self._uses_own_settings(mode) else self._base_encoder, question, prompt
            )
        return self._chats.of(question, prompt, has_documents=has_documents, kwargs=template_kwargs)

    def reads_prompt(self, mode: Mode) -> bool:
        """Whether ``mode`` reads the caller's prompt in the model's chat template, not fixed templates."""
        settings = self.settings if self._uses_own_settings(mode) else self.backbone.base_settings
        return settings.layout == "prompt"

    def fused_layout(
        self, prompt: Prompt, question: str = "", template_kwargs: Mapping[str, Any] | None = None
    ) -> Layout:
        """The layout in which documents are read for questions in the wording of ``prompt``.

        Args:
            question: the question that ``prompt`` holds; "" if it holds none.
            template_kwargs: variables of the chat template.
        """
        return self.layout(question, prompt, "fusion", has_documents=True, template_kwargs=template_kwargs)

    def every_layout(self) -> list[Layout]:
        """Layouts that encode documents in all the ways that this model usually reads them."""
        messages = [Message.around("user", "", "?", titles=titles) for titles in (False, True)]
        chats = [self._chats.of("?", [message], has_documents=True) for message in messages]
        return [FixedLayout.of(self.encoder, "?", None), FixedLayout.of(self._base_encoder, "?", None), *chats]

    def shown(self, request: Request) -> ShownPrompt:
        """What the model reads for ``request``, as text."""

        def text(ids: Sequence[int]) -> str:
            return str(self.backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        if request.fused is not None:
            names = {ids: read.id for read in reversed(request.reading.documents) for ids in read.pieces}
            documents = [PromptPart(text(piece.ids), names[piece.ids]) for piece in request.fused]
            parts = [PromptPart(text(request.prefix)), *documents, PromptPart(text(request.question.ids))]
            return ShownPrompt(request.mode, tuple(part for part in parts if part.text))
        parts, at, ids = [], 0, request.question.ids
        for read, (start, end) in zip(request.reading.documents, request.spans, strict=True):
            if end > start:
                parts += [PromptPart(text(ids[at:start])), PromptPart(text(ids[start:end]), read.id)]
                at = end
        parts.append(PromptPart(text(ids[at:])))
        return ShownPrompt(request.mode, tuple(part for part in parts if part.text))

    def _uses_own_settings(self, mode: Mode) -> bool:
        """Whether ``mode`` reads prompts as ``self.settings`` say, not as the untuned model's do."""
        return not self.is_tuned or self.answers_tuned(mode)

    def answers_tuned(self, mode: Mode) -> bool:
        """Whether the adapter or the second decoder, if there is one, answers in ``mode``."""
        return mode == "fusion" or (mode == "concat" and self.settings.tuned_concat)
