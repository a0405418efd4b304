"""From checked requests to answers: store, prefill, fusion and decoding in their order, tokens counted, times taken.

The facade (``generator.py``) turns a caller's arguments into requests; everything that happens to a request
happens here. One engine serves all threads: it keeps no state of a request outside its ``Run``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from .ape import Ape
from .backbone import Backbone
from .citations import find_citations
from .decoding import DecodingOptions, Question, Row, decode
from .errors import ContextLimitError, InvalidInputError, UnsupportedModelError
from .fusion import FusedContext, fuse
from .gate import require_ape
from .positions import global_starts, question_start
from .prefill import TOKENS_PER_PASS, prefill, prefill_prefix
from .prompts import PromptEncoder
from .reading import Limits, Reading, read_documents
from .schema import Answer, Document, DocumentKV, Mode, Origin, Timings, Usage
from .settings import ModelSettings, require_mode
from .store import MemoryStore, document_key

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 62
MAX_BATCH = 32  # rows; the first step computes logits for every row at every distinct question length


@dataclass(frozen=True, slots=True)
class Placed:
    """Ids that are prefilled apart, the store key of their KV, and the position of the first."""

    key: str
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Request:
    """One question with its documents, encoded and checked against the limits.

    ``fused`` is what is prefilled apart, in the order in which it is fused; ``None`` where all documents stand in the
    question's own prompt.
    """

    reading: Reading
    question: Question
    mode: Mode
    fused: tuple[Placed, ...] | None


class Run:
    """Requests of one mode being decoded together: fused context, origins of document KVs, rows and times."""

    def __init__(
        self, requests: Sequence[Request], origins: dict[str, Origin], context: FusedContext, began: float
    ) -> None:
        self.requests = requests
        self.origins = origins
        self.context = context
        self.began = began
        self.prefill_seconds = time.perf_counter() - began
        self.first_token_seconds = 0.0
        self.rows: list[Row] = []


class Engine:
    """One backbone with its templates, prefix and store.

    Args:
        settings: templates, lengths and mode; the backbone's own or the caller's changes of them.
        store: where document KVs are kept, or ``None``.
        namespace: part of every key.
        max_fused_tokens: most document tokens of one question.
        tokens_per_pass: padded tokens of one prefill pass; ``None`` for the device's default.
        decoder: Dt where its weights are its own (full fine-tuning); by default the backbone, adapter on.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: ModelSettings,
        *,
        store: MemoryStore | None,
        namespace: str,
        max_fused_tokens: int,
        tokens_per_pass: int | None,
        decoder: Backbone | None = None,
    ) -> None:
        self.backbone = backbone
        self.decoder = decoder or backbone
        self.settings = settings
        self.store = store
        self.encoder = PromptEncoder(backbone.tokenizer, settings)
        kind = "cpu" if backbone.device.type == "cpu" else "accelerator"
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS[kind]
        self._require_fit()
        self.prefix = prefill_prefix(backbone, self.encoder.prefix_ids)
        self._namespace = namespace
        self._max_fused_tokens = max_fused_tokens
        facts = [backbone.fingerprint(), list(self.encoder.prefix_ids), self.tokens_per_pass]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.warned: set[str] = set()
        self._ape_is_exact = False  # until measured

    def key(self, token_ids: tuple[int, ...]) -> str:
        """Store key of a document's ids: everything that changes the bits of its KV, and the namespace.

        That is the model, the prefix, the shape of a prefill pass, and what the process may change at any time:
        the number of threads and the precision of matrix products.
        """
        numerics = f"{torch.get_num_threads()}/{torch.get_float32_matmul_precision()}"
        return document_key(f"{self._fingerprint}/{numerics}", self._namespace, token_ids)

    def ordinary_ids(self) -> list[int]:
        """All ids of the model that are no control tokens."""
        return sorted(set(range(self.backbone.config.vocab_size)) - self.encoder.plain.control_ids)

    def read(self, documents: Sequence[Document | str], *, max_tokens: int | None = None) -> Reading:
        """Encode and check documents; ``max_tokens`` in place of the limit on all together."""
        window = self.backbone.context_window
        # One position is kept for the question and one for the answer.
        room = UNLIMITED if window is None else window - len(self.encoder.prefix_ids) - 2
        longest = self.settings.max_document_tokens
        limits = Limits(
            document=room if longest is None else min(room, longest),
            total=self._max_fused_tokens if max_tokens is None else max_tokens,
            long_documents=self.settings.long_documents,
        )
        return read_documents(documents, self.encoder, limits, self.key)

    def request(
        self,
        question: str,
        documents: Sequence[Document | str],
        prompt: str | None,
        mode: Mode | None,
        options: DecodingOptions,
    ) -> Request:
        """Encode and check one question with its documents; see ``KVFusionGenerator.answer``."""
        mode = mode or self.settings.mode
        require_mode(mode)
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError(f"the question is {question!r}, but it must be a text that is not blank.")
        if not isinstance(prompt, str | None):
            raise InvalidInputError(f"the prompt is {prompt!r}, but it must be a text or None.")
        reading = self.read(documents)
        if not reading.keys:
            self._warn_once("no documents: this is plain generation over the question alone")
        if prompt is not None and not self.encoder.follows_instructions:
            name = self.backbone.model_id
            self._warn_once(f"{name} reads bare questions; the wording around the question is not used")
        ids = self.encoder.encode_question(question, prompt)
        if mode == "ape":
            self._require_ape()
        fused, start = self._place(reading, mode)
        before = (*self.encoder.prefix_ids, *reading.joined) if fused is None else ()
        row = Question((*before, *ids), start)
        self._require_room(row, len(ids), mode, options)
        self._log_mode(mode)
        return Request(reading, row, mode, fused)

    def joined_document(self, reading: Reading) -> dict[str, tuple[int, ...]]:
        """All documents as one, in the caller's order: what bidirectional attention reads in mode ``concat``."""
        return {self.key(reading.joined): reading.joined} if reading.joined else {}

    def document_kvs(
        self,
        keys: Mapping[str, tuple[int, ...]],
        *,
        starts: Mapping[str, int] | None = None,
        keep: bool = True,
        progress: bool = False,
    ) -> tuple[dict[str, DocumentKV], dict[str, Origin]]:
        """KV of every key, from the store or computed now (and then stored), and where each came from.

        ``starts`` has the first position of each key's document; by default all stand right after the prefix. With
        ``keep=False`` computed KVs go to the store alone, pass by pass, so memory is bounded by its cap.
        """
        kvs: dict[str, DocumentKV] = {}
        if self.store is not None:
            kvs = {key: kv for key, ids in keys.items() if (kv := self.store.get(key, ids)) is not None}
        origins: dict[str, Origin] = {key: "memory" if key in kvs else "computed" for key in keys}
        missing = [key for key in keys if key not in kvs]
        computed = prefill(
            self.backbone,
            [keys[key] for key in missing],
            self.prefix,
            tokens_per_pass=self.tokens_per_pass,
            starts=None if starts is None else [starts[key] for key in missing],
            progress=progress,
        )
        for index, kv in computed:
            if self.store is not None:
                self.store.put(missing[index], kv)
            if keep:
                kvs[missing[index]] = kv
        return kvs, origins

    def groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Requests in order, cut into batches whose padded slots stay within the limit on fused tokens."""
        group: list[Request] = []
        context = question = 0  # longest of the group, in slots; the two are padded apart
        for request in requests:
            fused = self._fused_tokens(request)
            context, question = max(context, fused), max(question, len(request.question.ids))
            if group and (len(group) == MAX_BATCH or (context + question) * (len(group) + 1) > self._max_fused_tokens):
                yield group
                group, context, question = [], fused, len(request.question.ids)
            group.append(request)
        if group:
            yield group

    def answer_all(self, requests: Sequence[Request], options: DecodingOptions, began: float) -> list[Answer]:
        """Answers of all requests, decoded in as few batches as the limit on fused tokens allows."""
        return [
            answer
            for group in self.groups(requests)
            for answer in self._answer_group(group, options, began)  # a group's cache is gone before the next one's
        ]

    def start(self, requests: Sequence[Request], began: float) -> Run:
        """Prefill what is missing and fuse each request's documents, in canonical order if positions are uniform."""
        placed = {piece.key: piece for r in requests for piece in r.fused or ()}
        kvs, origins = self.document_kvs(
            {key: piece.ids for key, piece in placed.items()},
            starts={key: piece.start for key, piece in placed.items()},
        )
        head = [self.prefix] if self.prefix else []
        rows = [[] if r.fused is None else [*head, *(kvs[piece.key] for piece in r.fused)] for r in requests]
        return Run(requests, origins, fuse(rows, self.backbone.config, self.backbone.device), began)

    def decode(
        self, run: Run, options: DecodingOptions, on_logits: Callable[[torch.Tensor], None] | None = None
    ) -> Generator[None, None, None]:
        """Decode ``run`` step by step, filling its rows and times."""
        mode, settings = run.requests[0].mode, self.settings
        tuned = self._answers_tuned(mode)
        if tuned and settings.tuned_evidence and (mark := self.encoder.evidence_mark) is not None:
            options = replace(options, stop=(*options.stop, mark))
        ape = None
        if mode == "ape":
            prefix_length = len(self.encoder.prefix_ids)
            ape = Ape.over(run.context.mask, prefix_length, settings.ape_temperature, settings.ape_scale)
        steps = decode(
            self.decoder if tuned else self.backbone,
            run.context,
            [request.question for request in run.requests],
            options,
            self.encoder.decode,
            adapter=tuned,
            ape=ape,
            unsettling_ids=self.encoder.plain.unsettling_ids,
            on_logits=on_logits,
        )
        with closing(steps):
            for rows in steps:
                run.first_token_seconds = run.first_token_seconds or time.perf_counter() - run.began
                run.rows = rows
                yield

    def answer(self, run: Run, number: int) -> Answer:
        """The answer of row ``number`` of a run whose decoding has ended."""
        request, row = run.requests[number], run.rows[number]
        reading = request.reading
        apart = request.mode != "concat"
        origins: dict[str, Origin] = dict.fromkeys(reading.keys, "prompt")
        if apart:
            found: dict[tuple[int, ...], Origin] = {piece.ids: run.origins[piece.key] for piece in request.fused or ()}
            origins = {key: found[ids] for key, ids in reading.keys.items()}
        cached = sum(len(ids) for key, ids in reading.keys.items() if origins[key] == "memory")
        return Answer(
            text=row.text,
            mode=request.mode,
            sources=reading.sources(origins, self.key),
            citations=find_citations(row.text, reading.cited_order(self.key)),
            usage=Usage(
                prompt_tokens=self._fused_tokens(request) + len(request.question.ids),
                document_tokens=reading.tokens if apart else sum(d.tokens for d in reading.documents),
                cached_document_tokens=cached,
                completion_tokens=len(row.ids),
            ),
            timings=Timings(run.prefill_seconds, run.first_token_seconds, time.perf_counter() - run.began),
            finish_reason=row.finish_reason or "length",
            token_ids=tuple(row.ids),
        )

    def _answer_group(self, requests: Sequence[Request], options: DecodingOptions, began: float) -> list[Answer]:
        run = self.start(requests, began)
        for _ in self.decode(run, options):
            pass
        return [self.answer(run, number) for number in range(len(requests))]

    def _place(self, reading: Reading, mode: Mode) -> tuple[tuple[Placed, ...] | None, int]:
        """What is fused, in order and with first positions, and the question's own; ``None`` for a joined prompt."""
        prefix, settings = len(self.encoder.prefix_ids), self.settings
        if mode == "concat":
            if settings.document_attention == "causal":
                return None, 0
            joined = self.joined_document(reading).items()
            return tuple(Placed(key, ids, prefix) for key, ids in joined), prefix + len(reading.joined)
        if mode == "fusion" and settings.positions == "global":
            pieces = reading.distinct
            *starts, start = global_starts(prefix, [len(ids) for ids in pieces.values()])
            # A key of its own, but for the document that stands right after the prefix as ever.
            keys = [key if at == prefix else f"{key}@{at}" for key, at in zip(pieces, starts, strict=True)]
            return tuple(map(Placed, keys, pieces.values(), starts)), start
        passage_length = None if mode == "ape" else settings.passage_length
        fused = tuple(Placed(key, ids, prefix) for key, ids in reading.keys.items())
        return fused, question_start(prefix, passage_length, reading.longest)

    def _fused_tokens(self, request: Request) -> int:
        """Slots that prefix and documents take before the question is read."""
        if request.fused is None:
            return 0
        return len(self.encoder.prefix_ids) + sum(len(piece.ids) for piece in request.fused)

    def _require_fit(self) -> None:
        """Refuse settings and tokenizers that no question could be asked with."""
        window, rows = self.backbone.context_window, self.backbone.config.vocab_size
        if (shapes := [_cache_shape(b) for b in (self.backbone, self.decoder)])[0] != shapes[1]:
            raise UnsupportedModelError(
                f"{self.decoder.model_id!r} cannot read the keys and values of {self.backbone.model_id!r}: layers, "
                f"heads, width and vocabulary are {shapes[1]} against {shapes[0]}; it was tuned from another base."
            )
        prefix, passage = len(self.encoder.prefix_ids), self.settings.passage_length or 1
        if window is not None and prefix + passage + 2 > window:
            raise InvalidInputError(
                f"the prefix has {prefix} tokens and passage_length is {passage}, but {self.backbone.model_id} has "
                f"{window} positions for them, the question and the answer."
            )
        if self.encoder.plain.largest_id >= rows:
            raise UnsupportedModelError(
                f"the tokenizer of {self.backbone.model_id!r} gives ids up to {self.encoder.plain.largest_id}, but "
                f"the model has {rows} embeddings; it belongs to another model."
            )

    def _require_room(self, row: Question, question_tokens: int, mode: Mode, options: DecodingOptions) -> None:
        window = self.backbone.context_window
        before = row.start + len(row.ids) - question_tokens
        if window is not None and before + question_tokens + options.max_new_tokens > window:
            hint = "; modes 'fusion' and 'ape' let documents share positions" if mode == "concat" else ""
            if mode == "fusion" and self.settings.positions == "global":
                hint = "; with positions='uniform' documents share positions"
            raise ContextLimitError(
                f"prefix and documents take {before} positions, the question {question_tokens} and the answer up to "
                f"{options.max_new_tokens}, but {self.backbone.model_id} has {window}; shorten one of them{hint}."
            )

    def _answers_tuned(self, mode: Mode) -> bool:
        """Whether the adapter or the second decoder, if there is one, answers in ``mode``."""
        return mode == "fusion" or (mode == "concat" and self.settings.tuned_concat)

    def _require_ape(self) -> None:
        """Refuse a model whose attention APE's cannot stand in for, measured when the mode is first asked for."""
        if not self._ape_is_exact:
            require_ape(self.backbone, self.prefix, self.ordinary_ids(), tokens_per_pass=self.tokens_per_pass)
            self._ape_is_exact = True

    def _log_mode(self, mode: Mode) -> None:
        name = self.backbone.model_id
        own = self.decoder is not self.backbone or self.backbone.has_adapter
        on = own and self._answers_tuned(mode)
        logger.info("mode %s, model %s, tuned decoder %s", mode, name, "on" if on else "off")
        if mode == "ape":
            logger.info("APE with temperature %g, scale %g", self.settings.ape_temperature, self.settings.ape_scale)
        if mode == "fusion" and not (own or self.settings.tuned):
            self._warn_once(
                f"{name} was not trained to read fused documents and has no adapter; "
                "answers can be worse than in modes 'ape' and 'concat'"
            )
        if mode == "fusion" and own and self.settings.mode == "concat" and self.settings.tuned_concat:
            self._warn_once(f"the tuned decoder of {name} was trained on joined prompts; its own mode is 'concat'")

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def _cache_shape(backbone: Backbone) -> tuple[int, ...]:
    """What two models must share for one to read the other's keys and values, and the same token ids."""
    config = backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads, config.hidden_size, config.vocab_size
