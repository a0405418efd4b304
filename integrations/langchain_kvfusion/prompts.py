"""KVFusionPrompt: a wrapper around any LangChain prompt template that keeps documents separate.

The wrapped template is formatted with a random marker instead of the documents, so its syntax (f-string, mustache,
chat messages) does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate
from pydantic import model_validator

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError, Message

from .conversations import carry
from .documents import TEXT_SEPARATOR, joined_text, to_document, to_documents
from .framing import Extraction, split_frames
from .fused import FusedPrompt
from .messages import calls_tools, last_human_text, lifted_documents, map_text, message_text, role_of
from .questions import bare_question, labelled_question

logger = logging.getLogger(__name__)

QUESTION_KEYS = ("question", "input", "query")


class KVFusionPromptValue(PromptValue):
    """A formatted prompt with separate documents.

    A KVFusionLLM uses ``to_string()`` and a ChatKVFusion ``conversation()``, which carry the documents. Any other
    model gets the ordinary prompt from ``to_string()`` or ``to_messages()``.

    Attributes:
        question: the bare question.
        documents: the separate documents.
        messages: the ordinary messages including the documents.
        turns: the generator's messages, without the documents but with their place.
    """

    question: str
    documents: list[Document]
    messages: list[BaseMessage]
    turns: list[Message]

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_kvfusion", "prompts"]

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return {
            "documents": [asdict(document) for document in self.documents],
            "turns": [asdict(turn) for turn in self.turns],
        }

    def to_string(self) -> FusedPrompt:
        return FusedPrompt.of(self.turns, self.documents, self.question)

    def to_messages(self) -> list[BaseMessage]:
        return list(self.messages)

    def conversation(self) -> list[BaseMessage]:
        """Return the messages without the documents' texts. The last human message carries documents and question."""
        return carry(self.turns, self.documents, self.question)


class KVFusionPrompt(BasePromptTemplate[str]):
    """A prompt template that passes documents to the model separately. Create it with :meth:`from_prompt`.

    ``{"context": retriever, "question": RunnablePassthrough()} | KVFusionPrompt.from_template(...) | llm``

    The model reads the messages of the wrapped template, with the documents in place of their variable and a blank
    line between two documents, as if its value were ``"\\n\\n".join(page_contents)``.

    Attributes:
        prompt: the wrapped template. It must contain the documents' variable exactly once.
        documents_key: name of the variable with the documents: a list of LangChain documents, Documents, strings or
            mappings with "text". A joined string is used as one document, with a warning.
        question_key: name of the variable with the bare question. By default the first of "question", "input" and
            "query" that the template has. Without these, the question is taken from the text, see ``bare_question``.
        strict: whether to reject joined strings.
    """

    prompt: BasePromptTemplate  # pyright: ignore[reportMissingTypeArgument]  # pydantic checks the class
    documents_key: str = "context"
    question_key: str | None = None
    strict: bool = False

    @classmethod
    def from_prompt(
        cls,
        prompt: BasePromptTemplate[Any],
        documents_key: str = "context",
        question_key: str | None = None,
        *,
        strict: bool = False,
    ) -> KVFusionPrompt:
        """Wrap ``prompt``.

        Raises:
            InvalidInputError: it has no variable ``documents_key`` or ``question_key``.
        """
        known = sorted({*prompt.input_variables, *prompt.optional_variables, *prompt.partial_variables})
        for key in (documents_key, question_key):
            if key is not None and key not in known:
                raise InvalidInputError(
                    f"the prompt has the variables {known}, but not {key!r}; pass the name of the documents' variable "
                    "as documents_key= and that of the question as question_key=."
                )
        return cls(
            input_variables=list(prompt.input_variables),
            prompt=prompt,
            documents_key=documents_key,
            question_key=question_key,
            strict=strict,
        )

    @classmethod
    def from_template(
        cls, template: str, documents_key: str = "context", question_key: str | None = None, *, strict: bool = False
    ) -> KVFusionPrompt:
        """Wrap an f-string template, see ``PromptTemplate.from_template``."""
        return cls.from_prompt(PromptTemplate.from_template(template), documents_key, question_key, strict=strict)

    @model_validator(mode="after")
    def _describe_inputs(self) -> KVFusionPrompt:
        own = {self.documents_key: Sequence[Any]}
        self.input_types = {**self.prompt.input_types, **own, **self.input_types}
        return self

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_kvfusion", "prompts"]

    @property
    def _prompt_type(self) -> str:
        return "kvfusion"

    def format(self, **kwargs: Any) -> FusedPrompt:
        return self.format_prompt(**kwargs).to_string()

    async def aformat(self, **kwargs: Any) -> FusedPrompt:
        return (await self.aformat_prompt(**kwargs)).to_string()

    def format_prompt(self, **kwargs: Any) -> KVFusionPromptValue:
        """Format the prompt with the template's variables.

        Raises:
            InvalidInputError: the documents cannot be converted, or the template does not show them.
        """
        found, marker, variables = self._marked(kwargs)
        return self._assemble(self.prompt.format_prompt(**variables), found, marker, variables)

    async def aformat_prompt(self, **kwargs: Any) -> KVFusionPromptValue:
        found, marker, variables = self._marked(kwargs)
        return self._assemble(await self.prompt.aformat_prompt(**variables), found, marker, variables)

    def _marked(self, given: Mapping[str, Any]) -> tuple[Extraction, str, dict[str, Any]]:
        """Return the documents, a marker, and the template's variables with the marker instead of the documents.

        Without documents their variable is empty, so that a template can omit the text around it.
        """
        variables = self._merge_partial_and_user_variables(**given)
        found = self._read_documents(variables[self.documents_key])
        marker, text = f"kvfusion{uuid4().hex}", found.text
        if found.documents:
            at = 0 if found.place is None else found.place.offset
            text = text[:at] + marker + text[at:]
        return found, marker, {**variables, self.documents_key: text}

    def _read_documents(self, value: Any) -> Extraction:
        if isinstance(value, str):
            return self._read_joined(value)
        if isinstance(value, Document | LangChainDocument | Mapping):
            return Extraction("", (to_document(value),))
        return Extraction("", to_documents(value))

    def _read_joined(self, text: str) -> Extraction:
        found = split_frames(text)
        if not found.text.strip():
            return found
        problem = (
            f"{self.documents_key!r} is a string of {len(text)} characters, so its documents cannot be separated; "
            "pass the list of documents, or create the chain with create_kvfusion_documents_chain."
        )
        if found.documents or self.strict:
            raise InvalidInputError(problem)
        logger.warning("%s It is used as one document.", problem)
        return Extraction("", (Document(text),))

    def _assemble(
        self, formatted: PromptValue, found: Extraction, marker: str, variables: Mapping[str, Any]
    ) -> KVFusionPromptValue:
        is_chat = isinstance(formatted, ChatPromptValue)
        messages = formatted.to_messages() if is_chat else [HumanMessage(content=formatted.to_string())]
        if found.documents:
            self._require_one_place(sum(message_text(message).count(marker) for message in messages))
        if lifted := lifted_documents(messages):
            raise InvalidInputError(
                f"the messages carry {len(lifted)} documents in addition to {self.documents_key!r}; pass them in one "
                "way only."
            )
        place = found.place or DocumentsPlace(0)
        joined = joined_text(found.documents, separator=place.separator, titles=place.titles)
        turns = _turns(messages, marker, place)
        question = self._named_question(variables)
        if question is None:
            whole = TEXT_SEPARATOR.join(turn.text for turn in turns)
            question = _question_in(last_human_text(messages), marker) or bare_question(whole)
        return KVFusionPromptValue(
            question=question,
            documents=list(found.documents),
            messages=[map_text(message, lambda text: text.replace(marker, joined)) for message in messages],
            turns=turns,
        )

    def _require_one_place(self, times: int) -> None:
        if times == 0:
            raise InvalidInputError(
                f"the template does not insert {self.documents_key!r} unchanged; a template that hides or loops over "
                "the documents cannot keep them separate, so use the variable exactly once."
            )
        if times > 1:
            raise InvalidInputError(
                f"the template contains {self.documents_key!r} {times} times, but it must contain it exactly once."
            )

    def _named_question(self, variables: Mapping[str, Any]) -> str | None:
        known = self.prompt._merge_partial_and_user_variables(**variables)
        if self.question_key is None:
            return next((known[key] for key in QUESTION_KEYS if self._uses(key) and isinstance(known[key], str)), None)
        question = known[self.question_key]
        if not isinstance(question, str):
            raise InvalidInputError(
                f"{self.question_key!r} is a {type(question).__name__}, but the question must be a string; pass "
                "the name of another variable as question_key=."
            )
        return question

    def _uses(self, key: str) -> bool:
        return key != self.documents_key and (
            key in self.prompt.input_variables or key in self.prompt.partial_variables
        )


def _turns(messages: Sequence[BaseMessage], marker: str, place: DocumentsPlace) -> list[Message]:
    """Convert ``messages`` into the generator's messages, with the documents in place of the marker."""
    turns: list[Message] = []
    for message in messages:
        before, found, after = message_text(message).partition(marker)
        shown = replace(place, offset=len(before)) if found else None
        if shown is not None or (before.strip() and not calls_tools(message)):
            turns.append(Message(role_of(message), before + after, shown))
    if turns and all(turn.role == "system" for turn in turns):  # a prompt must end with a user message
        turns[-1] = replace(turns[-1], role="user")
    return turns or [Message("user", "")]


def _question_in(human: str | None, marker: str) -> str | None:
    if human is None or marker in human:  # a message around the documents contains more than the question
        return human and bare_question(human.replace(marker, ""))
    return labelled_question(human) or human
