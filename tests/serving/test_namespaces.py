"""Namespaces: generators share one model and one store, but none finds documents of another namespace."""

from __future__ import annotations

import pytest
import tiny

from kvfusion_rag import InvalidInputError

DOCUMENTS = ["the river runs past an old mill", "two grey doves sleep"]


def test_namespaces_share_weights_and_store_but_not_documents():
    generator = tiny.generator()
    other = generator.with_namespace("other")
    assert other.store is generator.store
    assert other.identity() == generator.identity()
    generator.prefill(DOCUMENTS)
    question = "who built it?"
    apart = other.answer(question, DOCUMENTS, max_new_tokens=4)
    assert {source.origin for source in apart.sources} == {"computed"}
    assert apart.token_ids == generator.answer(question, DOCUMENTS, max_new_tokens=4).token_ids
    assert other.clear() == len(DOCUMENTS) + 1  # the prefix is stored too
    assert {s.origin for s in generator.answer(question, DOCUMENTS, max_new_tokens=1).sources} == {"memory"}


def test_namespace_must_be_a_string():
    with pytest.raises(InvalidInputError, match="namespace"):
        tiny.generator().with_namespace(7)  # type: ignore[arg-type]
