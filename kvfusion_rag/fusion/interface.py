"""The seam between the engine and a model: what generator, engine, store and servers may ask of it.

``TorchModel`` is the implementation on torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..model.kv import DocumentKV, KVShape
from ..model.rope import PositionLimit
from ..schema import GateReport
from ..text.answer_format import AnswerFormat
from ..text.settings import ModelSettings
from .constraints import Constraint
from .fused_cache import FusedBuffer, FusedContext
from .growing_answer import GrowingAnswer
from .sampling import DecodingOptions

Ids = tuple[int, ...]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """One encoded question.

    Attributes:
        start: position of the first token (``positions.question_start``).
    """

    ids: Ids
    start: int


@dataclass(frozen=True, slots=True)
class ApeFactors:
    """Factors of APE (arXiv 2502.05431): temperature T and scale S."""

    temperature: float
    scale: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model supports besides fusion and joined prompts.

    Attributes:
        shared_rows: several questions may read one row of the fused cache.
        attention: attention weights can be measured and changed, as attribution by attention and APE need.
    """

    shared_rows: bool
    attention: bool


class FusionModel(Protocol):
    """A model that reads documents separately and answers over their fused KVs.

    The prefill decoder Dp and the answering decoder Dt share their weights up to an adapter, unless Dt was fully
    tuned. Safe from several threads.
    """

    @property
    def model_id(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def settings(self) -> ModelSettings:
        """Settings of the tuned decoder if there is one, else of the base model."""
        ...

    @property
    def base_settings(self) -> ModelSettings: ...
    @property
    def context_window(self) -> int | None: ...
    @property
    def position_limit(self) -> PositionLimit:
        """``context_window`` with its reason."""
        ...

    @property
    def vocabulary_size(self) -> int: ...
    @property
    def end_ids(self) -> frozenset[int]: ...
    @property
    def end_id(self) -> int | None: ...
    @property
    def max_new_tokens(self) -> int | None: ...
    @property
    def is_tuned(self) -> bool:
        """Whether an adapter or a decoder with its own weights is loaded."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def kv_shape(self) -> KVShape: ...
    @property
    def tokens_per_pass(self) -> int: ...
    @property
    def capabilities(self) -> Capabilities: ...

    # Identity

    @property
    def weights_digest(self) -> str:
        """Digest of the base weights as they are now."""
        ...

    @property
    def adapter_digest(self) -> str | None: ...
    def fingerprint(self) -> str:
        """Return a digest of everything that changes the bits of a document's KV except its token ids."""
        ...

    def portable_fingerprint(self) -> str:
        """Return a digest of everything that changes a document's KV by more than rounding except its token ids."""
        ...

    def environment(self) -> Mapping[str, str | None]:
        """Return what changes only the rounding of a document's KV."""
        ...

    def identity(self) -> Mapping[str, str | None]:
        """Return digests of everything that changes an answer."""
        ...

    # Documents and answering

    def prefill(
        self, documents: Sequence[Ids], prefix: DocumentKV | None, starts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, DocumentKV]]:
        """Yield (index, KV) of each document, prefilled separately behind ``prefix`` or at its own start position."""
        ...

    def buffer(self, lengths: Sequence[int], *, room: int) -> FusedBuffer:
        """Return rows of ``lengths`` slots to fill with documents, and ``room`` slots behind them."""
        ...

    def plan(
        self, context: FusedContext, prefix_lengths: Sequence[int], *, tuned: bool, ape: ApeFactors | None
    ) -> Any:
        """Return a plan to answer over ``context`` by the tuned decoder or the base model, with or without APE."""
        ...

    def constraint(self, format: AnswerFormat) -> Constraint:
        """Return what keeps an answer in ``format``; see ``ConstraintCompiler.compile``."""
        ...

    def decode(
        self,
        plan: Any,
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
        """Decode all questions, one token of every open answer per step (``decode.decode``)."""
        ...

    # Measuring

    def token_likelihoods(
        self, prefix: DocumentKV | None, documents: Sequence[DocumentKV | None], ids: Sequence[int], *, given: int
    ) -> list[list[float]]:
        """Return the log-probability of each id behind ``given``, (D, A), for each document, without the adapter.

        None stands for no document.
        """
        ...

    def answer_likelihoods(
        self,
        plan: Any,
        context: FusedContext,
        questions: Sequence[Question],
        answer: Sequence[int],
        *,
        visible: torch.Tensor | None = None,
    ) -> list[float]:
        """Return log p(answer | question) for several questions over one row."""
        ...

    def attention_shares(
        self,
        plan: Any,
        context: FusedContext,
        question: Question,
        answer: Sequence[int],
        spans: Sequence[Sequence[Span]],
        *,
        before_pass: Callable[[], None],
    ) -> list[float]:
        """Return the mean attention that the slots of each list of spans received from the tokens of ``answer``."""
        ...

    # Support

    def run_gate(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> GateReport:
        """Measure whether fusion is exact on this model."""
        ...

    def require_explicit_attention(self, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> None:
        """Reject the model if its attention cannot be replaced by the one that APE and attribution need."""
        ...

    def release_memory(self) -> int:
        """Free pooled memory and return the number of bytes freed."""
        ...

    def reset_digest(self) -> None:
        """Compute the digest of the weights again at the next request."""
        ...
