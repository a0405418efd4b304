"""The only place where text becomes token ids, and ids become text again.

Documents, titles, questions and prompts are untrusted: they are encoded by a second tokenizer that has no
control tokens at all, and the result is checked once more before it is handed on. Control tokens come from
the model's own templates alone, as constant ids. This module knows no model weights and no positions.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .chat import DOCUMENTS_MARK, MARK, as_text, conversation, documents_turn, mark, render
from .errors import ContextLimitError, ControlTokenError, UnsupportedModelError
from .schema import Document, Prompt
from .settings import FIELD, ModelSettings

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_USUAL_TOKEN = 8  # characters; more than those of a text that is no white space have on average
_PAST_ANY_TOKEN = 64  # characters; more than the longest vocabulary entry that matters for finding a cut


class PlainEncoder:
    """Encodes untrusted text; cannot emit a control token.

    Control tokens are all added tokens (``<tool_call>`` is one, though it is not marked special) but white space,
    ordinary single characters, and the one that the tokenization model puts in for what it cannot spell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedModelError(
                f"the tokenizer is a {type(tokenizer).__name__}, but only those backed by the tokenizers library "
                "can be made safe against control tokens in documents; convert it to a tokenizer.json."
            )
        whole = tokenizer.backend_tokenizer.to_str()
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        spec = json.loads(whole)
        control = {t["id"]: t["content"] for t in spec["added_tokens"] if not _is_ordinary(t)}
        spec["added_tokens"] = _kept(spec["added_tokens"], spec["model"])
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        unknown_id = _unknown_id(spec["model"])
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id)
        harmless = {unknown_id} - set(ends)  # an unknown token that also ends texts stays forbidden
        self.control_ids = frozenset(control.keys() | set(tokenizer.all_special_ids)) - harmless
        _remove_pieces(spec["model"], {control[i] for i in control if i != unknown_id})
        bytes_alone = {i for piece, i in tokenizer.get_vocab().items() if _BYTE_PIECE.fullmatch(piece)}
        # Decoding reads a run of byte pieces as one whole and skips special tokens, so neither settles the text.
        self.unsettling_ids = frozenset(bytes_alone.union(tokenizer.all_special_ids))
        self.largest_id = max(tokenizer.get_vocab().values())
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; lone surrogates read as U+FFFD.

        Raises:
            ControlTokenError: a control id came out all the same, so nothing may be sent to the model.
        """
        return self._checked(self._encoding(text).ids, text)

    def cut(self, text: str, max_tokens: int) -> int:
        """Character offset at which to cut ``text`` so that the first part has at most ``max_tokens`` ids.

        The cut falls at a sentence's end in the second half of the part if there is one, else at a space.
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

    def _encoding(self, text: str) -> Any:
        return self._tokenizer.encode(_LONE_SURROGATE.sub("\ufffd", text), add_special_tokens=False)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if leaked := self.control_ids.intersection(ids):
            raise ControlTokenError(
                f"a text of {len(text)} characters became the control token id {min(leaked)}; nothing was sent to "
                "the model, because its tokenizer cannot be made safe for this text."
            )
        return ids


def _unknown_id(model: Mapping[str, Any]) -> int | None:
    """Id that the tokenization model emits for what it cannot spell, if it has one."""
    if model["type"] == "Unigram":
        return model["unk_id"]
    unknown = model.get("unk_token")
    return None if unknown is None else model["vocab"].get(unknown)


def _is_ordinary(token: Mapping[str, Any]) -> bool:
    """Whether an added token is text like any other: white space (``▁`` is a space), or one unmarked character."""
    content = token["content"].replace("▁", " ")
    return content.isspace() or (len(content) == 1 and not token["special"])


def _kept(added: list[dict[str, Any]], model: dict[str, Any]) -> list[dict[str, Any]]:
    """The ordinary added tokens, put into the vocabulary, since others would be given new ids."""
    kept = [token for token in added if _is_ordinary(token)]
    if model["type"] == "Unigram":
        pieces = {piece for piece, _ in model["vocab"]}
        return [token for token in kept if token["content"] in pieces]
    for token in kept:
        model["vocab"].setdefault(token["content"], token["id"])
    return kept


def _remove_pieces(model: dict[str, Any], pieces: set[str]) -> None:
    """Make it impossible for the tokenization model to produce ``pieces`` (SentencePiece lists them as pieces)."""
    if model["type"] == "Unigram":  # ids are list places, so the piece is renamed to what no text can guess
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
class _Control:
    """A control token of a template, by its constant id."""

    token_id: int


class Template:
    """A template of the model's owner, cut into control tokens and plain text with fields."""

    def __init__(
        self, text: str, tokenizer: PreTrainedTokenizerBase, encoder: PlainEncoder, field: re.Pattern[str] = FIELD
    ) -> None:
        self._encoder, self._field = encoder, field
        self._parts = _split_at_control_tokens(text, tokenizer, encoder.control_ids)

    def encode(self, **values: str) -> list[int]:
        """Ids with the fields filled in. A value that looks like a field or a control token stays plain text."""
        ids: list[int] = []
        for part in self._parts:
            if isinstance(part, _Control):
                ids.append(part.token_id)
            else:
                ids += self._encoder.encode(self._field.sub(lambda match: values[match[0][1:-1]], part))
        return ids


def _split_at_control_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, control_ids: frozenset[int]
) -> list[_Control | str]:
    tokens = {str(t): (i, t) for i, t in tokenizer.added_tokens_decoder.items() if i in control_ids}
    if not tokens:
        return [text] if text else []
    pattern = "|".join(re.escape(content) for content in sorted(tokens, key=len, reverse=True))
    parts: list[_Control | str] = []
    strip_next = False
    for piece in re.split(f"({pattern})", text):
        if piece in tokens:
            token_id, token = tokens[piece]
            if token.lstrip and parts and isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
            parts.append(_Control(token_id))
            strip_next = token.rstrip
        elif piece:
            parts.append(piece.lstrip() if strip_next else piece)
            strip_next = False
    return [part for part in parts if part != ""]


class PromptEncoder:
    """Encodes the prefix, documents and questions of one model, and decodes its answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
        self.plain = PlainEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._settings = settings
        self._document = Template(settings.document_template, tokenizer, self.plain)
        self._titled = Template(settings.titled_document_template, tokenizer, self.plain)
        self._question = Template(settings.question_template, tokenizer, self.plain)
        prompt = settings.prompt_template
        self._answer = Template(settings.answer_template, tokenizer, self.plain)
        self._prompt = None if prompt is None else Template(prompt, tokenizer, self.plain)
        self.prefix_ids = tuple(Template(settings.prefix, tokenizer, self.plain).encode())

    @property
    def follows_instructions(self) -> bool:
        """Whether the model reads a caller's own wording; otherwise it reads the bare question."""
        return self._prompt is not None

    def encode_document(self, document: Document) -> tuple[int, ...]:
        """Ids (T,) of one document in its template; ``()`` for a blank one."""
        if not document.text.strip():
            return ()
        if document.title:
            return tuple(self._titled.encode(title=document.title, text=document.text))
        return tuple(self._document.encode(text=document.text))

    def encode_up_to(self, document: Document, max_tokens: int) -> tuple[int, ...] | None:
        """As :meth:`encode_document`; ``None`` for more than ``max_tokens`` ids, before a long text is all read."""
        beginning = replace(document, text=document.text[: (max_tokens + 1) * _PAST_ANY_TOKEN])
        ids = self.encode_document(beginning)
        if len(ids) <= max_tokens and len(beginning.text) < len(document.text):
            ids = self.encode_document(document)
        return ids if len(ids) <= max_tokens else None

    def split_document(self, document: Document, max_tokens: int, most: int) -> list[tuple[int, ...]]:
        """Ids of the pieces of a document that is longer than ``max_tokens``, each in the whole template.

        Raises:
            ContextLimitError: template and title alone take more than half of ``max_tokens``, or the distinct pieces
                have more than ``most`` ids together; the rest is then not encoded.
        """
        frame = len(self.encode_document(Document("x", title=document.title)))  # upper bound of the template's share
        room = max_tokens - frame
        if room < frame:
            raise ContextLimitError(
                f"template and title take {frame} tokens, more than half of the {max_tokens} that the model reads in "
                "one document, so it cannot be split; shorten the title."
            )
        pieces: list[tuple[int, ...]] = []
        text, at = document.text, 0
        distinct: set[tuple[int, ...]] = set()
        tokens = 0
        while at < len(text):
            cut = self._cut(text, at, room)
            piece = self.encode_document(replace(document, text=text[at : at + cut].strip()))
            while len(piece) > max_tokens and cut > 1:  # a cut inside a word can spell it with more tokens
                cut = cut * 3 // 4
                piece = self.encode_document(replace(document, text=text[at : at + cut].strip()))
            at += cut
            if piece:
                pieces.append(piece)
            tokens += 0 if piece in distinct else len(piece)
            distinct.add(piece)
            if tokens > most:
                raise ContextLimitError(
                    f"the first {at} of {len(text)} characters have {tokens} tokens, but at most {most} may be fused; "
                    "cut it."
                )
        return pieces

    def _cut(self, text: str, at: int, max_tokens: int) -> int:
        """How many characters from ``at`` on make a piece of at most ``max_tokens`` ids."""
        for characters in (_USUAL_TOKEN, _PAST_ANY_TOKEN):
            window = text[at : at + max_tokens * characters]
            cut = self.plain.cut(window, max_tokens)
            if cut < len(window):
                break
        return cut

    def encode_question(self, question: str, prompt: Prompt = None) -> tuple[int, ...]:
        """Ids (Q,) of the question, or of the caller's ``prompt`` where the model follows instructions.

        Raises:
            InvalidInputError: the prompt is a conversation that cannot be answered.
        """
        if prompt is None or self._prompt is None:
            return tuple(self._question.encode(question=question))
        if isinstance(prompt, str):
            return tuple(self._prompt.encode(prompt=prompt))
        turns = conversation(prompt)
        template = self._chat_template([turn.role for turn in turns])
        if template is None:
            return tuple(self._prompt.encode(prompt=as_text(turns)))
        return tuple(template.encode(**{f"message{n}": turn.text for n, turn in enumerate(turns)}))

    def _chat_template(self, roles: Sequence[str]) -> Template | None:
        """What stands behind the documents in a conversation.

        ``None`` where prefix and prompt template are not the chat template's, or where that does not pass such turns
        on as they are.
        """
        if self._tokenizer.chat_template is None:
            return None
        marks = [mark(f"message{number}") for number in range(len(roles))]
        texts = [documents_turn(marks[0]), *marks[1:]]
        try:
            text = render(self._tokenizer, list(zip(roles, texts, strict=True)))
        except TemplateError:
            return None
        prefix, _, rest = text.partition(DOCUMENTS_MARK)
        suffix = rest.rpartition(marks[-1])[2]
        is_own = (prefix, f"{{prompt}}{suffix}") == (self._settings.prefix, self._settings.prompt_template)
        return Template(rest, self._tokenizer, self.plain, MARK) if is_own and MARK.findall(rest) == marks else None

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Ids (A,) of an answer as the model is trained to write it, without the end token."""
        return tuple(self._answer.encode(answer=answer))

    @property
    def evidence_mark(self) -> str | None:
        """What shows in a decoded answer that its evidence begins; ``None`` where the tokenizer loses it."""
        spelt = self.decode(list(self.encode_answer(f"1{self._settings.evidence_separator}1"))).strip()
        mark = spelt[1:-1].rstrip(" ")
        return mark if spelt[:1] == spelt[-1:] == "1" and any(map(str.isalnum, mark)) else None

    def decode(self, token_ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
