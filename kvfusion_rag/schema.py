"""The data that passes between the parts: documents in, answers out.

Frozen dataclasses without behaviour beyond small derived properties. This module knows no model, no
tokenizer and no store, and loads no torch; keys and values of documents are in ``kv.py``.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Mode = Literal["fusion", "concat", "ape"]
MODES: tuple[Mode, ...] = get_args(Mode)
ModeChoice = Literal["auto", "fusion", "concat", "ape"]  # what callers may ask for; "auto" becomes one of the modes
FocusChoice = int | Literal["auto"] | None  # how many documents to keep; "auto" becomes a number or None (all)
FinishReason = Literal["stop", "length", "cancelled"]
Attributed = Literal["attention", "effects"]  # what sources say of their part in an answer, if that is asked for
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
Origin = Literal["memory", "disk", "remote", "computed", "prompt", "blank"]


@dataclass(frozen=True, slots=True)
class Document:
    """One retrieved passage: the unit that is prefilled alone.

    ``id`` names it in sources and citations (the caller's order number where it is missing); ``title``
    is read by the model when its template has a place for it; ``metadata`` is carried, never read. ``score`` is the
    retriever's, higher for a better document; focus may weigh it.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    score: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentsPlace:
    """Where a message's text shows the documents, and how they are written there.

    Attributes:
        offset: characters of the text that stand in front of the documents.
        separator: text between two documents.
        titles: whether a document's title is written above its text.
    """

    offset: int
    separator: str = "\n\n"
    titles: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; ``prompt=`` takes a list of them, the user's last.

    ``text`` does not contain the documents. ``documents`` says where they belong, in one message of a prompt at most.
    """

    role: Role
    text: str
    documents: DocumentsPlace | None = None

    @classmethod
    def around(cls, role: Role, before: str, after: str, *, separator: str = "\n\n", titles: bool = False) -> Message:
        """A message that shows the documents between ``before`` and ``after``."""
        return cls(role, before + after, DocumentsPlace(len(before), separator, titles))


Prompt = str | Sequence[Message] | None  # the caller's wording without the documents; None: the bare question


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A part of what the model reads. ``document_id`` is None for text around the documents."""

    text: str
    document_id: str | None = None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """Everything that the model reads for one question, in order, control tokens included.

    ``str()`` marks the borders of the documents; ``text`` is the prompt without these marks.
    """

    mode: Mode
    parts: tuple[PromptPart, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    def __str__(self) -> str:
        return "".join(
            part.text if part.document_id is None else f"⟦document {part.document_id}⟧{part.text}⟦end⟧"
            for part in self.parts
        )


@dataclass(frozen=True, slots=True)
class Source:
    """What became of one of the caller's documents.

    ``origin`` says where its keys and values came from: ``memory``, ``disk`` or ``remote`` (the store's tiers),
    ``computed`` (prefilled now), ``prompt`` (joined into the prompt, mode ``concat``) or ``blank`` (no text, skipped).
    ``miss`` is the reason why the store had a computed one not (of its first missing piece).
    ``attention`` and ``effect`` are those of ``Influence``, if they were asked for (``attribution=``).
    ``pieces`` is above 1 for a document that was split; ``duplicate_of`` names the earlier document with
    the same tokens, which was fused in its place. ``used`` is False for a blank document and for one that focus left
    out; ``focus_score`` is what focus ranked it by (nats), None where nothing had to be chosen.
    """

    id: str
    origin: Origin
    tokens: int
    title: str | None = None
    pieces: int = 1
    duplicate_of: str | None = None
    miss: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    attention: float | None = None
    effect: float | None = None
    used: bool = True
    focus_score: float | None = None


@dataclass(frozen=True, slots=True)
class Citation:
    """A place where the answer stands: ``document.text[start:end] == text``, in the source's spelling."""

    document_id: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``prompt_tokens`` holds everything that the model read, documents included."""

    prompt_tokens: int
    document_tokens: int
    cached_document_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds since the call began: documents ready and fused, first token known, whole answer known."""

    prefill: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """An answer with everything needed to trust it: what was read, where it stands, what it cost."""

    text: str
    mode: Mode
    sources: tuple[Source, ...]
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()

    @property
    def cited_text(self) -> str:
        """The answer as the first cited document spells it, or ``text`` where nothing is cited."""
        return self.citations[0].text if self.citations else self.text

    def __repr__(self) -> str:
        cited = [citation.document_id for citation in self.citations]
        return f"Answer({self.text!r}, mode={self.mode!r}, documents={len(self.sources)}, cited={cited!r})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; metadata of documents is carried as it is."""
        return {
            "text": self.text,
            "cited_text": self.cited_text,
            "mode": self.mode,
            "finish_reason": self.finish_reason,
            "sources": [{f.name: getattr(source, f.name) for f in fields(source)} for source in self.sources],
            "citations": [asdict(citation) for citation in self.citations],
            "usage": asdict(self.usage),
            "timings": asdict(self.timings),
            "token_ids": list(self.token_ids),
        }

    def _repr_html_(self) -> str:
        """Rich output in notebooks. Documents and answers are untrusted text, so all of it is escaped."""
        cited = {c.document_id for c in self.citations}
        heads = ["cited", "document", "title", "KV from", "tokens"]
        measured = [
            (head, name, form)
            for head, name, form in (("attention", "attention", "{:.1%}"), ("effect, nats", "effect", "{:+.2f}"))
            if any(getattr(source, name) is not None for source in self.sources)
        ]
        heads += [head for head, _, _ in measured]
        rows = "".join(
            f"<tr><td>{'&#10003;' if s.id in cited else ''}</td><td>{html.escape(s.id)}</td>"
            f"<td>{html.escape(s.title or '')}</td><td>{s.origin}</td><td>{s.tokens}</td>"
            f"{''.join(f'<td>{form.format(getattr(s, name))}</td>' for _, name, form in measured)}</tr>"
            for s in self.sources
        )
        return (
            f"<p><b>{html.escape(self.cited_text)}</b> <small>({self.mode}, "
            f"{self.timings.total:.2f} s)</small></p><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"
            f"{rows}</table>"
        )


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """What came of answering one question with the same documents in several orders."""

    mode: Mode
    permutations: int
    answers: tuple[str, ...]
    max_logit_difference: float

    @property
    def identical(self) -> bool:
        """True when every order gave the same tokens and the same logits, bit for bit."""
        return len(self.answers) == 1 and self.max_logit_difference == 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the support gate: its name, whether it held, and the measured detail or the cause."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class GateReport:
    """All checks that the support gate made on one model."""

    model_id: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)
