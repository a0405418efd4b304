"""Answers requests on a vLLM server: prefills the documents that the store lacks, and asks vLLM for tokens."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch

from ..engine.document_kvs import DocumentKVs, Scope
from ..engine.modes import AnswerMode
from ..engine.requests import Batch, Request
from ..engine.runner import Runner
from ..engine.running_batch import FusedRun, Run
from ..errors import ContextLimitError, InvalidInputError, StoreError
from ..fusion.constraints import Allowed, constrained
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.sampling import GREEDY_BELOW, DecodingOptions
from ..schema import Answer, Origin
from ..store import DocumentStore, FetchedKVs, KVRequest
from ..text.answer_format import AnswerFormat
from ..text.documents import EncodedDocuments
from ..text.layouts import Layout
from .model import VllmModel
from .prompt import FusedPrompt
from .reader import ReaderOptions
from .server import BASE, TUNED, DocumentsLostError, ServerOptions, TokenRequest, VllmServer

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]


class VllmRunner(Runner[VllmModel]):
    """A runner whose answers come from a vLLM server, which batches them itself."""

    gathers = False

    def __init__(self, model: VllmModel, document_kvs: DocumentKVs, *, max_fused_tokens: int) -> None:
        super().__init__(model, document_kvs, max_fused_tokens=max_fused_tokens)
        self._prefilling = threading.Lock()  # one request's documents at a time; vLLM computes meanwhile

    @cached_property
    def server(self) -> VllmServer:
        """The server, which the first access starts: the gate.

        Raises:
            ModelLoadError: vLLM cannot serve the model.
        """
        return VllmServer(_server_options(self.model, self.document_kvs.store))

    def request_for(
        self, encoded: EncodedDocuments, layout: Layout, mode: AnswerMode, namespace: str, options: DecodingOptions,
        began: float,
    ) -> Request:  # fmt: skip
        request = super().request_for(encoded, layout, mode, namespace, options, began)
        if any(not piece.stored for piece in request.fused or ()):
            raise InvalidInputError(
                "positions is 'global', but engine 'vllm' reads stored documents, whose positions are 'uniform'; use "
                "engine='torch'."
            )
        tokens, most = len(_prompt_of(request)), self.model.files.max_model_len
        wanted = request.limits.least(options)
        if tokens + wanted > most:
            raise ContextLimitError(
                f"prefix, documents and question have {tokens} tokens and the answer up to {wanted}, but vLLM accepts "
                f"only {most} per request; raise max_model_len (--max-model-len)."
            )
        return replace(request, limits=request.limits.within(most - tokens, options))

    def answer_all(self, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
        """Answer all requests at the same time."""
        runs = [self.begin(Batch.of(self.prepare(request, options))) for request in requests]

        def answer(run: Run) -> Answer:
            for _ in self.answer_steps(run, options):
                pass
            return run.answer(0)

        if len(runs) < 2:
            return [answer(run) for run in runs]
        with ThreadPoolExecutor(len(runs), thread_name_prefix="kvfusion-vllm") as pool:
            return list(pool.map(answer, runs))

    def begin(self, batch: Batch) -> Run:
        """Prefill the documents that the store lacks.

        Raises:
            StoreError: the store cannot keep the documents.
            CancelledError: the request was cancelled meanwhile.
        """
        (request,) = batch.requests
        fetched = self._stored(request, again=False)
        now = time.perf_counter()
        return Run(batch, fetched.origins, fetched.misses, self.document_kvs.key_kind, now)

    def _stored(self, request: Request, *, again: bool) -> FetchedKVs:
        """Make sure that the store has the documents of a request.

        Args:
            again: read and check those that it has, since vLLM could not load them.
        """
        kvs, store, scope = self.document_kvs, self.document_kvs.store, request.scope
        kvs.require_version(request.version)
        pieces = {piece.key: piece.ids for piece in request.fused or ()}
        # Documents of other environments are only used if they agree, which is checked when they are read.
        checks = again or kvs.key_kind == "portable"
        kept: dict[str, Origin] = {}
        if not checks:
            kept = {key: tier for key in pieces if (tier := store.tier_of(key)) is not None}
        missing = {key: KVRequest(ids) for key, ids in pieces.items() if key not in kept}
        with self._prefilling:
            prefix = self._stored_prefix(scope, request.version, again)
            fetched = kvs.fetch(
                missing, None, request.version, scope, keep=False, is_cancelled=request.cancelled.is_set
            )
        lost = [key for key in (*prefix, *pieces) if store.tier_of(key) is None]
        if lost:
            raise StoreError(
                f"vLLM reads documents from the store {store!r}, but it cannot keep {len(lost)} of a question's "
                "documents; raise its maximum size, or free space on its disk."
            )
        return FetchedKVs({}, {**kept, **fetched.origins}, fetched.misses)

    def _stored_prefix(self, scope: Scope, version: str, again: bool) -> dict[str, Ids]:
        """Make sure that the store has the prefix, and return its ids by store key."""
        prefix = self.document_kvs.store_prefix(scope, version)
        if again and prefix:
            requests = {key: KVRequest(ids) for key, ids in prefix.items()}
            self.document_kvs.fetch(requests, None, version, Scope((), scope.namespace), keep=False)
        return prefix

    def answer_steps(self, run: Run, options: DecodingOptions) -> Generator[None, None, None]:
        """Let the answer grow by the tokens that vLLM generates, and pause after each."""
        if isinstance(run, FusedRun):
            yield from super().answer_steps(run, options)
            return
        (request,) = run.batch.requests
        answer = self.empty_answer(request, options)
        run.answers = [answer]
        for _ in self.growing(request, answer, options):
            run.first_token_at = run.first_token_at or time.perf_counter()
            yield

    def growing(
        self, request: Request, answer: GrowingAnswer, options: DecodingOptions
    ) -> Generator[None, None, None]:
        """Let ``answer`` grow by the tokens that vLLM generates, and pause after each.

        If the answer replaces one of vLLM's tokens, vLLM continues after the replacement.

        Raises:
            EngineError: vLLM has ended, or does not respond.
        """
        has_retried = False
        while answer.finish_reason is None:
            before = len(answer.ids)
            try:
                yield from self._grow(request, answer, options)
            except DocumentsLostError:
                if has_retried or len(answer.ids) > before:
                    raise
                has_retried = True
                logger.warning("vLLM cannot load the documents of a request; checking them and repeating the request")
                self._stored(request, again=True)

    def _grow(self, request: Request, answer: GrowingAnswer, options: DecodingOptions) -> Generator[None, None, None]:
        """Ask vLLM once, and push its tokens until the answer's format begins, if it has one after its reasoning."""
        allowed = answer.allowed
        if (
            allowed is not None
            and allowed.also is not None
            and self._opens_reasoning(request, answer, allowed, options)
        ):
            answer.push(allowed.also, is_end=False)
            yield
            return
        format = None if allowed is None else allowed.constraint.format
        asked = self.token_request(request, answer.ids, options, format)
        with closing(self.server.tokens(asked)) as tokens:
            for token, _ in tokens:
                added = answer.push(token, is_end=token in self.model.end_ids)
                if answer.finish_reason is None and request.cancelled.is_set():
                    answer.finish_reason = "cancelled"
                yield
                if (
                    answer.finish_reason is not None
                    or added != token
                    or (format is None and answer.allowed is not None)
                ):
                    return
        answer.finish_reason = "length"

    def _opens_reasoning(
        self, request: Request, answer: GrowingAnswer, allowed: Allowed, options: DecodingOptions
    ) -> bool:
        """Return whether the next token opens the reasoning, when otherwise the answer begins in its format."""
        logits = torch.zeros(1, self.model.vocabulary_size)
        ids = constrained(logits, [allowed])[0].isfinite().nonzero().flatten().tolist()
        asked = replace(self.token_request(request, answer.ids, options), max_tokens=1, first=ids)
        return [token for token, _ in self.server.tokens(asked)] == [allowed.also]

    def plain_salt(self, namespace: str) -> str:
        """Return the salt of prompts without fused documents, which only requests of one tenant share."""
        return hashlib.sha256(f"plain/{namespace}".encode()).hexdigest()

    def token_request(
        self, request: Request, written: Sequence[int], options: DecodingOptions, format: AnswerFormat | None = None
    ) -> TokenRequest:
        """Return the request for the tokens after ``written``, which come before the answer's format."""
        prompt = _prompt_of(request)
        documents = self._documents(request)
        return TokenRequest(
            model=TUNED if request.mode.tuned and self.model.files.adapter is not None else BASE,
            prompt=[*prompt, *written],
            salt=self.plain_salt(request.namespace) if documents is None else documents.salt,
            max_tokens=request.limits.total - len(written),
            end_ids=sorted(self.model.end_ids if request.constraint is None else request.constraint.end_ids),
            documents={} if documents is None else documents.params(),
            sampling=_sampling(options),
            format=format,
        )

    def _documents(self, request: Request) -> FusedPrompt | None:
        """Return what the connector has to load, or None if everything is in the question's own prompt."""
        scope = request.scope
        pieces = [(piece.key, len(piece.ids)) for piece in request.fused or ()]
        if scope.prefix:
            key = self.document_kvs.key(scope.prefix, Scope((), scope.namespace))
            pieces.insert(0, (key, len(scope.prefix)))
        return FusedPrompt(tuple(pieces), request.question.start) if pieces else None


def _prompt_of(request: Request) -> list[int]:
    """Return the ids of prefix, documents and question."""
    documents = [i for piece in request.fused or () for i in piece.ids]
    return [*request.scope.prefix, *documents, *request.question.ids]


def _sampling(options: DecodingOptions) -> dict[str, Any]:
    if options.temperature < GREEDY_BELOW:
        return {"temperature": 0.0}
    chosen = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k, "seed": options.seed}
    return {name: value for name, value in chosen.items() if value is not None}


def _server_options(model: VllmModel, store: DocumentStore) -> ServerOptions:
    shape, files = model.kv_shape, model.files
    assert store.disk is not None
    place = str(store.disk.path)
    sizes = {name: size for name, size in asdict(shape).items() if name != "dtype"}
    reader = ReaderOptions(
        store=place if store.remote is None else store.remote.url,
        local=None if store.remote is None else place,
        codec=store.disk.codec,
        dtype=str(shape.dtype).removeprefix("torch."),
        **sizes,
    )
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    return ServerOptions(
        files.model, files.revision, dtype, reader, files.max_model_len, files.max_positions, files.adapter,
        files.adapter_rank, files.arguments,
    )  # fmt: skip
