"""What reaches the model: one prompt text with its separate documents, its bare question and its wording.

BaseLLM turns every input into a ``str`` and hands that on untouched, so ``FusedPrompt`` is a ``str`` (the
ordinary prompt, legible in traces) that carries the rest. Knows no template and no generator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.prompt_values import PromptValue
from pydantic import InstanceOf

from kvfusion_rag import Document, InvalidInputError

from .documents import TEXT_SEPARATOR, joined_text, to_documents
from .framing import close_gap, split_frames
from .matching import cut_out
from .questions import bare_question


class FusedPrompt(str):
    """The ordinary prompt text, with ``documents``, ``question`` (bare) and ``prompt`` (wording without documents).

    String operations give a plain ``str`` and lose all three.
    """

    documents: tuple[Document, ...]
    question: str
    prompt: str

    def __new__(
        cls, text: str, *, documents: Sequence[Document] = (), question: str | None = None, prompt: str | None = None
    ) -> FusedPrompt:
        self = super().__new__(cls, text)
        self.documents = tuple(documents)
        self.prompt = str(text) if prompt is None else prompt
        self.question = self.prompt if question is None else question
        return self

    @classmethod
    def parse(cls, text: str) -> FusedPrompt:
        """A finished prompt text: its frames become documents, and the rest is the wording.

        Without frames the whole text is the question. Raises InvalidInputError for forged frames.
        """
        before, documents, after = split_frames(text)
        if not documents:
            return cls(text)
        wording = close_gap(before, after)
        ordinary = f"{before}{joined_text(documents)}{after}"
        return cls(ordinary, documents=documents, question=bare_question(wording), prompt=wording)

    def digest(self) -> str:
        """Hex digest of everything beyond the text that changes the answer or its sources."""
        documents = [[document.id, document.title, document.text] for document in self.documents]
        content = json.dumps([documents, self.question, self.prompt])
        return hashlib.sha256(content.encode()).hexdigest()


class FusedPromptValue(PromptValue):
    """Hands one ready FusedPrompt to a model."""

    fused: InstanceOf[FusedPrompt]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    def to_string(self) -> FusedPrompt:
        return self.fused

    def to_messages(self) -> list[BaseMessage]:
        return [HumanMessage(content=str(self.fused))]


def fuse_prompt(text: str, documents: Sequence[Document] = ()) -> FusedPrompt:
    """The prompt as the generator needs it, with the ``documents=`` that a call gave beside it.

    Raises:
        InvalidInputError: the prompt carries documents and the call gives some too; forged frames.
    """
    fused = text if isinstance(text, FusedPrompt) else FusedPrompt.parse(text)
    if not documents:
        return fused
    if fused.documents:
        raise InvalidInputError(
            f"the prompt carries {len(fused.documents)} documents and documents= gives {len(documents)}; pass them "
            "one way only."
        )
    return FusedPrompt(
        f"{joined_text(documents)}{TEXT_SEPARATOR}{fused}",
        documents=documents,
        question=fused.question if isinstance(text, FusedPrompt) else bare_question(text),
        prompt=fused.prompt,
    )


def take_out(prompt: FusedPrompt, retrieved: Sequence[LangChainDocument]) -> FusedPrompt:
    """``prompt`` with those of the ``retrieved`` documents that stand in its text apart; as it is if it has others."""
    if prompt.documents or not retrieved:
        return prompt
    wording, documents = cut_out(prompt.prompt, retrieved)
    question, within = cut_out(prompt.question, retrieved)
    if within:  # a template around the documents says more than the question
        question = bare_question(question)
    return FusedPrompt(prompt, documents=to_documents(documents), question=question, prompt=wording)
