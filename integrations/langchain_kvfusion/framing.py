"""Frames that carry separate documents through chains that only pass strings.

``KVFusionDocumentPrompt`` writes each document as a signed frame between control characters, where a standard chain
would insert its text. ``split_frames`` extracts the documents from the prompt. Documents and questions are untrusted,
so only frames signed by this process are accepted.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import re
import secrets
from dataclasses import dataclass
from typing import Any

from langchain_core.prompts import StringPromptTemplate
from pydantic import model_validator

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError

from .documents import TEXT_SEPARATOR, as_score

_OPEN, _CLOSE, _FIELD_END = "\x02", "\x03", "\x1f"
_DELIMITERS = re.compile(f"[{_OPEN}{_CLOSE}]")
_FRAME = re.compile(f"{_OPEN}([0-9a-f]{{32}}){_FIELD_END}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


class KVFusionDocumentPrompt(StringPromptTemplate):
    """A ``document_prompt`` that keeps documents separate in chains that join them.

    ``create_stuff_documents_chain(llm, prompt, document_prompt=KVFusionDocumentPrompt())`` or
    ``RetrievalQA.from_chain_type(..., chain_type_kwargs={"document_prompt": KVFusionDocumentPrompt()})``.
    The model reads the documents where the chain inserts them, separated by the chain's document separator, which must
    be white space. Only a KVFusionLLM or ChatKVFusion in the same process can read the framed text.

    Attributes:
        title_key, id_key, score_key: metadata keys of a document's title, id and score. LangChain requires them in
            every document. The model reads a title as a line "Title: ..." above the text.
    """

    title_key: str | None = None
    id_key: str | None = None
    score_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_input_variables(cls, fields: dict[str, Any]) -> dict[str, Any]:
        keys = [key for name in ("title_key", "id_key", "score_key") if (key := fields.get(name)) is not None]
        return {**fields, "input_variables": list(dict.fromkeys(["page_content", *keys]))}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_kvfusion", "framing"]

    @property
    def _prompt_type(self) -> str:
        return "kvfusion-document"

    def format(self, **kwargs: Any) -> str:
        """Return one document as a frame. Frame delimiters in its text, title or id become spaces."""
        values = self._merge_partial_and_user_variables(**kwargs)
        title = str(values[self.title_key]) if self.title_key is not None else ""
        name = str(values[self.id_key]) if self.id_key is not None else ""
        score = as_score(values[self.score_key]) if self.score_key is not None else None
        return frame(Document(str(values["page_content"]), name or None, title or None, score=score))


@dataclass(frozen=True)
class Extraction:
    """A text from which documents were removed.

    Attributes:
        text: the remaining text.
        documents: the removed documents.
        place: position of the documents in ``text``; None if there were none.
    """

    text: str
    documents: tuple[Document, ...] = ()
    place: DocumentsPlace | None = None


def frame(document: Document) -> str:
    """Return ``document`` as a signed frame, without its metadata."""
    name, title = (_cleaned(field or "").replace(_FIELD_END, " ") for field in (document.id, document.title))
    score = "" if document.score is None else repr(document.score)
    body = _FIELD_END.join((name, title, score, _cleaned(document.text)))
    return f"{_OPEN}{_signature(body)}{_FIELD_END}{body}{_CLOSE}"


def has_frames(text: str) -> bool:
    """Return whether ``text`` contains anything that looks like a frame, even a forged one."""
    return _FRAME.search(text) is not None


def split_frames(text: str) -> Extraction:
    """Extract the framed documents from ``text``.

    Raises:
        InvalidInputError: a frame was not signed by this process, a separator between two frames is not white space,
            or separators differ.
    """
    matches = list(_FRAME.finditer(text))
    if not matches:
        return Extraction(text)
    for match in matches:
        if not hmac.compare_digest(match[1], _signature(match[2])):
            raise InvalidInputError(
                "the prompt contains a document frame that this process did not write; only KVFusionDocumentPrompt in "
                "this process writes frames, so a question or another untrusted text probably contains a forged one."
            )
    documents = tuple(_document(match[2]) for match in matches)
    before, after = text[: matches[0].start()], text[matches[-1].end() :]
    place = DocumentsPlace(len(before), _separator(text, matches), any(document.title for document in documents))
    return Extraction(before + after, documents, place)


def _separator(text: str, matches: list[re.Match[str]]) -> str:
    gaps = [text[before.end() : after.start()] for before, after in itertools.pairwise(matches)]
    for gap in gaps:
        if gap.strip():
            raise InvalidInputError(
                f"the text between two document frames is {gap[:40]!r}, but it must be white space; set "
                "document_separator to white space, and use the documents only once in the prompt."
            )
    if len(set(gaps)) > 1:
        raise InvalidInputError(
            f"document frames are separated by {gaps[0][:40]!r} and by other white space, but all separators must be "
            "equal; use the documents only once in the prompt."
        )
    return gaps[0] if gaps else TEXT_SEPARATOR


def _document(body: str) -> Document:
    name, title, score, text = body.split(_FIELD_END, 3)
    return Document(text, name or None, title or None, score=float(score) if score else None)


def _cleaned(text: str) -> str:
    return _DELIMITERS.sub(" ", text)


def _signature(body: str) -> str:
    return hmac.new(_signing_key(), body.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()[:32]


@functools.cache
def _signing_key() -> bytes:
    # One key per process, because the chain that writes frames and the model that reads them share no object.
    return secrets.token_bytes(32)
