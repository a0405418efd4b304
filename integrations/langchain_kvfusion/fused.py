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
from .framing import close_gap, has_frames, split_frames
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
    def parse(cls, text: str, retrieved: Sequence[LangChainDocument] = ()) -> FusedPrompt:
        """A finished prompt text: frames, or ``retrieved`` ones in it, become documents, and the rest is the wording.

        Without either the whole text is the question. Raises InvalidInputError for forged frames.
        """
        rest, found = cut_out(text, retrieved)
        if found and not has_frames(rest):
            return cls(text, documents=to_documents(found), question=bare_question(rest), prompt=rest)
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


def part(text: str, retrieved: Sequence[LangChainDocument] = ()) -> tuple[str, tuple[Document, ...]]:
    """``text`` without the documents that stand in it, framed or as they were ``retrieved``, and these.

    A frame inside a retrieved document is text of that document. Raises InvalidInputError for forged frames.
    """
    fused = FusedPrompt.parse(text, retrieved)
    return fused.prompt, fused.documents


def fuse_prompt(
    text: str, documents: Sequence[Document] = (), retrieved: Sequence[LangChainDocument] = ()
) -> FusedPrompt:
    """The prompt as the generator needs it, with the ``documents=`` that a call gave beside it.

    Where it gave none, those of the ``retrieved`` ones count that stand in the text.

    Raises:
        InvalidInputError: the prompt carries documents and the call gives some too; forged frames.
    """
    fused = text if isinstance(text, FusedPrompt) else FusedPrompt.parse(text, () if documents else retrieved)
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
