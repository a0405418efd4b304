"""From checked requests to answers: documents, fusion and decoding in their order, tokens counted, times taken.

The facade (``generator.py``) turns a caller's arguments into requests; everything that happens to a request
happens here. One engine serves all threads: it keeps no state of a request outside its ``Run``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, get_args

import torch

from ..errors import InvalidInputError, MemoryLimitError
from ..fusion.decode import DecodingPlan, Question, decode
from ..fusion.fused_cache import BufferPool, FusedBuffer
from ..fusion.gate import require_ape
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.prefill import prefill_prefix
from ..fusion.sampling import DecodingOptions
from ..model.ape import Ape
from ..model.backbone import Backbone
from ..model.kv import DocumentKV
from ..schema import Answer, Document, FocusChoice, Mode, ModeChoice, Origin, Prompt, Timings, Usage
from ..store import FetchedKVs, KVRequest, Place, Tier
from ..text.citations import find_citations
from ..text.documents import Limits, Reading, is_filled, limit_of, read_documents, require_sequence
from ..text.encoder import PromptEncoder
from ..text.layouts import FixedLayout, Layout
from ..text.settings import DEFAULT_MAX_NEW_TOKENS, ModelSettings
from .document_kvs import DocumentKVs
from .focus import Focus, choose, needs_choice, scored_question
from .limits import is_out_of_memory, memory_errors, require_fit, room_left
from .placing import place
from .prompt_reader import PromptReader
from .requests import Batch, Request, batches

logger = logging.getLogger(__name__)

T = TypeVar("T")
ROOM = 4096  # slots kept free for answers behind all rows; more are made when they are needed


class Run:
    """A batch being decoded: fused context, where documents came from, answers so far and times."""

    def __init__(self, batch: Batch, buffer: FusedBuffer, fetched: FetchedKVs) -> None:
        self.batch = batch
        self.origins, self.misses = fetched.origins, fetched.misses
        self.buffer, self.context = buffer, buffer.context()
        self.prefilled_at = time.perf_counter()
        self.first_token_at = 0.0
        self.rows: list[GrowingAnswer] = []

    def release(self) -> None:
        """Give the memory of the context to the next run; whoever keeps this one keeps its answers alone."""
        self.buffer.release()
        del self.buffer, self.context


class Engine:
    """One backbone with its templates and its supply of documents.

    Args:
        settings: templates, lengths and mode; the backbone's own or the caller's changes of them.
        store: where document KVs are kept, as ``as_store`` takes it; ``None`` keeps nothing.
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
        store: Place,
        namespace: str,
        max_fused_tokens: int,
        tokens_per_pass: int | None,
        decoder: Backbone | None = None,
    ) -> None:
        self.backbone = backbone
        self.decoder = decoder or backbone
        self.prompts = PromptReader(backbone, self.decoder, settings)
        require_fit(backbone, self.decoder, self.encoder, settings)
        self.document_kvs = DocumentKVs(backbone, store=store, namespace=namespace, tokens_per_pass=tokens_per_pass)
        self._max_fused_tokens = max_fused_tokens
        self._pool = BufferPool()
        self.warned: set[str] = set()
        self._explicit_is_exact = False  # until measured

    @property
    def settings(self) -> ModelSettings:
        return self.prompts.settings

    @settings.setter
    def settings(self, settings: ModelSettings) -> None:
        self.prompts.settings = settings

    @property
    def encoder(self) -> PromptEncoder:
        """The encoder of the fixed templates, which also decodes answers."""
        return self.prompts.encoder

    def current(self, request: Request) -> Request:
        """``request`` with keys of the model as it is now, in the thread that answers.

        Much may happen before a request has its turn: weights may change, and each thread has a number of threads of
        its own for torch.
        """
        self.document_kvs.refresh()
        if request.model == self.document_kvs.model:
            return request
        prefix = request.layout.prefix
        reading = request.reading.with_keys(lambda ids: self.document_kvs.key(ids, prefix))
        fused, _ = place(reading, request.mode, self.settings, prefix_tokens=len(prefix))
        focus = request.focus and request.focus.with_keys(self.document_kvs.key, prefix)
        return replace(request, reading=reading, fused=fused, focus=focus, model=self.document_kvs.model)

    def prepare(self, request: Request, options: DecodingOptions) -> Request:
        """``request`` as it is answered: with current keys, and with the documents that focus keeps.

        Raises:
            MemoryLimitError: there is not enough memory to read the question over all documents.
        """
        request = self.current(request)
        focus = request.focus
        if focus is None or request.choice is not None:
            return request
        errors = partial(
            memory_errors, self.backbone.device, questions=len(focus.scored.keys), tokens=focus.scored.longest
        )
        choice = self._twice(lambda: choose(self.document_kvs, focus), errors)
        chosen = focus.reading.only(choice.kept)
        made = self.request_for(chosen, request.layout, request.mode, options, request.began)
        return replace(made, focus=focus, choice=choice, cancelled=request.cancelled)

    def ordinary_ids(self) -> list[int]:
        """All ids of the model that are no control tokens."""
        return sorted(set(range(self.backbone.config.vocab_size)) - self.encoder.plain.control_ids)

    @property
    def max_new_tokens(self) -> int:
        """Default limit of an answer: the settings', else the generation config's, else 512."""
        return self.settings.max_new_tokens or self.decoder.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    def read(
        self, documents: Sequence[Document | str], layout: Layout | None = None, *, max_tokens: int | None = None
    ) -> Reading:
        """Encode and check documents.

        Args:
            layout: of the prompt that shows them; by default that of a bare question.
            max_tokens: in place of the limit on all together.
        """
        layout = layout or self.prompts.fused_layout(None)
        self.document_kvs.refresh()
        limits = Limits(
            document=limit_of(self.settings, self.backbone.context_window, len(layout.prefix)),
            total=self._max_fused_tokens if max_tokens is None else max_tokens,
            long_documents=self.settings.long_documents,
        )
        return read_documents(
            documents, layout.documents, limits, lambda ids: self.document_kvs.key(ids, layout.prefix)
        )

    def request(
        self,
        question: str,
        documents: Sequence[Document | str],
        prompt: Prompt,
        mode: ModeChoice | None,
        options: DecodingOptions,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        focus: FocusChoice = "auto",
    ) -> Request:
        """Encode and check one question with its documents; see ``KVFusionGenerator.answer``."""
        began = time.perf_counter()
        chosen, reason = self.prompts.mode_of(mode)
        most = self.prompts.focus_of(focus, chosen)
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError(f"the question is {question!r}, but it must be a text that is not blank.")
        if not isinstance(prompt, str | Sequence | None):
            raise InvalidInputError(f"the prompt is {prompt!r}, but it must be a text, a list of messages or None.")
        if isinstance(prompt, str) and not prompt.strip():
            raise InvalidInputError(f"the prompt is {prompt!r}, but must not be blank; None asks the question alone.")
        require_sequence(documents)
        has_documents = any(is_filled(document) for document in documents)
        layout = self.prompts.layout(
            question, prompt, chosen, has_documents=has_documents, template_kwargs=template_kwargs
        )
        reading = self.read(documents, layout)
        if not reading.keys:
            self._warn_once("no documents: this is plain generation over the question alone")
        if prompt is not None and not self.encoder.follows_instructions and isinstance(layout, FixedLayout):
            name = self.backbone.model_id
            self._warn_once(f"{name} reads bare questions; the wording around the question is not used")
        if chosen == "ape":
            self.require_explicit_attention()
        if most is not None and needs_choice(reading, most):
            made = self._focused(question, documents, reading, layout, chosen, most, options, began)
        else:
            made = self.request_for(reading, layout, chosen, options, began)
        self._log_mode(chosen, reason)
        return made

    def _focused(
        self, question: str, documents: Sequence[Document | str], reading: Reading, layout: Layout, mode: Mode,
        most: int, options: DecodingOptions, began: float,
    ) -> Request:  # fmt: skip
        """A request whose documents are still to be chosen; a joined prompt's are scored as a bare question's."""
        scored, prefix = reading, layout.prefix
        if mode == "concat":
            bare = self.prompts.fused_layout(None)
            scored, prefix = self.read(documents, bare), bare.prefix
        ids, given = scored_question(self.encoder.plain, question)
        focus = Focus(most, reading, scored, prefix, ids, given, self.prompts.focus_weight)
        return replace(self.request_for(focus.longest, layout, mode, options, began), focus=focus)

    def request_for(
        self, reading: Reading, layout: Layout, mode: Mode, options: DecodingOptions, began: float
    ) -> Request:
        """A request over documents that were read already.

        Raises:
            ContextLimitError: documents, question and answer do not fit into the window.
        """
        fused, start = place(reading, mode, self.settings, prefix_tokens=len(layout.prefix))
        ids, spans = layout.question, ()
        if fused is None:
            joined = layout.joined(reading)
            ids, spans = joined.ids, joined.spans
        room = room_left(
            self.backbone,
            before=start,
            question_tokens=len(ids),
            new_tokens=1 if options.may_shorten else options.max_new_tokens,
            mode=mode,
            positions=self.settings.positions,
        )
        most = room if room is not None and room < options.max_new_tokens else None
        return Request(
            reading, Question(ids, start), mode, fused, layout, self.document_kvs.model, most, spans, began=began
        )

    def batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """Requests in order, cut into batches whose padded slots stay within the limit on fused tokens."""
        return batches(
            requests,
            max_slots=self._max_fused_tokens,
            share=self.backbone.takes_any_mask and self.decoder.takes_any_mask,
        )

    def answer_all(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Answers of all requests, decoded in as few batches as the limit on fused tokens allows."""
        requests = [self.prepare(request, options) for request in requests]
        return [
            answer
            for batch in self.batches(requests)
            for answer in self._answer_batch(batch, options)  # its cache is given back before the next one's
        ]

    def start(self, batch: Batch, options: DecodingOptions) -> Run:
        """Prefill what is missing and fuse each row's documents, in canonical order if positions are uniform.

        Where memory runs out, what is kept for later is given back, and it is tried once more.

        Raises:
            MemoryLimitError: it runs out again.
        """
        return self._twice(lambda: self._start(batch, options), lambda: self.memory_errors(batch))

    def _twice(self, run: Callable[[], T], errors: Callable[[], AbstractContextManager[None]]) -> T:
        """What ``run`` returns; once more if memory runs out, in a context of ``errors``."""
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The failed pass is gone by now, its tensors with it.
        released = self.document_kvs.store.release_memory(self.backbone.device) + self._give_back()
        logger.warning("memory ran out; %d bytes were given back, and it is tried once more", released)
        with errors():
            return run()

    def _start(self, batch: Batch, options: DecodingOptions) -> Run:
        buffer, fetched = self.fill(batch, options.max_new_tokens)
        return Run(batch, buffer, fetched)

    def memory_errors(self, batch: Batch) -> AbstractContextManager[None]:
        """Where memory runs out in between, raise MemoryLimitError."""
        return memory_errors(
            self.backbone.device, questions=len(batch.requests), tokens=max(row.tokens for row in batch.rows)
        )

    def _give_back(self) -> int:
        """Let go of memory that is kept for later; how many bytes that were."""
        released = self._pool.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()
        return released

    def fill(self, batch: Batch, new_tokens: int) -> tuple[FusedBuffer, FetchedKVs]:
        """The rows of ``batch`` with their documents in them, and where each document came from.

        Args:
            new_tokens: of each answer, at most; there is room for that many, but for no more than ``ROOM`` of all
                together or half as much as documents take, since most answers end earlier.

        Raises:
            InvalidInputError: weights, threads or precision were changed since a request was made.
        """
        for request in batch.requests:
            self.document_kvs.require_unchanged(request.model)
        lengths = [row.tokens + len(row.prefix) for row in batch.rows]
        most = max(ROOM // len(batch.rows), max(lengths) // 2)
        buffer = FusedBuffer(
            lengths,
            self.document_kvs.kv_shape,
            self.backbone.device,
            room=max(row.question_tokens for row in batch.rows)
            + min(most, new_tokens * max(len(row.members) for row in batch.rows)),
            pool=self._pool,
        )
        model = batch.requests[0].model
        fetched = FetchedKVs({}, {}, {})
        for prefix in dict.fromkeys(row.prefix for row in batch.rows):
            found = self._fill_rows(batch, buffer, prefix, model)
            fetched.kvs.update(found.kvs)
            fetched.origins.update(found.origins)
            fetched.misses.update(found.misses)
        return buffer, fetched

    def _fill_rows(self, batch: Batch, buffer: FusedBuffer, prefix: tuple[int, ...], model: str) -> FetchedKVs:
        """Put ``prefix`` and the documents behind it into the rows that begin with it."""
        wanted: dict[str, KVRequest] = {}
        copies: list[tuple[str, DocumentKV]] = []  # further slots of documents that several rows share
        starts: dict[str, int] = {}
        kv = self.document_kvs.prefix_kv(prefix)
        held = {key: found for r in batch.requests if r.choice is not None for key, found in r.choice.kvs.items()}
        for row, shared in enumerate(batch.rows):
            if shared.prefix != prefix:
                continue
            if kv is not None:
                kv.copy_into(buffer.slots(row, 0, kv.token_ids))
            at = len(prefix)
            for piece in shared.pieces.values():
                slots = buffer.slots(row, at, piece.ids)
                if piece.key in held:
                    held[piece.key].copy_into(slots)
                elif piece.key in wanted:
                    copies.append((piece.key, slots))
                else:
                    wanted[piece.key], starts[piece.key] = KVRequest(piece.ids, slots, piece.stored), piece.start
                at += len(piece.ids)
        fetched = self.document_kvs.fetch(wanted, starts, model, prefix=prefix)
        for key, slots in copies:
            fetched.kvs[key].copy_into(slots)
        return fetched

    def visible(self, run: Run) -> torch.Tensor | None:
        """(N, K) bool, which slots each question may see; ``None`` where that is all of its row."""
        batch, slots = run.batch, run.context.mask.shape[1]
        if not batch.has_foreign:
            return None
        seen = torch.zeros(len(batch.requests), slots, dtype=torch.bool)
        for number, (request, row) in enumerate(zip(batch.requests, batch.row_of, strict=True)):
            at = len(batch.rows[row].prefix)
            seen[number, :at] = True
            own = {piece.key for piece in request.fused or ()}
            for key, piece in batch.rows[row].pieces.items():
                seen[number, at : at + len(piece.ids)] = key in own
                at += len(piece.ids)
        return seen.to(self.backbone.device)

    def plan(self, run: Run) -> DecodingPlan:
        """Return which weights answer ``run``, with which attention."""
        mode, settings = run.batch.requests[0].mode, self.settings
        tuned = self.prompts.answers_tuned(mode)
        ape = None
        if mode == "ape":
            lengths = [len(row.prefix) for row in run.batch.rows]
            ape = Ape.over(run.context.mask, lengths, settings.ape_temperature, settings.ape_scale)
        return DecodingPlan(self.decoder if tuned else self.backbone, adapter=tuned, ape=ape)

    def decode(
        self, run: Run, options: DecodingOptions, on_logits: Callable[[torch.Tensor], None] | None = None
    ) -> Generator[None, None, None]:
        """Decode ``run`` step by step, filling its rows and times; its memory goes to the next run in the end.

        Raises:
            MemoryLimitError: memory runs out.
        """
        plan = self.plan(run)
        if plan.adapter and self.settings.tuned_evidence and (mark := self.encoder.evidence_mark) is not None:
            options = replace(options, stop=(*options.stop, mark))
        steps = decode(
            plan,
            run.context,
            [request.question for request in run.batch.requests],
            options,
            self.encoder.decode,
            row_of=run.batch.row_of,
            visible=self.visible(run),
            unsettling_ids=self.encoder.plain.unsettling_ids,
            on_logits=on_logits,
            is_cancelled=lambda number: run.batch.requests[number].cancelled.is_set(),
            limits=[request.most_tokens or options.max_new_tokens for request in run.batch.requests],
        )
        try:
            with self.memory_errors(run.batch):
                for rows in steps:
                    run.first_token_at = run.first_token_at or time.perf_counter()
                    run.rows = rows
                    yield
        finally:
            steps.close()
            run.release()

    def answer(self, run: Run, number: int) -> Answer:
        """The answer of row ``number`` of a run whose decoding has ended."""
        request, row = run.batch.requests[number], run.rows[number]
        reading = request.reading
        apart = request.mode != "concat"
        origins: dict[str, Origin] = dict.fromkeys(reading.keys, "prompt")
        misses = run.misses if apart else {}
        if apart:
            known: Mapping[str, Origin] = {**(request.choice.origins if request.choice else {}), **run.origins}
            found: dict[tuple[int, ...], Origin] = {piece.ids: known[piece.key] for piece in request.fused or ()}
            origins = {key: found[ids] for key, ids in reading.keys.items()}
        sources = reading.sources(origins, misses)
        if request.choice is not None:
            sources = request.choice.sources(sources)
        if row.finish_reason in (None, "length"):
            logger.info("the answer was cut at its limit of %d tokens; max_new_tokens raises it", len(row.ids))
        cached = sum(len(ids) for key, ids in reading.keys.items() if origins[key] in get_args(Tier))
        return Answer(
            text=row.text,
            mode=request.mode,
            sources=sources,
            citations=find_citations(row.text, reading.cited_order),
            usage=Usage(
                prompt_tokens=len(request.prefix) + request.fused_tokens + len(request.question.ids),
                document_tokens=reading.tokens if apart else sum(end - start for start, end in request.spans),
                cached_document_tokens=cached,
                completion_tokens=len(row.ids),
            ),
            timings=Timings(
                *(at - request.began for at in (run.prefilled_at, run.first_token_at, time.perf_counter()))
            ),
            finish_reason=row.finish_reason or "length",
            token_ids=tuple(row.ids),
        )

    def _answer_batch(self, batch: Batch, options: DecodingOptions) -> list[Answer]:
        """Answers of one batch; in two halves where it needs more memory than there is."""
        requests = batch.requests
        try:
            return self._answers(batch, options)
        except MemoryLimitError:
            if len(requests) == 1:
                raise
        self._give_back()  # the failed run is gone by now, its memory with it
        half = len(requests) // 2
        logger.warning("a batch of %d questions needs too much memory and is answered in halves", len(requests))
        parts = (requests[:half], requests[half:])
        return [
            answer
            for part in parts
            for smaller in self.batches(part)
            for answer in self._answer_batch(smaller, options)
        ]

    def _answers(self, batch: Batch, options: DecodingOptions) -> list[Answer]:
        run = self.start(batch, options)
        for _ in self.decode(run, options):
            pass
        return [self.answer(run, number) for number in range(len(batch.requests))]

    def require_explicit_attention(self) -> None:
        """Refuse a model whose attention ours cannot stand in for, measured when it is first asked for."""
        if not self._explicit_is_exact:
            prefix = prefill_prefix(self.backbone, self.encoder.prefix_ids)
            require_ape(self.backbone, prefix, self.ordinary_ids(), tokens_per_pass=self.document_kvs.tokens_per_pass)
            self._explicit_is_exact = True

    def _log_mode(self, mode: Mode, reason: str) -> None:
        name = self.backbone.model_id
        is_tuned = self.prompts.is_tuned
        on = is_tuned and self.prompts.answers_tuned(mode)
        logger.info("mode %s (%s), model %s, tuned decoder %s", mode, reason, name, "on" if on else "off")
        if mode == "ape":
            logger.info("APE with temperature %g, scale %g", self.settings.ape_temperature, self.settings.ape_scale)
        if mode == "fusion" and not (is_tuned or self.settings.tuned):
            self._warn_once(
                f"{name} was not trained to read fused documents and has no adapter; "
                "answers can be worse than in mode 'concat'"
            )
        if mode == "fusion" and is_tuned and self.settings.mode == "concat" and self.settings.tuned_concat:
            self._warn_once(f"the tuned decoder of {name} was trained on joined prompts; its own mode is 'concat'")

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)
