"""Finds the place of the documents in a formatted prompt template.

The template is formatted with two random marks instead of the documents, so its syntax (format string, Jinja, function
mappings) does not matter. The text between the marks is the separator of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from llama_index.core.base.llms.types import ChatMessage, TextBlock

from kvfusion_rag import DocumentsPlace, InvalidInputError

SEPARATOR = "\n\n"
"""Text between two documents, as LlamaIndex's compact synthesizer joins them."""

QUESTION_MARK = "\u2983question\u2984"
"""Placeholder for the question in a prompt that is formatted before the question is known."""

MessagePlace = tuple[int, DocumentsPlace]
"""Index of the message that contains the documents, and their place in its text."""


class ContextMarks:
    """Two random texts that mark the place of the documents in one formatted template."""

    def __init__(self) -> None:
        nonce = uuid4().hex
        self._first, self._second = f"kvfusion{nonce}a", f"kvfusion{nonce}b"

    @property
    def text(self) -> str:
        """The value of ``{context_str}``, which looks like two documents."""
        return f"{self._first}{SEPARATOR}{self._second}"

    def remove(self, text: str) -> tuple[str, DocumentsPlace]:
        """Remove the marks from `text`, and return the text and the place of the documents.

        Raises InvalidInputError if the template does not contain the documents exactly once.
        """
        before, _, rest = text.partition(self._first)
        separator, found, after = rest.partition(self._second)
        if not found or self._occurs_in(before + separator + after):
            raise _no_place()
        return before + after, DocumentsPlace(len(before), separator)

    def remove_from_messages(self, messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], MessagePlace]:
        """Like `remove` for the messages of a chat template, one of which contains the documents."""
        numbers = [n for n, message in enumerate(messages) if self._occurs_in(message.content or "")]
        if len(numbers) != 1:
            raise _no_place()
        number = numbers[0]
        shown = messages[number]
        text, place = self.remove(shown.content or "")
        blocks = [*(block for block in shown.blocks if not isinstance(block, TextBlock)), TextBlock(text=text)]
        cleaned = shown.model_copy(update={"blocks": blocks})
        return [*messages[:number], cleaned, *messages[number + 1 :]], (number, place)

    def _occurs_in(self, text: str) -> bool:
        return self._first in text or self._second in text


def _no_place() -> InvalidInputError:
    return InvalidInputError(
        "the template does not contain {context_str} exactly once and unchanged; use the variable exactly once, or "
        "pass a template without documents as query_template."
    )
