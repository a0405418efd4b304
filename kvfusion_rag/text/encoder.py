"""Encodes text to token ids, and decodes ids to text. No other module does.

Documents, titles, questions and prompts are untrusted. A second tokenizer without control tokens encodes them, and the
result is checked before it is returned. Control tokens come only from the model's own templates, as constant ids.
It does not know about weights or positions.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ControlTokenError, UnsupportedModelError
from ..schema import Document, Message, Prompt
from .chat import alternating, as_text, messages_of, typed, without_place
from .settings import (
    DOCUMENTS_MARK,
    FIELD,
    MARK,
    ModelSettings,
    documents_turn,
    mark,
    render_answered,
    template_kwargs,
)

USUAL_TOKEN = 8  # characters; above the average token of ordinary text
LONGEST_TOKEN = 64  # characters; above the longest vocabulary entry that matters for a limit

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class PlainEncoder:
    """Encodes untrusted text without control tokens.

    All added tokens are control tokens, even those not marked as special such as ``<tool_call>``. The exceptions are
    white space, single ordinary characters, and the token for text that the tokenization model cannot spell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedModelError(
                f"the tokenizer is a {type(tokenizer).__name__}, but only one backed by the tokenizers library can "
                "be made safe against control tokens in documents; convert it to a tokenizer.json."
            )
        serialized = tokenizer.backend_tokenizer.to_str()
        self.digest = hashlib.sha256(serialized.encode()).hexdigest()
        spec = json.loads(serialized)
        control = {t["id"]: t["content"] for t in spec["added_tokens"] if not _is_ordinary(t)}
        spec["added_tokens"] = _ordinary_tokens(spec["added_tokens"], spec["model"])
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        unknown_id = _unknown_id(spec["model"])
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id)
        harmless = {unknown_id} - set(ends)  # an unknown token that also ends a text stays forbidden
        self.control_ids = frozenset(control.keys() | set(tokenizer.all_special_ids)) - harmless
        _remove_pieces(spec["model"], {control[i] for i in control if i != unknown_id})
        byte_ids = {i for piece, i in tokenizer.get_vocab().items() if _BYTE_PIECE.fullmatch(piece)}
        # Decoding joins a run of byte pieces and skips special tokens, so the text before them may still change.
        self.unsettling_ids = frozenset(byte_ids.union(tokenizer.all_special_ids))
        self.ids_of_control = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if i in self.control_ids}
        self.control_tokens = tuple(self.ids_of_control)
        self.largest_id = max(tokenizer.get_vocab().values())
        self._decoder = typed(tokenizer)
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        self._continuing = self._tokenizer
        # Some tokenizers put a space in front of a prompt, but not behind a control token inside it.
        metaspaces = _metaspaces(spec["pre_tokenizer"])
        if any(part.get("prepend_scheme") == "first" for part in metaspaces):
            for part in metaspaces:
                part["prepend_scheme"] = "never"
            self._continuing = Tokenizer.from_str(json.dumps(spec))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of generated ids without special tokens."""
        return self._decoder.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_all(self, token_ids: list[int]) -> str:
        """Return the text of generated ids with special tokens."""
        return self._decoder.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the token ids of ``text``. Lone surrogates become U+FFFD.

        Args:
            continues: other tokens precede the text, so a tokenizer that puts a space in front of a prompt does not
                put one here.

        Raises:
            ControlTokenError: the result contains a control id, so it must not be sent to the model.
        """
        ids = self._encoding(text, continues=continues).ids
        if leaked := self.control_ids.intersection(ids):
            raise ControlTokenError(
                f"a text of {len(text)} characters became the control token id {min(leaked)}; nothing was sent to "
                "the model, because its tokenizer cannot be made safe for this text."
            )
        return ids

    def exceeds(self, text: str, max_tokens: int) -> bool:
        """Return whether ``text`` is clearly longer than ``max_tokens`` ids. Only its beginning is encoded.

        False does not mean that it fits, but that it is short enough to be encoded and counted.
        """
        if len(text) <= max_tokens * USUAL_TOKEN:
            return False
        if len(text) > max_tokens * LONGEST_TOKEN:
            return True
        return len(self._encoding(text[: max_tokens * USUAL_TOKEN]).ids) > max_tokens

    def offsets(self, text: str, *, continues: bool = False) -> list[tuple[int, int]]:
        """Return the range of characters (start, end) of ``text`` that each of its ids spells."""
        return self._encoding(text, continues=continues).offsets

    def cut(self, text: str, max_tokens: int) -> int:
        """Return the character offset to cut ``text`` at, so that the first part has at most ``max_tokens`` ids.

        The cut is at the last sentence end in the second half of that part, else at a space.
        """
        encoding = self._encoding(text)
        if len(encoding.ids) <= max_tokens:
            return len(text)
        end = max(1, encoding.offsets[max_tokens][0])
        sentence_ends = [m.end() for m in _SENTENCE_END.finditer(text, end // 2, end)]
        if sentence_ends:
            return sentence_ends[-1]
        space = text.rfind(" ", end // 2, end)
        return space + 1 if space > 0 else end

    def _encoding(self, text: str, *, continues: bool = False) -> Any:
        tokenizer = self._continuing if continues else self._tokenizer
        return tokenizer.encode(_LONE_SURROGATE.sub("\ufffd", text), add_special_tokens=False)


def with_hidden_controls(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer as JSON, in which control tokens keep their ids but have names that no text contains."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    nonce = secrets.token_hex(16)
    names = {t["content"]: f"<|{nonce}{t['id']}|>" for t in spec["added_tokens"] if not _is_ordinary(t)}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model["type"] == "BPE":
        model["merges"] = [merge for merge in model["merges"] if names.keys().isdisjoint(_merge_parts(merge))]
    for option in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option) in names:
            model[option] = names[model[option]]
    return json.dumps(spec)


def _metaspaces(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of a pre-tokenizer that write spaces as SentencePiece does."""
    if pre_tokenizer is None:
        return []
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [part for part in parts if part["type"] == "Metaspace"]


def _unknown_id(model: Mapping[str, Any]) -> int | None:
    """Return the id that the tokenization model emits for text that it cannot spell, if it has one."""
    if model["type"] == "Unigram":
        return model["unk_id"]
    unknown = model.get("unk_token")
    return None if unknown is None else model["vocab"].get(unknown)


def _is_ordinary(token: Mapping[str, Any]) -> bool:
    """Whether an added token is ordinary text: white space (``▁`` is a space), or one non-special character."""
    content = token["content"].replace("▁", " ")
    return content.isspace() or (len(content) == 1 and not token["special"])


def _ordinary_tokens(added: list[dict[str, Any]], model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ordinary added tokens, and add them to the vocabulary: tokens outside it would get new ids."""
    ordinary = [token for token in added if _is_ordinary(token)]
    if model["type"] == "Unigram":
        pieces = {piece for piece, _ in model["vocab"]}
        return [token for token in ordinary if token["content"] in pieces]
    for token in ordinary:
        model["vocab"].setdefault(token["content"], token["id"])
    return ordinary


def _remove_pieces(model: dict[str, Any], pieces: set[str]) -> None:
    """Remove control tokens from the vocabulary, where SentencePiece lists them as pieces."""
    if model["type"] == "Unigram":  # ids are list indices, so a piece is renamed to a text that nobody can guess
        nonce = secrets.token_hex(16)
        model["vocab"] = [
            [f"\ufdd0{nonce}{i}" if piece in pieces else piece, score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]
        return
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in pieces}
    if model["type"] == "BPE":
        model["merges"] = [m for m in model["merges"] if pieces.isdisjoint(_merge_parts(m))]


def _merge_parts(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


@dataclass(frozen=True, slots=True)
class Control:
    """A control token of a template."""

    token_id: int


class Template:
    """A template written by the model's owner, split into control tokens and plain text with fields."""

    def __init__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, encoder: PlainEncoder, field: re.Pattern[str] = FIELD
    ) -> None:
        self._encoder, self._field = encoder, field
        self._parts = split_at_control_tokens(text, tokenizer, encoder.control_ids)

    def encode(self, **values: str) -> list[int]:
        """Return the token ids with the fields filled in. Fields and control tokens in a value stay plain text."""
        ids: list[int] = []
        for part in self._parts:
            if isinstance(part, Control):
                ids.append(part.token_id)
            else:
                ids += self._encoder.encode(self._field.sub(lambda match: values[match[0][1:-1]], part))
        return ids


def split_at_control_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, control_ids: frozenset[int]
) -> list[Control | str]:
    """Split trusted text into control tokens and the plain text between them."""
    tokens = {str(t): (i, t) for i, t in tokenizer.added_tokens_decoder.items() if i in control_ids}
    if not tokens:
        return [text] if text else []
    pattern = "|".join(re.escape(content) for content in sorted(tokens, key=len, reverse=True))
    parts: list[Control | str] = []
    strip_next = False
    for piece in re.split(f"({pattern})", text):
        if piece in tokens:
            token_id, token = tokens[piece]
            if token.lstrip and parts and isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
            parts.append(Control(token_id))
            strip_next = token.rstrip
        elif piece:
            parts.append(piece.lstrip() if strip_next else piece)
            strip_next = False
    return [part for part in parts if part != ""]


class DocumentEncoder(Protocol):
    """Encodes a document as one model reads it in one prompt."""

    @property
    def plain(self) -> PlainEncoder: ...

    def encode_document(self, document: Document) -> tuple[int, ...]:
        """Return the ids (T,) of one document, or ``()`` if it is blank."""
        ...


class TextDocuments:
    """Encodes documents as plain text, each followed by a separator.

    Args:
        separator: text between two documents.
        titles: write a document's title above its text.
        continues: a prefix precedes every document.
    """

    def __init__(self, plain: PlainEncoder, *, separator: str, titles: bool, continues: bool) -> None:
        self.plain = plain
        self._separator, self._titles, self._continues = separator, titles, continues

    def encode_document(self, document: Document) -> tuple[int, ...]:
        if not document.text.strip():
            return ()
        text = document_text(document, titles=self._titles) + self._separator
        return tuple(self.plain.encode(text, continues=self._continues))


def document_text(document: Document, *, titles: bool) -> str:
    """Return the text of a document in a prompt."""
    return f"Title: {document.title}\n{document.text}" if titles and document.title else document.text


class PromptEncoder:
    """Encodes prefix, documents and questions in the fixed templates of one model, and decodes its answers."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings, plain: PlainEncoder | None = None
    ) -> None:
        self.plain = plain or PlainEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._settings = settings
        self._document = Template(settings.document_template, tokenizer, self.plain)
        self._titled = Template(settings.titled_document_template, tokenizer, self.plain)
        self._question = Template(settings.question_template, tokenizer, self.plain)
        self._answer = Template(settings.answer_template, tokenizer, self.plain)
        prompt = settings.prompt_template
        self._prompt = None if prompt is None else Template(prompt, tokenizer, self.plain)
        self.prefix_ids = tuple(Template(settings.prefix, tokenizer, self.plain).encode())

    @property
    def follows_instructions(self) -> bool:
        """Whether the model reads the caller's own wording. Otherwise it reads the bare question."""
        return self._prompt is not None

    def encode_document(self, document: Document) -> tuple[int, ...]:
        """Return the ids (T,) of one document in its template, or ``()`` if it is blank."""
        if not document.text.strip():
            return ()
        if document.title:
            return tuple(self._titled.encode(title=document.title, text=document.text))
        return tuple(self._document.encode(text=document.text))

    def encode_question(self, question: str, prompt: Prompt = None) -> tuple[int, ...]:
        """Return the ids (Q,) of the question, or of the caller's ``prompt`` if the model follows instructions.

        System texts open the first user turn, so they follow the documents too.

        Raises:
            InvalidInputError: the prompt is a conversation that cannot be answered.
        """
        if prompt is None or self._prompt is None:
            return tuple(self._question.encode(question=question))
        if isinstance(prompt, str):
            return tuple(self._prompt.encode(prompt=prompt))
        messages = [without_place(message) for message in messages_of(prompt, question)]
        turns = alternating([Message(m.role, m.text.strip()) for m in messages if m.text.strip()])
        if [turn.text for turn in turns] == [question.strip()]:  # the prompt adds nothing
            return tuple(self._question.encode(question=question))
        template = self._chat_template([turn.role for turn in turns])
        if template is None:
            return tuple(self._prompt.encode(prompt=as_text(turns)))
        return tuple(template.encode(**{f"message{n}": turn.text for n, turn in enumerate(turns)}))

    def _chat_template(self, roles: Sequence[str]) -> Template | None:
        """Return the part of the chat template that follows the documents of a conversation.

        Return None if the settings' prefix and prompt template do not come from the chat template, or if the chat
        template changes the turns.
        """
        if typed(self._tokenizer).chat_template is None:
            return None
        marks = [mark(f"message{number}") for number in range(len(roles))]
        texts = [documents_turn(marks[0]), *marks[1:]]
        turns = list(zip(roles, texts, strict=True))
        try:
            text = render_answered(self._tokenizer, turns, template_kwargs(self._settings))
        except TemplateError:
            return None
        prefix, _, rest = text.partition(DOCUMENTS_MARK)
        suffix = rest.rpartition(marks[-1])[2]
        is_own = (prefix, f"{{prompt}}{suffix}") == (self._settings.prefix, self._settings.prompt_template)
        return Template(rest, self._tokenizer, self.plain, MARK) if is_own and MARK.findall(rest) == marks else None

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Return the ids of an answer as the model is trained to write it, without the end token."""
        return tuple(self._answer.encode(answer=answer))

    @property
    def evidence_mark(self) -> str | None:
        """The text that separates the evidence in a decoded answer, or None if the tokenizer loses it."""
        decoded = self.decode(list(self.encode_answer(f"1{self._settings.evidence_separator}1"))).strip()
        separator = decoded[1:-1].rstrip(" ")
        return separator if decoded[:1] == decoded[-1:] == "1" and any(map(str.isalnum, separator)) else None

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of generated ids without special tokens."""
        return self.plain.decode(token_ids)
