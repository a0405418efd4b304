"""How a request tells vLLM which documents its prompt begins with.

vLLM numbers tokens consecutively, so the question of a prompt with L document tokens is at position L. In KV-Fusion it
is at ``start``. With RoPE, attention depends only on distances, so both are equal if each key is moved by
L - ``start``, which the connector does by rotating it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidInputError
from ..store import is_document_key

FIELD = "kvfusion"  # key in ``kv_transfer_params``


@dataclass(frozen=True, slots=True)
class FusedPrompt:
    """The stored documents that a prompt begins with.

    Attributes:
        documents: store key and number of tokens of the prefix, if there is one, and of each document, in the order in
            which they are fused.
        start: position of the question's first token (``positions.question_start``).
    """

    documents: tuple[tuple[str, int], ...]
    start: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents together, which is vLLM's position of the question."""
        return sum(tokens for _, tokens in self.documents)

    @property
    def shift(self) -> int:
        """Positions by which each key has to be moved."""
        return self.tokens - self.start

    @property
    def salt(self) -> str:
        """Return the ``cache_salt`` that the request must have.

        vLLM finds blocks of other requests by token ids and salt. With this salt, only requests over the same
        documents at the same positions find these blocks.
        """
        return hashlib.sha256(json.dumps([FIELD, self.documents, self.start]).encode()).hexdigest()

    def params(self) -> dict[str, Any]:
        """Return the request's ``kv_transfer_params``."""
        return {FIELD: {"documents": [list(document) for document in self.documents], "start": self.start}}

    @classmethod
    def read(cls, params: object, *, salt: str | None, prompt_tokens: int) -> FusedPrompt | None:
        """Return what the ``kv_transfer_params`` of a request contain, or None if it reads no documents.

        Args:
            params: as the client sent them.
            salt: the request's ``cache_salt``.
            prompt_tokens: number of tokens of documents and question.

        Raises:
            InvalidInputError: the parameters are malformed, or the salt differs.
        """
        if not isinstance(params, dict) or FIELD not in params:
            return None
        given = params[FIELD]
        if not isinstance(given, dict) or given.keys() != {"documents", "start"}:
            raise InvalidInputError(f"{FIELD} is {_short(given)}, but it must be an object with documents and start.")
        documents, start = given["documents"], given["start"]
        if not isinstance(documents, Sequence) or not documents or not all(map(_is_document, documents)):
            raise InvalidInputError(
                f"documents is {_short(documents)}, but it must be a list of store keys with their numbers of tokens."
            )
        if type(start) is not int or start < 0:
            raise InvalidInputError(f"start is {_short(start)}, but it must be a position from 0.")
        prompt = cls(tuple((key, tokens) for key, tokens in documents), start)
        if prompt.tokens >= prompt_tokens:
            raise InvalidInputError(
                f"the documents have {prompt.tokens} tokens, but the whole prompt has {prompt_tokens}; it must "
                "consist of the documents' token ids and a question."
            )
        if salt != prompt.salt:
            raise InvalidInputError(
                f"cache_salt is {_short(salt)}, but it must be {prompt.salt!r}, so that no other request finds the "
                "blocks of these documents."
            )
        return prompt


def _is_document(given: object) -> bool:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        return False
    return is_document_key(given[0]) and type(given[1]) is int and given[1] > 0


def _short(value: object) -> str:
    return repr(value)[:100]
