"""A model on llama.cpp: Dp without an adapter, and Dt with it, over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from ..fusion.constraints import Constraint, ConstraintCompiler
from ..fusion.decode import DecodingLoop
from ..fusion.fused_cache import BufferPool, FusedBuffer, FusedContext
from ..fusion.growing_answer import GrowingAnswer
from ..fusion.interface import ApeFactors, Capabilities, Ids, Question, Span
from ..fusion.sampling import DecodingOptions, sampler
from ..model.fingerprint import digest_facts
from ..model.kv import DocumentKV, KVShape
from ..model.rope import PositionLimit
from ..schema import GateReport
from ..text.answer_format import AnswerFormat
from ..text.settings import ModelSettings
from .context import CACHE_TYPES, Context, ContextOptions, ContextPool, Tokens
from .gate import run_gate
from .library import PACKAGE, Weights
from .states import Layout

CPU = torch.device("cpu")
DOCUMENT, PREFIX = 0, 1  # sequences while documents are read
SPARE_CELLS = 128  # for each answer; the context grows if they are used up
ROWS = 63  # the sequence that a row of documents is restored into


@dataclass(frozen=True, slots=True)
class Description:
    """What the files of a model say.

    Attributes:
        weights_digest, adapter_digest: digests of the files.
        end_ids: ids that end an answer.
        end_id: the one that ends a turn.
    """

    model_id: str
    revision: str | None
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    base_settings: ModelSettings
    position_limit: PositionLimit
    weights_digest: str
    adapter_digest: str | None
    end_ids: frozenset[int]
    end_id: int | None
    max_new_tokens: int | None


class LlamaCppModel:
    """See :class:`~kvfusion_rag.fusion.interface.FusionModel`.

    Answers over fused caches and joined prompts, with or without the adapter, in batches. It cannot measure attention
    or change it, so mode "ape" and attribution by attention are refused.

    Args:
        adapter: an adapter of ``weights``, for Dt only.

    Raises:
        UnsupportedModelError: the cache of this architecture cannot be split into documents.
    """

    def __init__(
        self, weights: Weights, description: Description, options: ContextOptions, *, adapter: Any = None
    ) -> None:
        self._weights, self._facts, self._options, self._adapter = weights, description, options, adapter
        self._contexts = ContextPool(lambda cells: Context(weights, options, cells))
        self._layout = self._measured_layout()
        self.kv_shape: KVShape = self._layout.shape
        self._pool = BufferPool()
        vocabulary = weights.vocabulary_size
        self._constraints = ConstraintCompiler(description.tokenizer, vocabulary, description.end_ids)

    def _measured_layout(self) -> Layout:
        dtype = CACHE_TYPES[self._options.cache_type][1]
        with self._contexts.context(1) as context:
            context.decode([Tokens((0,), 0, DOCUMENT)])
            return Layout.of(context.state(DOCUMENT), dtype, self.model_id)

    @property
    def model_id(self) -> str:
        return self._facts.model_id

    @property
    def revision(self) -> str | None:
        return self._facts.revision

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._facts.tokenizer

    @property
    def settings(self) -> ModelSettings:
        return self._facts.settings

    @property
    def base_settings(self) -> ModelSettings:
        return self._facts.base_settings

    @property
    def context_window(self) -> int | None:
        return self._facts.position_limit.positions

    @property
    def position_limit(self) -> PositionLimit:
        return self._facts.position_limit

    @property
    def vocabulary_size(self) -> int:
        return self._weights.vocabulary_size

    @property
    def end_ids(self) -> frozenset[int]:
        return self._facts.end_ids

    @property
    def end_id(self) -> int | None:
        return self._facts.end_id

    @property
    def max_new_tokens(self) -> int | None:
        return self._facts.max_new_tokens

    @property
    def is_tuned(self) -> bool:
        return self._adapter is not None

    @property
    def device(self) -> torch.device:
        """The device of documents' KVs between two questions: main memory, even if layers are on a GPU."""
        return CPU

    @property
    def tokens_per_pass(self) -> int:
        return 1  # each document has passes of its own

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(shared_rows=True, attention=False)

    # Identity

    @property
    def weights_digest(self) -> str:
        return self._facts.weights_digest

    @property
    def adapter_digest(self) -> str | None:
        return self._facts.adapter_digest

    def fingerprint(self) -> str:
        return digest_facts({"portable": self.portable_fingerprint(), "environment": dict(self.environment())})

    def portable_fingerprint(self) -> str:
        return digest_facts({"engine": "llama.cpp", "weights": self.weights_digest, "cache": self._options.cache_type})

    def environment(self) -> Mapping[str, str | None]:
        return {
            "engine": f"{PACKAGE} {version(PACKAGE)}",
            "device": "gpu" if self._weights.uses_gpu else "cpu",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": str(self._options.threads),
        }

    def identity(self) -> Mapping[str, str | None]:
        return {
            "model": self.fingerprint(),
            "adapter": self.adapter_digest,
            "decoder": None,
            "dtype": self._options.cache_type,
        }

    def reset_digest(self) -> None:
        """Nothing changes the weights of a loaded file."""

    # Documents

    def prefill(
        self, documents: Sequence[Ids], prefix: DocumentKV | None, starts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, DocumentKV]]:
        before = 0 if prefix is None else prefix.num_tokens
        with self._contexts.context(before + max(map(len, documents), default=1)) as context:
            if prefix is not None:
                context.restore(PREFIX, self._packed(prefix, 0))
            for index, ids in enumerate(documents):
                if prefix is not None:
                    context.copy(PREFIX, DOCUMENT)
                context.decode([Tokens(ids, before if starts is None else starts[index], DOCUMENT)])
                yield index, self._layout.unpack(context.state(DOCUMENT), ids, skip=before)
                context.remove(DOCUMENT)

    def _packed(self, kv: DocumentKV, start: int) -> Any:
        return self._layout.pack(kv.keys[:, 0], kv.values[:, 0], range(start, start + kv.num_tokens))

    def buffer(self, lengths: Sequence[int], *, room: int) -> FusedBuffer:
        return FusedBuffer(lengths, self.kv_shape, CPU, pool=self._pool)  # answers take cells of the context

    # Answering

    def plan(
        self, context: FusedContext, prefix_lengths: Sequence[int], *, tuned: bool, ape: ApeFactors | None
    ) -> bool:
        """Return whether the adapter is used, which is the only choice."""
        return tuned

    def constraint(self, format: AnswerFormat) -> Constraint:
        return self._constraints.compile(format)

    def decode(
        self,
        plan: bool,
        context: FusedContext,
        questions: Sequence[Question],
        answers: Sequence[GrowingAnswer],
        options: DecodingOptions,
        *,
        row_of: Sequence[int] | None = None,
        visible: torch.Tensor | None = None,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        is_cancelled: Callable[[int], bool] = lambda number: False,
    ) -> Generator[None, None, None]:
        rows = list(range(len(questions))) if row_of is None else row_of
        cells = int(context.mask.sum()) + sum(len(question.ids) + SPARE_CELLS for question in questions)
        with self._contexts.context(cells, self._adapter if plan else None) as sequences:
            self._restore_rows(sequences, context, rows, visible)

            def logits_of(open_ones: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Any:
                inputs = zip(open_ones, tokens, starts, strict=True)
                return sequences.decode([Tokens(ids, start, i, predicted=1) for i, ids, start in inputs])

            def keep(open_ones: Sequence[int]) -> None:
                for i in set(range(len(questions))) - set(open_ones):
                    sequences.remove(i)

            loop = DecodingLoop(self.model_id, self._options.cache_type, self.end_ids, logits_of, keep)
            yield from loop.run(questions, answers, sampler(options, len(answers), CPU), on_logits, is_cancelled)

    def _restore_rows(
        self, sequences: Context, context: FusedContext, row_of: Sequence[int], visible: torch.Tensor | None
    ) -> None:
        """Put the documents of each row into cells, and let the row's questions use those that they may attend to.

        The i-th question becomes sequence i.
        """
        for row, length in enumerate(context.mask.sum(dim=1).tolist()):
            members = [i for i, its_row in enumerate(row_of) if its_row == row]
            if not length or not members:
                continue
            for start, end, users in _parts(members, length, visible):
                sequences.restore(ROWS, self._packed_slots(context, row, start, end))
                for i in users:
                    sequences.copy(ROWS, i)
                sequences.remove(ROWS)

    def _packed_slots(self, context: FusedContext, row: int, start: int, end: int) -> Any:
        keys = (layer.states[0][row, 0, start:end] for layer in context.layers)
        values = (layer.states[1][row, 0, start:end] for layer in context.layers)
        return self._layout.pack(keys, values, context.cache.positions[row, start:end].tolist())

    # Measuring

    def token_likelihoods(
        self, prefix: DocumentKV | None, documents: Sequence[DocumentKV | None], ids: Sequence[int], *, given: int
    ) -> list[list[float]]:
        before = 0 if prefix is None else prefix.num_tokens
        lengths = [0 if kv is None else kv.num_tokens for kv in documents]
        found: list[list[float]] = []
        with self._contexts.context(before + max(lengths) + len(ids)) as context:
            if prefix is not None:
                context.restore(PREFIX, self._packed(prefix, 0))
            for kv, length in zip(documents, lengths, strict=True):
                if kv is not None:
                    context.restore(DOCUMENT, self._packed(kv, before))
                if prefix is not None:
                    context.copy(PREFIX, DOCUMENT)
                scored = len(ids) - given
                logits = context.decode([Tokens(ids[:-1], before + length, DOCUMENT, predicted=scored)])
                found.append(_log_probabilities(logits, ids[given:]).tolist())
                context.remove(DOCUMENT)
        return found

    def answer_likelihoods(
        self,
        plan: bool,
        context: FusedContext,
        questions: Sequence[Question],
        answer: Sequence[int],
        *,
        visible: torch.Tensor | None = None,
    ) -> list[float]:
        found: list[float] = []
        longest = max(len(question.ids) for question in questions) + len(answer)
        with self._contexts.context(
            int(context.mask[0].sum()) + longest, self._adapter if plan else None
        ) as sequences:
            for number, question in enumerate(questions):
                only = None if visible is None else visible[number : number + 1]
                self._restore_rows(sequences, context, [0], only)
                ids = (*question.ids, *answer[:-1])
                logits = sequences.decode([Tokens(ids, question.start, 0, predicted=len(answer))])
                found.append(_log_probabilities(logits, answer).sum().item())
                sequences.clear()
        return found

    def attention_shares(
        self,
        plan: bool,
        context: FusedContext,
        question: Question,
        answer: Sequence[int],
        spans: Sequence[Sequence[Span]],
        *,
        before_pass: Callable[[], None],
    ) -> list[float]:
        raise self._no_attention()

    def logits_behind(self, context: FusedContext, ids: Sequence[int], start: int) -> torch.Tensor:
        """Return logits (1, V) of the base model after ``ids`` over the one row of a fused context."""
        with self._contexts.context(int(context.mask.sum()) + len(ids)) as sequences:
            self._restore_rows(sequences, context, [0], None)
            return sequences.decode([Tokens(ids, start, 0, predicted=1)])

    def ordinary_logits(self, inputs: Sequence[Tokens]) -> torch.Tensor:
        """Return logits (n, V) of the base model over token ids alone."""
        with self._contexts.context(sum(len(part.ids) for part in inputs)) as sequences:
            return sequences.decode(inputs)

    # Support

    def run_gate(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> GateReport:
        return run_gate(self, prefix_ids, ordinary_ids)

    def require_explicit_attention(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> None:
        raise self._no_attention()

    def _no_attention(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            "llama.cpp neither returns attention weights nor lets them be changed, so mode 'ape' and attribution by "
            "attention need engine='torch'; attribution by effects works."
        )

    def release_memory(self) -> int:
        cell = self.kv_shape.nbytes(1)
        return self._pool.clear() + self._contexts.clear() * cell


def _parts(
    members: Sequence[int], length: int, visible: torch.Tensor | None
) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Yield (start, end, questions) of runs of slots that the same questions may attend to."""
    if visible is None:
        yield 0, length, members
        return
    users = [tuple(i for i in members if visible[i, slot]) for slot in range(length)]
    for found, slots in groupby(range(length), key=lambda slot: users[slot]):
        run = list(slots)
        yield run[0], run[-1] + 1, found


def _log_probabilities(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return log p of each of the ids (n,), in nats, float64, under logits (n, V)."""
    return logits.log_softmax(dim=-1).gather(1, torch.tensor([ids]).T)[:, 0].double()
