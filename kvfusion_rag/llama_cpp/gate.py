"""The support gate on llama.cpp: measures at load time whether documents can be read separately and then fused."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ..errors import UnsupportedModelError
from ..fusion.fused_cache import FusedContext, fuse
from ..fusion.interface import Ids
from ..model.kv import DocumentKV
from ..schema import Check, GateReport
from .context import Tokens

DOCUMENT_TOKENS, QUESTION_TOKENS = (11, 7), 5
# Of logits, relative to the largest. llama.cpp rounds activations to 8 bits, and differently for other batch shapes.
TOLERANCE = 5e-2


class Measurable(Protocol):
    """What the gate asks of a model."""

    @property
    def model_id(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    def prefill(self, documents: Sequence[Ids], prefix: DocumentKV | None) -> Iterator[tuple[int, DocumentKV]]: ...
    def logits_behind(self, context: FusedContext, ids: Sequence[int], start: int) -> torch.Tensor: ...
    def ordinary_logits(self, inputs: Sequence[Tokens]) -> torch.Tensor: ...


def run_gate(model: Measurable, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> GateReport:
    """Measure four laws on random tokens.

    Raises:
        UnsupportedModelError: a law does not hold.
    """
    probe = _Probe(model, prefix_ids, ordinary_ids)
    checks = (
        probe.documents_kv_is_its_own(),
        probe.one_document_is_an_ordinary_pass(),
        probe.order_does_not_matter(),
        probe.all_documents_are_read(),
    )
    if failed := [check for check in checks if not check.passed]:
        raise UnsupportedModelError(
            f"{model.model_id!r} failed the support gate on llama.cpp: {failed[0].name}: {failed[0].detail}."
        )
    return GateReport(model.model_id, checks)


class _Probe:
    """Two random documents and a question."""

    def __init__(self, model: Measurable, prefix_ids: Ids, ordinary_ids: Sequence[int]) -> None:
        draw = random.Random(0)
        first, second = DOCUMENT_TOKENS
        ids = [draw.choice(ordinary_ids) for _ in range(first + second + QUESTION_TOKENS)]
        self.documents = [tuple(ids[:first]), tuple(ids[first : first + second])]
        self.question = ids[first + second :]
        self.model = model
        self.prefix = next((kv for _, kv in model.prefill([prefix_ids], None)), None) if prefix_ids else None
        self.kvs = self._prefill(self.documents)
        self.fused = self._fused(self.kvs)

    def _prefill(self, documents: Sequence[Ids]) -> list[DocumentKV]:
        return [kv for _, kv in self.model.prefill(documents, self.prefix)]

    def _fused(self, kvs: Sequence[DocumentKV]) -> torch.Tensor:
        """Return logits (1, V) after the question over fused documents."""
        ordered = sorted(kvs, key=lambda kv: kv.token_ids)
        context = fuse([ordered], self.model.device, [self.prefix])
        start = (self.prefix.num_tokens if self.prefix else 0) + max(kv.num_tokens for kv in kvs)
        return self.model.logits_behind(context, self.question, start)

    def documents_kv_is_its_own(self) -> Check:
        again = self._prefill(self.documents[::-1])[::-1]
        same = all(
            torch.equal(kv.keys, other.keys) and torch.equal(kv.values, other.values)
            for kv, other in zip(self.kvs, again, strict=True)
        )
        return Check("a document's KV does not depend on others", same, "bits are equal" if same else "bits differ")

    def one_document_is_an_ordinary_pass(self) -> Check:
        before = self.prefix.token_ids if self.prefix else ()
        ids = (*before, *self.documents[0], *self.question)
        ordinary = self.model.ordinary_logits([Tokens(ids, 0, 0, predicted=1)])
        error = _error(self._fused(self.kvs[:1]), ordinary)
        detail = f"relative error {error:.1e}, at most {TOLERANCE:.0e}"
        return Check("one document equals an ordinary pass", error <= TOLERANCE, detail)

    def order_does_not_matter(self) -> Check:
        same = torch.equal(self._fused(self.kvs[::-1]), self.fused)
        return Check("the order of documents does not matter", same, "bits are equal" if same else "bits differ")

    def all_documents_are_read(self) -> Check:
        errors = [_error(self._fused([kv]), self.fused) for kv in self.kvs]
        passed = min(errors) > 0
        return Check("all documents are read", passed, f"without one, logits change by {min(errors):.1e} or more")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
