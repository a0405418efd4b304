"""Frames: how separate documents travel through chains that only know strings.

``KVFusionDocumentPrompt`` writes each document between two control characters, signed, in place of the text
that a stock chain would join; ``split_frames`` takes the documents out of the prompt again. Documents and
questions are untrusted, so a frame counts only if this process signed it. Knows no model and no template.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import re
import secrets
from typing import Any

from langchain_core.prompts import StringPromptTemplate
from pydantic import model_validator

from kvfusion_rag import Document, InvalidInputError

_OPEN, _CLOSE, _FIELD_END = "\x02", "\x03", "\x1f"
_DELIMITERS = re.compile(f"[{_OPEN}{_CLOSE}]")
_FRAME = re.compile(f"{_OPEN}([0-9a-f]{{32}}){_FIELD_END}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


class KVFusionDocumentPrompt(StringPromptTemplate):
    """Keeps documents apart in chains that join them: pass it as their ``document_prompt``.

    ``create_stuff_documents_chain(llm, prompt, document_prompt=KVFusionDocumentPrompt())`` or
    ``RetrievalQA.from_chain_type(..., chain_type_kwargs={"document_prompt": KVFusionDocumentPrompt()})``.
    Keep the chain's document separator white space. ``title_key`` and ``id_key`` name metadata that becomes a
    document's title and id; LangChain then wants these keys in every document. The framed text is meant for
    a KVFusionLLM of the same process: any other model would see control characters.
    """

    title_key: str | None = None
    id_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_input_variables(cls, fields: dict[str, Any]) -> dict[str, Any]:
        keys = [key for key in (fields.get("title_key"), fields.get("id_key")) if key is not None]
        return {**fields, "input_variables": list(dict.fromkeys(["page_content", *keys]))}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_kvfusion", "framing"]

    @property
    def _prompt_type(self) -> str:
        return "kvfusion-document"

    def format(self, **kwargs: Any) -> str:
        """The frame of one document. Delimiters inside its text, title or id become spaces."""
        values = self._merge_partial_and_user_variables(**kwargs)
        title = str(values[self.title_key]) if self.title_key is not None else ""
        name = str(values[self.id_key]) if self.id_key is not None else ""
        return frame(Document(str(values["page_content"]), name or None, title or None))


def frame(document: Document) -> str:
    """One document as a signed frame; metadata does not travel."""
    name, title = (_cleaned(field or "").replace(_FIELD_END, " ") for field in (document.id, document.title))
    body = _FIELD_END.join((name, title, _cleaned(document.text)))
    return f"{_OPEN}{_signature(body)}{_FIELD_END}{body}{_CLOSE}"


def has_frames(text: str) -> bool:
    """Whether anything in ``text`` looks like a frame, forged ones too."""
    return _FRAME.search(text) is not None


def split_frames(text: str) -> tuple[str, tuple[Document, ...], str]:
    """What stands before the frames, their documents, and what stands after; all of it before if there are none.

    Raises:
        InvalidInputError: a frame is not signed by this process (a forged one, or one from another process),
            or something other than white space stands between two frames.
    """
    matches = list(_FRAME.finditer(text))
    if not matches:
        return text, (), ""
    for match in matches:
        if not hmac.compare_digest(match[1], _signature(match[2])):
            raise InvalidInputError(
                "the prompt holds a document frame that this process did not write; frames come from "
                "KVFusionDocumentPrompt alone and are read by a KVFusionLLM of the same process, so a question "
                "or another untrusted text probably carries a forged one."
            )
    for before, after in itertools.pairwise(matches):
        gap = text[before.end() : after.start()]
        if gap.strip():
            raise InvalidInputError(
                f"{gap[:40]!r} stands between two document frames, but only white space may; use a "
                "document_separator of white space, and name the documents once in the prompt."
            )
    return text[: matches[0].start()], tuple(_document(match[2]) for match in matches), text[matches[-1].end() :]


def close_gap(before: str, after: str) -> str:
    """``before`` and ``after`` joined where the documents were, with the wider of the two white spaces."""
    left, right = before.rstrip(), after.lstrip()
    if not left or not right:
        return left + right
    return left + max(before[len(left) :], after[: len(after) - len(right)], key=len) + right


def _document(body: str) -> Document:
    name, title, text = body.split(_FIELD_END, 2)
    return Document(text, name or None, title or None)


def _cleaned(text: str) -> str:
    return _DELIMITERS.sub(" ", text)


def _signature(body: str) -> str:
    return hmac.new(_signing_key(), body.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()[:32]


@functools.cache
def _signing_key() -> bytes:
    # One key per process: the chain that frames and the model that reads share no object that could hold it.
    return secrets.token_bytes(32)
