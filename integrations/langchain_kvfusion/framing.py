"""Frames: how separate documents travel through chains that only know strings.

``KVFusionDocumentPrompt`` writes each document between two control characters, signed, in place of the text
that a stock chain would join. ``split_frames`` takes the documents out of the prompt again and says where they
stood. Documents and questions are untrusted, so a frame counts only if this process signed it. Knows no model and
no template.
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
    """Keeps documents apart in chains that join them: pass it as their ``document_prompt``.

    ``create_stuff_documents_chain(llm, prompt, document_prompt=KVFusionDocumentPrompt())`` or
    ``RetrievalQA.from_chain_type(..., chain_type_kwargs={"document_prompt": KVFusionDocumentPrompt()})``.
    The model reads the documents where the chain puts them, with the chain's document separator between them, which
    must be white space. ``title_key``, ``id_key`` and ``score_key`` name metadata that becomes a document's title, id
    and score; LangChain then wants these keys in every document. The model reads a title as a line "Title: ..." above
    the text.
    Only a KVFusionLLM or ChatKVFusion of the same process can read the framed text.
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
        """The frame of one document. Delimiters inside its text, title or id become spaces."""
        values = self._merge_partial_and_user_variables(**kwargs)
        title = str(values[self.title_key]) if self.title_key is not None else ""
        name = str(values[self.id_key]) if self.id_key is not None else ""
        score = as_score(values[self.score_key]) if self.score_key is not None else None
        return frame(Document(str(values["page_content"]), name or None, title or None, score=score))


@dataclass(frozen=True)
class Extraction:
    """A text without the documents that stood in it.

    Attributes:
        text: what is left of it.
        place: where in ``text`` the documents stood; None if there were none.
    """

    text: str
    documents: tuple[Document, ...] = ()
    place: DocumentsPlace | None = None


def frame(document: Document) -> str:
    """One document as a signed frame; metadata does not travel."""
    name, title = (_cleaned(field or "").replace(_FIELD_END, " ") for field in (document.id, document.title))
    score = "" if document.score is None else repr(document.score)
    body = _FIELD_END.join((name, title, score, _cleaned(document.text)))
    return f"{_OPEN}{_signature(body)}{_FIELD_END}{body}{_CLOSE}"


def has_frames(text: str) -> bool:
    """Whether anything in ``text`` looks like a frame, forged ones too."""
    return _FRAME.search(text) is not None


def split_frames(text: str) -> Extraction:
    """The framed documents of ``text``, and the text around them unchanged.

    Raises:
        InvalidInputError: a frame is not signed by this process (a forged one, or one from another process),
            something other than white space stands between two frames, or the gaps between frames differ.
    """
    matches = list(_FRAME.finditer(text))
    if not matches:
        return Extraction(text)
    for match in matches:
        if not hmac.compare_digest(match[1], _signature(match[2])):
            raise InvalidInputError(
                "the prompt holds a document frame that this process did not write; frames come from "
                "KVFusionDocumentPrompt alone and are read by a KVFusionLLM of the same process, so a question "
                "or another untrusted text probably carries a forged one."
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
                f"{gap[:40]!r} stands between two document frames, but only white space may; use a "
                "document_separator of white space, and name the documents once in the prompt."
            )
    if len(set(gaps)) > 1:
        raise InvalidInputError(
            f"{gaps[0][:40]!r} and other white space stand between document frames, but the gaps must be equal; name "
            "the documents once in the prompt."
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
    # One key per process: the chain that frames and the model that reads share no object that could hold it.
    return secrets.token_bytes(32)
