"""GeneratorBacked: the generator and the options that KVFusionLLM and ChatKVFusion have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams, LanguageModelInput
from pydantic import AliasChoices, ConfigDict, Field

from kvfusion_rag import InvalidInputError, UnknownOptionError, __version__

from .documents import DocumentsArgument
from .options import OPTION_NAMES, call_options

if TYPE_CHECKING:
    from kvfusion_rag import KVFusionGenerator, ShownPrompt

logger = logging.getLogger(__name__)

FocusChoice = Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None
MinSupport = Annotated[float, Field(strict=True, ge=0, le=1)] | Literal["auto"] | None

# Each subclass must set it, because with several base classes pydantic uses that of the last one, LangChain's.
STRICT_FIELDS = ConfigDict(extra="forbid", protected_namespaces=())


class GeneratorBacked(BaseLanguageModel[Any]):
    """Base class of LangChain models over a KVFusionGenerator. Subclasses also inherit BaseLLM or BaseChatModel."""

    generator: Any = Field(default=None, exclude=True, repr=False, description="The KVFusionGenerator.")
    model_id: str = Field(default="", description="The model id of the generator.")
    temperature: float = Field(default=0.0, description="Sampling temperature; 0 is greedy decoding.")
    max_tokens: int | None = Field(
        default=None,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Maximum tokens of an answer. None: the generator's default.",
    )
    max_reasoning_tokens: int | None = Field(
        default=None,
        description="Maximum tokens of the reasoning in front of an answer. None: the generator's default.",
    )
    top_p: float = Field(default=1.0, description="Nucleus sampling for temperatures above 0.")
    top_k: int | None = Field(default=None, description="Sample from the k most likely tokens.")
    stop: list[str] | None = Field(default=None, description="Strings that end the answer and are removed from it.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    mode: str | None = Field(
        default=None, description="'auto', 'fusion', 'concat' or 'ape'. None: the generator's mode."
    )
    focus: FocusChoice = Field(
        default="auto",
        description="Number of documents to keep, those that make the question most likely. None, also in a call, "
        "keeps all documents. 'auto': the model's own number.",
    )
    attribution: str | None = Field(
        default=None, description="'attention' or 'effects': adds each document's contribution to the sources."
    )
    min_support: MinSupport = Field(
        default=None,
        description="Support by the documents (0 to 1) from which an answer counts as found, or 'auto' for the "
        "threshold of the model's calibration: adds support, found and a notice. None: the generator's setting.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the model's chat template, merged with those of a call."
    )
    streaming: bool = Field(default=False, description="Report tokens to callbacks in invoke with one prompt, too.")
    strict: bool = Field(default=False, description="Reject prompts without documents.")

    def __init__(self, *, generator: KVFusionGenerator | None = None, **fields: Any) -> None:
        """Wrap a loaded ``generator``.

        Args:
            fields: fields of this class or of LangChain's base class (cache, callbacks, tags, ...). ``model`` and
                ``model_name`` are other names of ``model_id``.

        Raises:
            InvalidInputError: there is no generator, ``model_id`` differs from the generator's, or a field is unknown.
        """
        own = type(self).__name__
        fields = _with_model_id(fields)
        if generator is None:
            model = repr(fields.get("model_id", "MODEL"))
            raise InvalidInputError(f"{own} needs a loaded generator; load a model with {own}.from_model_id({model}).")
        UnknownOptionError.raise_for(fields, {*type(self).model_fields, "max_new_tokens"}, own)
        if fields.setdefault("model_id", generator.model_id) != generator.model_id:
            raise InvalidInputError(
                f"model_id is {fields['model_id']!r}, but the generator's model is {generator.model_id!r}; omit it, "
                f"or load another model with {own}.from_model_id."
            )
        everything: dict[str, Any] = {**fields, "generator": generator}
        super().__init__(**everything)
        metadata = self.metadata or {}
        versions = {**metadata.get("lc_versions", {}), "kvfusion-rag": __version__}
        self.metadata = {**metadata, "lc_versions": versions}

    @classmethod
    def from_model_id(cls, model_id: str | Path | None = None, **options: Any) -> Self:
        """Load a model and wrap it.

        Args:
            model_id: hub name or folder, see ``KVFusionGenerator.from_pretrained``; ``None`` for the default model.
            options: fields of this class, and options of ``from_pretrained`` (revision, adapter, device, ...).
                ``model`` and ``model_name`` are other names of ``model_id``.

        Raises:
            InvalidInputError: an option is unknown to both. Other errors are those of ``from_pretrained``.
        """
        from kvfusion_rag import KVFusionGenerator  # importing torch takes seconds

        options = _with_model_id(options)
        model_id = options.pop("model_id", model_id)
        names = {*cls.model_fields, "max_new_tokens"} - {"generator", "model_id"}
        UnknownOptionError.raise_for(
            options, names | KVFusionGenerator.load_options(), f"{cls.__name__}.from_model_id"
        )
        fields = {name: value for name, value in options.items() if name in names}
        loading = {name: value for name, value in options.items() if name not in names}
        return cls(generator=KVFusionGenerator.from_pretrained(model_id, **loading), **fields)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()  # pickling keeps the settings and drops the weights
        return {**state, "__dict__": {**state["__dict__"], "generator": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()  # settings are never changed in place, and the model is shared

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*OPTION_NAMES, "stop", "strict")}
        identity = None if self.generator is None else self.generator.identity()
        # Repeated under a separate key, because in a cache key an option None of a call would hide the value set here.
        return {"generator": identity, "model_id": self.model_id, **own, "set_here": own}

    def _add_model_params(self, params: LangSmithParams, options: Mapping[str, Any]) -> LangSmithParams:
        """Add provider, model and maximum tokens to LangSmith's parameters."""
        model = options.get("model") or self.model_id
        max_tokens = options.get("max_tokens") or options.get("max_new_tokens") or self.max_tokens
        added: LangSmithParams = {**params, "ls_provider": "kvfusion", "ls_model_name": model}
        if max_tokens is not None:
            added["ls_max_tokens"] = max_tokens
        return added

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of plain ``text`` from the model's tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._engine().encode_text(text)

    def _generator_options(self, stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the generator's options: those ``given`` for one call, and otherwise those set here."""
        options = {name: getattr(self, name) for name in OPTION_NAMES} | call_options(given)
        options["max_new_tokens"] = options.pop("max_tokens")
        options["chat_template_kwargs"] = {
            **(self.chat_template_kwargs or {}),
            **(given.get("chat_template_kwargs") or {}),
        } or None
        options["stop"] = (self.stop or []) if stop is None else stop
        return options

    def show_prompt(
        self,
        input: LanguageModelInput,
        *,
        documents: DocumentsArgument | None = None,
        mode: str | None = None,
        focus: FocusChoice | EllipsisType = ...,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ShownPrompt:
        """Return the complete prompt for ``input``, which has the type that ``invoke`` takes, without answering it.

        Options that are not given have the value set here. With ``focus``, the prompt has the documents that it keeps.
        In a chain, use ``(prompt | llm.show_prompt).invoke(...)``.
        """
        given = {"mode": mode, "chat_template_kwargs": chat_template_kwargs}
        options = self._generator_options(None, given if focus is ... else {**given, "focus": focus})
        shown = {name: options[name] for name in ("mode", "focus", "chat_template_kwargs")}
        return self._engine().show_prompt(**self._request(input, documents), **shown)

    @abstractmethod
    def _request(self, input: LanguageModelInput, documents: DocumentsArgument | None) -> dict[str, Any]:
        """Return question, documents and prompt of ``input`` as arguments of the generator."""

    def _check_documents(self, *, all_have_documents: bool) -> None:
        """Raise InvalidInputError if this model is strict and a prompt has no documents."""
        if self.strict and not all_have_documents:
            raise InvalidInputError(
                f"a prompt has no documents, but this {type(self).__name__} is strict; pass documents= or use "
                "KVFusionPrompt, and check that the retriever found something."
            )

    def _warn_of_missing_documents(self, *, all_have_documents: bool) -> None:
        """Log a warning if a model that reads only bare questions gets a prompt with documents joined into it."""
        if not self._engine().follows_instructions and not all_have_documents:
            logger.warning(
                "no separate documents reached %s; wrap the prompt in KVFusionPrompt.from_prompt(prompt) and pass it "
                "the retriever's documents, or pass document_prompt=KVFusionDocumentPrompt() to a standard chain.",
                self.model_id,
            )  # fmt: skip

    def _engine(self) -> KVFusionGenerator:
        if self.generator is None:
            name = type(self).__name__
            raise InvalidInputError(
                f"this {name} has no generator, because pickling drops the model; create a new one with "
                f"{name}.from_model_id or {name}(generator=...)."
            )
        return self.generator


def _with_model_id(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with ``model_id`` in place of its other names, which other chat models have."""
    return {"model_id" if name in ("model", "model_name") else name: value for name, value in options.items()}
