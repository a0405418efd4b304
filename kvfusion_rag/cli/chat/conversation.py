"""A conversation about documents: each question is rewritten so that it stands alone, then documents are retrieved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...schema import FocusChoice, Message, ModeChoice

if TYPE_CHECKING:
    from ... import Answer, AnswerStream, Document, KVFusionGenerator

MAX_TURNS = 3  # earlier turns that a rewritten question can refer to
MAX_STANDALONE_TOKENS = 64
MAX_STANDALONE_CHARACTERS = 500
MAX_ANSWER_CHARACTERS = 500  # of an earlier answer, when a question is rewritten
_REWRITE = (
    "Here is a conversation:\n\n{turns}\n\nRewrite the next question so that it can be understood without the "
    "conversation. Write only the question.\n\nNext question: {question}"
)
# Words by which an English question refers to what was said before.
_REFERENCE = re.compile(
    r"\b(it|its|they|them|their|theirs|he|him|his|she|her|hers|this|that|these|those|there|then|one|ones)\b", re.I
)
MAX_FRAGMENT_WORDS = 3  # "And in winter?"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question as it was typed and as it was read, its documents in the retriever's order, and the answer."""

    question: str
    standalone: str
    documents: Sequence[Document]
    answer: Answer


class Conversation:
    """Questions over the same files, each of which may refer to the ones before.

    Args:
        retrieve: returns the documents of a question that stands alone.
        mode: how documents are read; ``None`` for the model's own.
        focus: how many documents are kept.
        decoding: options of the answers' tokens.

    Attributes:
        turns: all answered questions since the conversation began.
    """

    def __init__(
        self,
        generator: KVFusionGenerator,
        retrieve: Callable[[str], Sequence[Document]],
        *,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        self._generator = generator
        self._retrieve = retrieve
        self.mode: ModeChoice | None = mode
        self.focus: FocusChoice = focus
        self._decoding = dict(decoding or {})
        self.turns: list[Turn] = []

    def forget(self) -> None:
        """Begin a new conversation over the same files."""
        self.turns.clear()

    def standalone(self, question: str) -> str:
        """Return ``question`` so that it can be understood without the conversation.

        A model that follows instructions rewrites it. For a model that reads bare questions, the question before it is
        put in front if it has a word such as "it" or consists of a few words only.
        """
        if not self.turns:
            return question
        if self._generator.follows_instructions:
            return self._rewritten(question)
        is_fragment = len(question.split()) <= MAX_FRAGMENT_WORDS
        if is_fragment or _REFERENCE.search(question):
            return f"{self.turns[-1].question} {question}"
        return question

    def begin(self, question: str) -> Reply:
        """Retrieve the documents of a question, and return its answer as a stream that has not begun."""
        standalone = self.standalone(question)
        documents = self._retrieve(standalone)
        stream = self._generator.stream(standalone, documents, mode=self.mode, focus=self.focus, **self._decoding)
        return Reply(question, standalone, documents, stream)

    def finish(self, reply: Reply) -> Turn:
        """Add the answered question to the conversation."""
        assert reply.stream.answer is not None  # the stream is exhausted
        turn = Turn(reply.question, reply.standalone, reply.documents, reply.stream.answer)
        self.turns.append(turn)
        return turn

    def _rewritten(self, question: str) -> str:
        turns = "\n\n".join(
            f"Question: {turn.question}\nAnswer: {turn.answer.text.strip()[:MAX_ANSWER_CHARACTERS]}"
            for turn in self.turns[-MAX_TURNS:]
        )
        prompt = [Message("user", _REWRITE.format(turns=turns, question=question))]
        answer = self._generator.answer(question, (), prompt=prompt, max_new_tokens=MAX_STANDALONE_TOKENS)
        line = next((line.strip() for line in answer.text.splitlines() if line.strip()), "")
        # A truncated or very long text is not a question.
        is_usable = answer.finish_reason == "stop" and 0 < len(line) <= MAX_STANDALONE_CHARACTERS
        return line if is_usable else question


@dataclass(frozen=True, slots=True)
class Reply:
    """A question with its documents, and its answer as a stream."""

    question: str
    standalone: str
    documents: Sequence[Document]
    stream: AnswerStream
