"""Turns a caller's question, prompt and documents into requests, under one set of settings and one namespace."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, cast

from ..errors import InvalidInputError
from ..fusion.sampling import DecodingOptions
from ..schema import KEY_KINDS, Answer, Document, FocusChoice, KeyKindChoice, ModeChoice, Prompt
from ..store import Place, require_namespace
from ..text.answer_format import AnswerFormat
from ..text.documents import EncodedDocuments, Limits, encoding_steps, is_filled, limit_of, require_sequence
from ..text.encoder import PromptEncoder
from ..text.layouts import FixedLayout, Layout
from ..text.settings import DEFAULT_MAX_NEW_TOKENS, DEFAULT_MAX_REASONING_TOKENS, ModelSettings, is_count
from ..text.steps import finish
from ..text.tools.definitions import ToolUse
from ..text.tools.grammar import call_grammar
from ..text.tools.reading import CallReader
from .document_kvs import DocumentKVs, Scope
from .focus import Focus, needs_choice, scored_question
from .modes import AnswerMode
from .prompts import Prompts, require_fit
from .requests import Request
from .runner import M_co, Runner

logger = logging.getLogger(__name__)

MAX_FUSED_TOKENS = 200_000  # slots; protects against filling memory by mistake


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine besides its model, settings and store.

    Attributes:
        namespace: tenant whose documents are read; part of every key.
        max_fused_tokens: limit of document tokens of one question.
        key_kind: what store keys promise (``docs/store.md``). "auto" is "portable" for a store behind a URL, and
            "exact" otherwise.

    Raises:
        InvalidInputError: a value is not allowed.
    """

    namespace: str = ""
    max_fused_tokens: int = MAX_FUSED_TOKENS
    key_kind: KeyKindChoice = "auto"

    def __post_init__(self) -> None:
        require_namespace(self.namespace)
        if not is_count(self.max_fused_tokens):
            raise InvalidInputError(
                f"max_fused_tokens is {self.max_fused_tokens!r}, but it must be a whole number of tokens above 0."
            )
        if self.key_kind not in ("auto", *KEY_KINDS):
            raise InvalidInputError(f"key_kind is {self.key_kind!r}, but it must be 'auto', 'exact' or 'portable'.")


class Engine(Generic[M_co]):
    """One model under one set of settings and one namespace.

    Args:
        settings: templates, lengths and mode. Default: the model's own.
        store: where document KVs are kept, as ``as_store`` takes it; None keeps nothing.
        make_runner: what answers, ``Runner`` or a subclass.

    Raises:
        InvalidInputError: prefix and passage length leave no room for a question.
        UnsupportedModelError: the tokenizer belongs to another model.
    """

    def __init__(
        self, model: M_co, settings: ModelSettings | None = None, *, store: Place,
        options: EngineOptions | None = None, make_runner: type[Runner[M_co]] = Runner,
    ) -> None:  # fmt: skip
        options = options or EngineOptions()
        kvs = DocumentKVs(model, store=store, key_kind=options.key_kind)
        runner = make_runner(model, kvs, max_fused_tokens=options.max_fused_tokens)
        self._set_up(runner, settings or model.settings, options.namespace, set())

    def _set_up(self, runner: Runner[M_co], settings: ModelSettings, namespace: str, warned: set[str]) -> None:
        self.runner, self.namespace, self._warned = runner, namespace, warned
        self.prompts = Prompts(runner.model, settings, runner.plain)
        require_fit(runner.model, self.encoder, settings)

    def sibling(self, *, settings: ModelSettings | None = None, namespace: str | None = None) -> Engine[M_co]:
        """Return an engine over the same runner with other settings or another namespace."""
        namespace = self.namespace if namespace is None else namespace
        require_namespace(namespace)
        sibling = cast("Engine[M_co]", object.__new__(Engine))
        sibling._set_up(self.runner, settings or self.settings, namespace, self._warned)
        return sibling

    @property
    def model(self) -> M_co:
        return self.runner.model

    @property
    def document_kvs(self) -> DocumentKVs:
        return self.runner.document_kvs

    @property
    def settings(self) -> ModelSettings:
        return self.prompts.settings

    @settings.setter
    def settings(self, settings: ModelSettings) -> None:
        self.prompts.settings = settings

    @property
    def encoder(self) -> PromptEncoder:
        """Encoder of the fixed templates."""
        return self.prompts.encoder

    @property
    def max_new_tokens(self) -> int:
        """Default limit of an answer: the settings', else the generation config's, else 512."""
        return self.settings.max_new_tokens or self.model.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    @property
    def max_reasoning_tokens(self) -> int:
        """Default limit of the reasoning in front of an answer."""
        limit = self.settings.max_reasoning_tokens
        return DEFAULT_MAX_REASONING_TOKENS if limit is None else limit

    def ordinary_ids(self) -> list[int]:
        """Return all vocabulary ids except control tokens."""
        return sorted(set(range(self.model.vocabulary_size)) - self.encoder.plain.control_ids)

    def answer_all(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Answer requests of one mode (``Runner.answer_all``)."""
        return self.runner.answer_all(requests, options)

    def read(
        self, documents: Sequence[Document | str], layout: Layout | None = None, *, max_tokens: int | None = None
    ) -> EncodedDocuments:
        """Encode and check documents.

        Args:
            layout: layout of the prompt that shows the documents. Default: that of a bare question.
            max_tokens: limit on all documents together. Default: ``max_fused_tokens``.
        """
        return finish(self.reading_steps(documents, layout, max_tokens=max_tokens))

    def reading_steps(
        self, documents: Sequence[Document | str], layout: Layout | None = None, *, max_tokens: int | None = None
    ) -> Generator[None, None, EncodedDocuments]:
        """Like :meth:`read`, with a pause after each document and each piece of a long one."""
        layout = layout or self.prompts.fused_layout(None)
        self.document_kvs.refresh()
        limits = Limits(
            document=limit_of(self.settings, self.model.context_window, len(layout.prefix)),
            total=self.runner.max_fused_tokens if max_tokens is None else max_tokens,
            long_documents=self.settings.long_documents,
        )
        scope = Scope(layout.prefix, self.namespace)
        key_of = partial(self.document_kvs.key, scope=scope)
        return (yield from encoding_steps(documents, layout.documents, limits, key_of))

    def request(
        self,
        question: str,
        documents: Sequence[Document | str],
        prompt: Prompt,
        mode: ModeChoice | None,
        options: DecodingOptions,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        focus: FocusChoice = "auto",
        tools: ToolUse | None = None,
        format: AnswerFormat | None = None,
    ) -> Request:
        """Encode and check one question with its documents (``KVFusionGenerator.answer``)."""
        began = time.perf_counter()
        chosen, reason = self.prompts.mode(mode)
        most = self.prompts.focus(focus, chosen.name)
        _require_question(question, prompt)
        require_sequence(documents)
        has_documents = any(is_filled(document) for document in documents)
        layout = self.prompts.layout(
            question, prompt, chosen.name, has_documents=has_documents, template_kwargs=template_kwargs, tools=tools
        )
        encoded = self.read(documents, layout)
        if not encoded.keys:
            self._warn_once(
                "no documents: this is plain generation over the question alone"
                if prompt is None
                else "no separate documents: those in the prompt's own text are read as part of it and are not fused"
            )
        if prompt is not None and not self.encoder.follows_instructions and isinstance(layout, FixedLayout):
            self._warn_once(f"{self.model.model_id} reads bare questions; the wording around the question is ignored")
        if chosen.ape is not None:
            self.require_explicit_attention()
        if most is not None and needs_choice(encoded, most):
            request = self._focused(question, documents, encoded, layout, chosen, most, options, began)
        else:
            request = self.runner.request_for(encoded, layout, chosen, self.namespace, options, began)
        self._log_mode(chosen, reason)
        if tools is not None:
            return self._calling(request, tools, format)
        return request if format is None else replace(request, constraint=self.model.constraint(format))

    def _calling(self, request: Request, tools: ToolUse, format: AnswerFormat | None) -> Request:
        """Return ``request`` with an answer that may call tools, and otherwise has a format."""
        calls = self.prompts.call_format(request.mode.name)
        grammar = call_grammar(tools, calls, self.encoder.plain.ids_of_control, format)
        reader = CallReader(calls, request.question.ids)
        return replace(request, constraint=self.model.constraint(grammar), calls=reader)

    def _focused(
        self, question: str, documents: Sequence[Document | str], encoded: EncodedDocuments, layout: Layout,
        mode: AnswerMode, most: int, options: DecodingOptions, began: float,
    ) -> Request:  # fmt: skip
        """Return a request whose documents are still to be chosen. They are scored separately in every mode."""
        scored, prefix = encoded, layout.prefix
        if not mode.fuses:
            bare = self.prompts.fused_layout(None)
            scored, prefix = self.read(documents, bare), bare.prefix
        ids, given = scored_question(self.encoder.plain, question)
        scope = Scope(prefix, self.namespace)
        focus = Focus(most, encoded, scored, scope, ids, given, self.prompts.focus_weight)
        request = self.runner.request_for(focus.longest, layout, mode, self.namespace, options, began)
        return replace(request, focus=focus)

    def require_explicit_attention(self) -> None:
        """Reject a model whose attention cannot be replaced by ours; measured at the first call."""
        self.model.require_explicit_attention(self.encoder.prefix_ids, self.ordinary_ids())

    def _log_mode(self, mode: AnswerMode, reason: str) -> None:
        name, is_tuned, settings = self.model.model_id, self.model.is_tuned, self.settings
        decoder = "on" if is_tuned and mode.tuned else "off"
        logger.info("mode %s (%s), model %s, tuned decoder %s", mode.name, reason, name, decoder)
        if mode.ape is not None:
            logger.info("APE with temperature %g, scale %g", mode.ape.temperature, mode.ape.scale)
        if mode.name != "fusion":
            return
        if not (is_tuned or settings.tuned):
            self._warn_once(
                f"{name} was not trained to read fused documents and has no adapter; answers can be worse than in "
                "mode 'concat'"
            )
        if is_tuned and settings.mode == "concat" and settings.tuned_concat:
            self._warn_once(f"the tuned decoder of {name} was trained on joined prompts; its own mode is 'concat'")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _require_question(question: object, prompt: object) -> None:
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"the question is {question!r}, but it must be a text that is not blank.")
    if not isinstance(prompt, str | Sequence | None):
        raise InvalidInputError(f"the prompt is {prompt!r}, but it must be a text, a list of messages or None.")
    if isinstance(prompt, str) and not prompt.strip():
        raise InvalidInputError(
            f"the prompt is {prompt!r}, but it must not be blank; pass None to ask the question on its own."
        )
