"""GeneratorBacked: what KVFusionLLM and ChatKVFusion share, a generator and the options of its answers.

Loads, copies and identifies; knows neither prompts nor messages, and answers nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams
from pydantic import AliasChoices, ConfigDict, Field

from kvfusion_rag import Document, InvalidInputError, Message, __version__

from .options import OPTION_NAMES, call_options

if TYPE_CHECKING:
    from kvfusion_rag import KVFusionGenerator, ShownPrompt

logger = logging.getLogger(__name__)

FocusChoice = Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None

# Subclasses set it themselves: of several bases pydantic takes the last one's, which is LangChain's.
STRICT_FIELDS = ConfigDict(extra="forbid", protected_namespaces=())


class GeneratorBacked(BaseLanguageModel[Any]):
    """A LangChain model over a KVFusionGenerator. Its subclasses are a BaseLLM or a BaseChatModel too."""

    generator: Any = Field(default=None, exclude=True, repr=False, description="The KVFusionGenerator.")
    model_id: str = Field(default="", description="The generator's name for its model.")
    temperature: float = Field(default=0.0, description="0 is greedy decoding.")
    max_tokens: int | None = Field(
        default=None,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Longest answer in tokens; None: the generator's default.",
    )
    top_p: float = Field(default=1.0, description="Nucleus sampling, used above temperature 0.")
    top_k: int | None = Field(default=None, description="Sample among the k likeliest tokens.")
    stop: list[str] | None = Field(default=None, description="Strings that end the answer, left out of it.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    mode: str | None = Field(
        default=None, description="'auto', 'fusion', 'concat' or 'ape'; None: the generator's mode."
    )
    focus: FocusChoice = Field(
        default="auto",
        description="Keep this many documents, those that make the question likeliest; None: all of them, also as a "
        "call's option; 'auto': the model's own number.",
    )
    attribution: str | None = Field(
        default=None, description="'attention' or 'effects': what sources say of their part in an answer."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the model's chat template; a call's own are added to them."
    )
    streaming: bool = Field(default=False, description="Report tokens to callbacks on a single prompt's invoke too.")
    strict: bool = Field(default=False, description="Refuse prompts that come without documents.")

    def __init__(self, *, generator: KVFusionGenerator, **fields: Any) -> None:
        """A ready ``generator``, and any field of this class or of LangChain's (cache, callbacks, tags, ...).

        Raises:
            InvalidInputError: ``model_id`` names another model than the generator's.
        """
        if fields.setdefault("model_id", generator.model_id) != generator.model_id:
            raise InvalidInputError(
                f"model_id is {fields['model_id']!r}, but the generator's is {generator.model_id!r}; leave it out, or "
                f"load another model with {type(self).__name__}.from_model_id."
            )
        everything: dict[str, Any] = {**fields, "generator": generator}
        super().__init__(**everything)
        metadata = self.metadata or {}
        versions = {**metadata.get("lc_versions", {}), "kvfusion-rag": __version__}
        self.metadata = {**metadata, "lc_versions": versions}

    @classmethod
    def from_model_id(cls, model_id: str | Path | None = None, **options: Any) -> Self:
        """Load a model: the default one, or a hub name or folder.

        Args:
            model_id: as ``KVFusionGenerator.from_pretrained`` takes it.
            options: fields of this class, and options of ``from_pretrained`` (revision, adapter, device, ...).

        Raises:
            TypeError: an option that neither knows; otherwise what ``from_pretrained`` raises.
        """
        from kvfusion_rag import KVFusionGenerator  # the model's libraries take seconds to import

        names = {*cls.model_fields, "max_new_tokens"} - {"generator", "model_id"}
        fields = {name: value for name, value in options.items() if name in names}
        loading = {name: value for name, value in options.items() if name not in names}
        return cls(generator=KVFusionGenerator.from_pretrained(model_id, **loading), **fields)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()  # a pickled model keeps its settings, never the weights
        return {**state, "__dict__": {**state["__dict__"], "generator": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()  # its settings are never changed in place, and the model is shared

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*OPTION_NAMES, "stop", "strict")}
        identity = None if self.generator is None else self.generator.identity()
        # Once more under a name of their own: in a cache's key a call's None would hide what is set here.
        return {"generator": identity, "model_id": self.model_id, **own, "set_here": own}

    def _name_model(self, params: LangSmithParams, given: Mapping[str, Any]) -> LangSmithParams:
        """LangSmith's parameters with our provider, model and length."""
        model = given.get("model") or self.model_id
        longest = given.get("max_tokens") or given.get("max_new_tokens") or self.max_tokens
        named: LangSmithParams = {**params, "ls_provider": "kvfusion", "ls_model_name": model}
        if longest is not None:
            named["ls_max_tokens"] = longest
        return named

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of ``text`` as plain text, by the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._engine().encode_text(text)

    def _decoding(self, stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a generator's call: those given for this one, before those set here."""
        options = {name: getattr(self, name) for name in OPTION_NAMES} | call_options(given)
        options["max_new_tokens"] = options.pop("max_tokens")
        options["chat_template_kwargs"] = {
            **(self.chat_template_kwargs or {}),
            **(given.get("chat_template_kwargs") or {}),
        } or None
        options["stop"] = (self.stop or []) if stop is None else stop
        return options

    def _shown(
        self,
        question: str,
        documents: Sequence[Document],
        prompt: Sequence[Message] | None,
        mode: str | None,
        focus: FocusChoice | EllipsisType,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> ShownPrompt:
        given = {"mode": mode, "chat_template_kwargs": chat_template_kwargs}
        options = self._decoding(None, given if focus is ... else {**given, "focus": focus})
        kept: Any = {name: options[name] for name in ("mode", "focus", "chat_template_kwargs")}
        return self._engine().show_prompt(question, documents, prompt=prompt, **kept)

    def _check_documents(self, *, all_have_documents: bool) -> None:
        """Raises InvalidInputError where this model is strict and a prompt came without documents."""
        if self.strict and not all_have_documents:
            raise InvalidInputError(
                f"a prompt came without documents, but this {type(self).__name__} is strict; pass documents= or use "
                "KVFusionPrompt, unless the retriever found nothing."
            )

    def _warn_of_missing_documents(self, *, all_have_documents: bool) -> None:
        """A joined prompt is the likeliest mistake, and a model trained on bare questions makes nothing of it."""
        if not self._engine().follows_instructions and not all_have_documents:
            logger.warning(
                "no separate documents reached %s: wrap the prompt in KVFusionPrompt.from_prompt(prompt) and give it "
                "the retriever's documents, or pass document_prompt=KVFusionDocumentPrompt() to a stock chain.",
                self.model_id,
            )  # fmt: skip

    def _engine(self) -> KVFusionGenerator:
        if self.generator is None:
            name = type(self).__name__
            raise InvalidInputError(
                f"this {name} has no generator, because pickling leaves the model out; make a new one with "
                f"{name}.from_model_id or {name}(generator=...)."
            )
        return self.generator
