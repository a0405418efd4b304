"""Plain data types that users pass in and get back: documents, messages, answers and reports.

All are frozen dataclasses. Nothing here imports torch, so creating a document or reading an answer is cheap.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

Mode = Literal["fusion", "concat", "ape"]
MODES: tuple[Mode, ...] = get_args(Mode)
ModeChoice = Literal["auto", "fusion", "concat", "ape"]  # "auto" is the model's own mode
FocusChoice = int | Literal["auto"] | None  # number of documents to keep; "auto" is the model's own, None keeps all
FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
Attributed = Literal["attention", "effects"]
Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
KeyKind = Literal["exact", "portable"]
KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)
KeyKindChoice = Literal["auto", "exact", "portable"]  # "auto" is "portable" for a store behind a URL
Origin = Literal["memory", "disk", "remote", "computed", "prompt", "blank"]


@dataclass(frozen=True, slots=True)
class Document:
    """One retrieved passage, which is prefilled separately from all others.

    Attributes:
        text: the passage.
        id: its name in sources and citations. By default its position in the request, counted from 1.
        title: read by the model if its template has a place for a title.
        metadata: returned with the source and never read. ``place`` ("page 12", "rows 40-52") is named by citations.
        score: the retriever's score, higher for a better document. Focus may use it.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object. Default: no arguments.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. ``arguments`` are the text of a JSON object, which is incomplete if the answer was cut."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class DocumentsPlace:
    """The position of the documents in a message, and how they are written there.

    Attributes:
        offset: number of characters of the message's text before the documents.
        separator: text between two documents.
        titles: whether each document's title is written above its text.
    """

    offset: int
    separator: str = "\n\n"
    titles: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. ``prompt=`` takes a list of messages, to which the model adds the next one.

    ``text`` does not contain the documents. At most one message of a prompt may set ``documents``, their place.

    Attributes:
        tool_calls: calls of tools in an assistant's message.
        tool_call_id: the call whose result a tool's message contains.
    """

    role: Role
    text: str
    documents: DocumentsPlace | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @classmethod
    def around(cls, role: Role, before: str, after: str, *, separator: str = "\n\n", titles: bool = False) -> Message:
        """Create a message with the documents between ``before`` and ``after``."""
        return cls(role, before + after, DocumentsPlace(len(before), separator, titles))


Prompt = str | Sequence[Message] | None  # the caller's prompt without the documents; None for the bare question


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A part of a prompt. ``document_id`` is None for the text around the documents."""

    text: str
    document_id: str | None = None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """The complete prompt of one question, including control tokens.

    ``str()`` marks where each document begins and ends. ``text`` is the prompt without these marks.
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
    """How one of the caller's documents was used in an answer.

    Attributes:
        id: the document's id, or its position in the request, counted from 1.
        origin: where its KV came from: ``memory``, ``disk`` or ``remote`` (tiers of the store), ``computed``
            (prefilled now), ``prompt`` (joined into the prompt in mode ``concat``) or ``blank`` (no text, skipped).
        tokens: number of tokens.
        pieces: number of pieces that it was split into.
        duplicate_of: id of an earlier document with the same tokens, which was fused in its place.
        miss: why the store did not have the first piece that had to be computed.
        attention, effect: as in ``Influence``; None unless ``attribution=`` requested them.
        used: False if the document is blank or focus dropped it.
        focus_score: score by which focus ranked it, in nats; None if focus had nothing to choose.
        key_kind: "exact" if its KV has the bits that this process would compute, "portable" if another environment may
            have computed it, within rounding; None if it has no KV of its own.
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
    key_kind: KeyKind | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name. ``metadata`` is the caller's own object, not a copy."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Citation:
    """An occurrence of the answer in a document: ``document.text[start:end] == text``, in the document's spelling.

    ``place`` is the document's ``metadata["place"]`` ("page 12"), narrowed to the line or row of ``start`` if it names
    several ("rows 40-52").
    """

    document_id: str
    start: int
    end: int
    text: str
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts.

    ``prompt_tokens`` counts everything that the model read, including the documents. ``completion_tokens`` counts
    everything that it wrote, including its reasoning.
    """

    prompt_tokens: int
    document_tokens: int
    cached_document_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, int]:
        """Return all counts by name, including ``total_tokens``."""
        return {**asdict(self), "total_tokens": self.total_tokens}


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the start of the call until the documents were fused, the first token and the last token."""

    prefill: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """An answer with its sources, citations, token counts and timings.

    Attributes:
        token_ids: everything that the model wrote, with its reasoning.
        reasoning: what a reasoning model wrote in front of the answer, which is not part of ``text``; None if nothing.
        tool_calls: calls of tools behind the text.
        support: calibrated probability, 0 to 1, that the documents that were read answer the question. It does not say
            whether ``text`` is right. None unless ``min_support=`` asked for it.
        found: whether ``support`` is at least ``min_support``; None if it was not measured.
    """

    text: str
    mode: Mode
    sources: tuple[Source, ...]
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    support: float | None = None
    found: bool | None = None

    @property
    def notice(self) -> str | None:
        """A sentence for readers if the answer was not found in the documents, else None."""
        if self.found is not False:
            return None
        return f"The documents probably do not contain the answer (support {self.support:.0%})."

    @property
    def cited_text(self) -> str:
        """The answer as the first cited document spells it, or ``text`` if there are no citations."""
        return self.citations[0].text if self.citations else self.text

    def __repr__(self) -> str:
        cited = [citation.document_id for citation in self.citations]
        return f"Answer({self.text!r}, mode={self.mode!r}, documents={len(self.sources)}, cited={cited!r})"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the answer that :meth:`to_dict` returned as data, which may have been JSON meanwhile."""
        usage = {name: count for name, count in data["usage"].items() if name != "total_tokens"}
        parts = {
            "sources": tuple(Source(**source) for source in data["sources"]),
            "citations": tuple(Citation(**citation) for citation in data["citations"]),
            "tool_calls": tuple(ToolCall(**call) for call in data["tool_calls"]),
            "usage": Usage(**usage),
            "timings": Timings(**data["timings"]),
            "token_ids": tuple(data["token_ids"]),
        }
        return cls(**{one.name: parts.get(one.name, data[one.name]) for one in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON. The documents' metadata is included unchanged."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "cited_text": self.cited_text,
            "tool_calls": [asdict(call) for call in self.tool_calls],
            "mode": self.mode,
            "finish_reason": self.finish_reason,
            "support": self.support,
            "found": self.found,
            "notice": self.notice,
            "sources": [source.to_dict() for source in self.sources],
            "citations": [asdict(citation) for citation in self.citations],
            "usage": self.usage.to_dict(),
            "timings": asdict(self.timings),
            "token_ids": list(self.token_ids),
        }

    def _repr_html_(self) -> str:
        """Return HTML for notebooks. Documents and answers are untrusted, so their text is escaped."""
        cited = {c.document_id for c in self.citations}
        columns = {
            "cited": lambda s: "✓" * (s.id in cited),
            "document": lambda s: s.id,
            "title": lambda s: s.title or "",
        }
        if any("place" in source.metadata for source in self.sources):
            columns["place"] = lambda s: str(s.metadata.get("place", ""))
        columns |= {"KV from": lambda s: s.origin, "tokens": lambda s: str(s.tokens)}
        if any(source.attention is not None for source in self.sources):
            columns["attention"] = lambda s: f"{s.attention:.1%}"
        if any(source.effect is not None for source in self.sources):
            columns["effect, nats"] = lambda s: f"{s.effect:+.2f}"
        rows = (
            "".join(f"<td>{html.escape(cell(source))}</td>" for cell in columns.values()) for source in self.sources
        )
        return (
            f"<p><b>{html.escape(self.cited_text)}</b> <small>({self.mode}, {self.timings.total:.2f} s)</small></p>"
            f"<table><tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"
            f"{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
        )


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """A piece of a streamed answer, of the reasoning in front of it, or of the arguments of a call behind it.

    Attributes:
        call_index: number of the call, from 0, whose arguments ``text`` continues; None for other text.
        call: name and id of a call, in its first piece.
    """

    text: str
    is_reasoning: bool = False
    call_index: int | None = None
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """The result of answering one question with its documents in several orders."""

    mode: Mode
    permutations: int
    answers: tuple[str, ...]
    max_logit_difference: float

    @property
    def identical(self) -> bool:
        """Whether all orders gave the same text and bitwise equal logits."""
        return len(self.answers) == 1 and self.max_logit_difference == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, including ``identical``."""
        return {**asdict(self), "identical": self.identical}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the support gate, with the measured value or the reason for its failure in ``detail``."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class GateReport:
    """The results of all checks of the support gate for one model."""

    model_id: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)
