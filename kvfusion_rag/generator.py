"""KVFusionGenerator: the facade. Documents and a question in, an answer out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, get_args

from .engine.attribution import Attribution, attribute_call, attributed
from .engine.calls import AnswerKwargs, Call, WordingKwargs, read_call, read_calls
from .engine.document_calls import DocumentCalls
from .engine.engine import MAX_FUSED_TOKENS, Engine, EngineOptions
from .engine.invariance import check_invariance
from .engine.queue import RequestQueue
from .engine.requests import Batch
from .engine.runner import Runner
from .engine.streaming import AnswerStream
from .engine.support.judging import judged, signals_of
from .errors import InvalidInputError
from .fusion.interface import FusionModel
from .fusion.load_options import EngineChoice, LoadKwargs, load_torch_model
from .fusion.prefill import LENGTH_BUCKET
from .llama_cpp.choosing import load_faster_model
from .llama_cpp.loading import load_llama_cpp_model
from .option_names import check_option_names
from .schema import (
    Answer,
    AnswerPiece,
    Document,
    FocusChoice,
    InvarianceReport,
    KeyKindChoice,
    ModeChoice,
    Prompt,
    ShownPrompt,
)
from .store import Place, as_store
from .text.settings import ModelSettings
from .text.support import Signals
from .vllm.loading import load_vllm_model, shared_store
from .vllm.model import VllmModel

logger = logging.getLogger(__name__)


class KVFusionGenerator(DocumentCalls):
    """Answers questions from separately prefilled documents (KV-Fusion, arXiv 2501.07523).

    Use :meth:`from_pretrained` to load one. It is safe to use from several threads and tasks, whose questions are
    answered together.

    Attributes:
        gate: what the support gate measured at load.

    Raises:
        UnsupportedModelError: the support gate measured that fusion is not exact on this model.
    """

    def __init__(
        self,
        model: FusionModel,
        *,
        store: Place,
        settings: ModelSettings | None = None,
        options: EngineOptions | None = None,
        gather: bool = True,
    ) -> None:
        self._engine: Engine[FusionModel] = Engine(
            model, settings, store=store, options=options, make_runner=_runner_of(model)
        )
        longest = self.settings.passage_length or LENGTH_BUCKET
        self._engine.document_kvs.store.require_room(model.kv_shape, longest)
        runner = self._engine.runner
        self._queue = RequestQueue(runner.answer_all) if gather and runner.gathers else None
        self.gate = model.run_gate(self._engine.encoder.prefix_ids, self._engine.ordinary_ids())
        if isinstance(model, VllmModel):
            from .vllm.gate import measured_on_vllm  # needs httpx, which vLLM installs

            self.gate = measured_on_vllm(self._engine, self.gate)

    @classmethod
    @check_option_names(LoadKwargs)
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        store: Place = "memory",
        namespace: str = "",
        max_fused_tokens: int = MAX_FUSED_TOKENS,
        key_kind: KeyKindChoice = "auto",
        gather: bool = True,
        **options: Unpack[LoadKwargs],
    ) -> KVFusionGenerator:
        """Load a model and measure that fusion is exact on it (``docs/models.md``).

        Args:
            model: hub name, folder or GGUF file. Default: SmolLM2-135M-Instruct.
            store: "memory" (1 GiB), a folder or fsspec URL (behind memory), a shared store, or None.
            namespace: separates tenants' documents in a shared store.
            max_fused_tokens: limit of document tokens per question.
            key_kind: "exact" or "portable" store keys (``docs/store.md``). Default: portable for a URL, else exact.
            gather: answer callers that wait at the same time in one batch, which is several times faster. Kernels
                round differently for other batch shapes, so turn this off if the bits of logits must not depend on
                other callers.
            options: what to load (``ModelKwargs``: adapter, device, dtype, ...) and changes to the model's settings
                (``SettingsKwargs``: mode, prefix, passage_length, ...).

        Raises:
            ModelLoadError: the model, adapter or decoder cannot be read.
            UnsupportedModelError: fusion is not exact on this architecture; the message gives the reason.
            InvalidInputError: an argument is unknown, or its value is not allowed.
        """
        engine_options = EngineOptions(namespace, max_fused_tokens, key_kind)
        opened = as_store(store)  # arguments are checked before a model is loaded
        loaded, settings = _load(model, options)
        if isinstance(loaded, VllmModel):
            opened = shared_store(opened)
        return cls(loaded, store=opened, settings=settings, options=engine_options, gather=gather)

    # Siblings

    @check_option_names(ModelSettings)
    def with_settings(self, **changes: Any) -> KVFusionGenerator:
        """Return a generator over the same weights, store and queue, with other settings.

        Args:
            changes: fields of ``ModelSettings``, such as mode, passage_length, ape_temperature.

        Raises:
            InvalidInputError: an unknown field, or a value that is not allowed.
        """
        return self._sibling(self._engine.sibling(settings=replace(self.settings, **changes)))

    def with_namespace(self, namespace: str) -> KVFusionGenerator:
        """Return a generator over the same weights, store, settings and queue, for another tenant's documents.

        Raises:
            InvalidInputError: ``namespace`` is not a valid name.
        """
        return self._sibling(self._engine.sibling(namespace=namespace))

    def _sibling(self, engine: Engine[FusionModel]) -> KVFusionGenerator:
        made = object.__new__(KVFusionGenerator)
        made._engine, made._queue, made.gate = engine, self._queue, self.gate
        return made

    # Answers

    @check_option_names(AnswerKwargs)
    def answer(
        self, question: str, documents: Sequence[Document | str] = (), **options: Unpack[AnswerKwargs]
    ) -> Answer:
        """Answer ``question`` from ``documents``, whose order does not matter in modes "fusion" and "ape".

        Args:
            question: the bare question.
            documents: retrieved documents. Strings are documents without id and title. Blank ones are skipped and
                repeated ones are fused once. Without documents this is plain generation.
            options: prompt, mode, focus, tools, tool_choice, parallel_tool_calls, response_format, attribution,
                min_support, chat_template_kwargs (``AnswerKwargs``), max_new_tokens, max_reasoning_tokens,
                temperature, top_p, top_k, stop, seed (``DecodingOptions``).

        Raises:
            InvalidInputError: an argument is invalid.
            ContextLimitError: documents, question and answer are too long.
            ControlTokenError: untrusted text would have become a control token.
        """
        prompt = options.pop("prompt", None)
        return self.answer_batch([question], [documents], prompts=[prompt], **options)[0]

    @check_option_names(AnswerKwargs)
    async def aanswer(
        self, question: str, documents: Sequence[Document | str] = (), **options: Unpack[AnswerKwargs]
    ) -> Answer:
        """Like :meth:`answer`, without blocking the event loop. Cancelling the task ends the answer at a token."""
        prompt = options.pop("prompt", None)
        return (await self.aanswer_batch([question], [documents], prompts=[prompt], **options))[0]

    @check_option_names(AnswerKwargs)
    def answer_batch(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AnswerKwargs],
    ) -> list[Answer]:
        """Answer several questions together, each from its own documents.

        Takes one question, document list and prompt per row; other arguments are those of :meth:`answer`. Questions
        over the same documents read them once. Nothing is computed if one question is invalid. Questions that exceed
        ``max_fused_tokens`` together are decoded in several batches, in order.
        """
        call = read_calls(self._engine, questions, documents, prompts, options)
        ask = self._engine.answer_all if self._queue is None else self._queue.ask
        return self._measured(call, ask(call.requests, call.decoding))

    @check_option_names(AnswerKwargs)
    async def aanswer_batch(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        *,
        prompts: Sequence[Prompt] | None = None,
        **options: Unpack[AnswerKwargs],
    ) -> list[Answer]:
        """Like :meth:`answer_batch`, without blocking the event loop; see :meth:`aanswer`."""
        call = await asyncio.to_thread(read_calls, self._engine, questions, documents, prompts, options)
        if self._queue is not None:
            answers = await self._queue.aask(call.requests, call.decoding)
        else:
            with call.cancelled_with_task():
                answers = await asyncio.to_thread(self._engine.answer_all, call.requests, call.decoding)
        measured = asyncio.ensure_future(asyncio.to_thread(self._measured, call, answers))
        try:
            return await asyncio.shield(measured)
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.wait({measured})  # measuring ends at its next pass; until then the call is still running
            if not measured.cancelled():
                measured.exception()  # retrieved, so that asyncio does not log it
            raise

    @check_option_names(AnswerKwargs)
    def stream(
        self, question: str, documents: Sequence[Document | str] = (), **options: Unpack[AnswerKwargs]
    ) -> AnswerStream:
        """Return the answer as a stream of pieces. Arguments and errors are those of :meth:`answer`."""
        call = read_call(self._engine, question, documents, options)
        return AnswerStream(self._pieces(call), call.requests[0].cancelled)

    def _pieces(self, call: Call) -> Generator[AnswerPiece | Answer, None, None]:
        runner, options = self._engine.runner, call.decoding
        try:
            request = runner.prepare(call.requests[0], options)  # the stream may be read long after it was created
            run = runner.begin(Batch.of(request))
        except CancelledError:  # the stream was closed while its documents were prefilled
            return
        splitter = None if request.calls is None else request.calls.splitter()
        with closing(runner.answer_steps(run, options)) as steps:
            for _ in steps:
                answer = run.answers[0]
                if piece := answer.take_reasoning():
                    yield AnswerPiece(piece, is_reasoning=True)
                piece = answer.take()
                if splitter is not None:
                    yield from splitter.add(piece, is_complete=answer.finish_reason is not None)
                elif piece:
                    yield AnswerPiece(piece)
        yield self._measured(replace(call, requests=[request]), [run.answer(0)])[0]

    def _measured(self, call: Call, answers: Sequence[Answer]) -> list[Answer]:
        """Return the answers with what the call wants to know about them."""
        return judged(self._engine, call, attributed(self._engine, call, answers))

    # Explanations

    @check_option_names(AnswerKwargs)
    def attribute(
        self,
        question: str,
        documents: Sequence[Document | str],
        *,
        answer: Answer | str | None = None,
        **options: Unpack[AnswerKwargs],
    ) -> Attribution:
        """Measure which documents an answer came from: its probability without each, and the attention each received.

        All variants read the same fused cache in one pass (in mode "concat" each is a prompt of its own). Documents
        that focus left out are not measured.

        Args:
            answer: an answer of this generator or a text to judge. Default: the question is answered first.
            question, documents, options: as :meth:`answer` takes them.
        """
        if answer is None:
            answer = self.answer(question, documents, **options)
        return attribute_call(self._engine, question, documents, answer, options)

    @check_option_names(AnswerKwargs)
    def support_signals(
        self, questions: Sequence[str], documents: Sequence[Sequence[Document | str]], **options: Unpack[AnswerKwargs]
    ) -> list[tuple[Answer, Signals | None]]:
        """Answer questions like :meth:`answer_batch`, and measure the signals from which support is computed.

        Returns:
            Each answer with its signals in nats per token (``SupportCalibration``), or None for an answer that is
            empty, calls tools or has no documents. No calibration is needed.
        """
        call = read_calls(self._engine, questions, documents, None, options)
        answers = self._engine.answer_all(call.requests, call.decoding)
        return list(zip(answers, signals_of(self._engine, call, answers), strict=True))

    @check_option_names(WordingKwargs)
    def show_prompt(
        self, question: str, documents: Sequence[Document | str] = (), **wording: Unpack[WordingKwargs]
    ) -> ShownPrompt:
        """Return the text that the model reads for this question, divided into documents and the rest.

        Arguments are those of :meth:`answer`. Fused documents are shown once each, in the order in which they are
        joined; they share positions. Nothing is computed unless focus has to choose documents.
        """
        call = read_call(self._engine, question, documents, wording)
        return self._engine.prompts.shown(self._engine.runner.prepare(call.requests[0], call.decoding))

    @check_option_names()
    def check_invariance(
        self,
        question: str,
        documents: Sequence[Document | str],
        *,
        permutations: int = 10,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        seed: int = 0,
    ) -> InvarianceReport:
        """Answer in the given and in ``permutations`` shuffled orders, and compare texts and bits of all logits.

        The first pass may compute KVs that later passes find in the store, so this also checks that stored and
        computed KVs are equal.
        """
        return check_invariance(
            self._engine, question, documents, permutations=permutations, mode=mode, focus=focus, seed=seed
        )

    def bump_epoch(self) -> None:
        """Read the weights again before the next question.

        Call this after changing weights in a way that torch does not count (``tensor.data``, another library). Other
        changes in place are noticed without it.
        """
        self._engine.model.reset_digest()


def _load(model: str | Path | None, options: LoadKwargs) -> tuple[FusionModel, ModelSettings]:
    engine = options.get("engine") or "torch"
    if engine == "torch":
        return load_torch_model(model, options)
    if engine == "llama.cpp":
        return load_llama_cpp_model(model, options)
    if engine == "vllm":
        return load_vllm_model(model, options)
    if engine == "auto":
        return load_faster_model(model, options)
    raise InvalidInputError(f"engine is {engine!r}, but it must be one of {', '.join(get_args(EngineChoice))}.")


def _runner_of(model: FusionModel) -> type[Runner[Any]]:
    """Return what answers: this process, or for a :class:`VllmModel` vLLM."""
    if not isinstance(model, VllmModel):
        return Runner
    from .vllm.runner import VllmRunner  # needs httpx, which vLLM installs

    return VllmRunner
