"""The documents of a prompt: what a request has to say of them. No vLLM is needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import FusedPrompt, InvalidInputError, own_heads
from kvfusion_rag.store import document_key

KEYS = [document_key("model", "", (number,)) for number in range(3)]
PROMPT = FusedPrompt(((KEYS[0], 4), (KEYS[1], 3), (KEYS[2], 5)), start=9)


def test_a_prompt_is_read_as_it_was_sent():
    assert FusedPrompt.read(PROMPT.params(), salt=PROMPT.salt, prompt_tokens=13) == PROMPT
    assert PROMPT.tokens == 12 and PROMPT.shift == 3


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}])
def test_ordinary_requests_read_no_documents(params):
    assert FusedPrompt.read(params, salt=None, prompt_tokens=13) is None


def test_other_documents_orders_and_positions_have_other_salts():
    others = [replace(PROMPT, documents=order) for order in permutations(PROMPT.documents)]
    others += [replace(PROMPT, start=start) for start in (8, 10)]
    others += [FusedPrompt(((KEYS[0], 5), (KEYS[1], 2), (KEYS[2], 5)), start=9)]
    assert len({prompt.salt for prompt in others}) == len(others)


@pytest.mark.parametrize("salt", [None, "", "0" * 64, replace(PROMPT, start=8).salt])
def test_a_request_without_its_own_salt_is_rejected(salt):
    with pytest.raises(InvalidInputError, match="cache_salt is"):
        FusedPrompt.read(PROMPT.params(), salt=salt, prompt_tokens=13)


def test_a_prompt_needs_a_question():
    with pytest.raises(InvalidInputError, match="12 tokens, but the whole prompt has 12"):
        FusedPrompt.read(PROMPT.params(), salt=PROMPT.salt, prompt_tokens=12)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(KEYS),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["documents", "start", "x"]), inner),
)


@given(JSON)
def test_any_parameters_are_a_prompt_or_rejected(given):
    with pytest.raises(InvalidInputError):
        FusedPrompt.read({"kvfusion": given}, salt=None, prompt_tokens=100)


@pytest.mark.parametrize(("heads", "ranks"), [(8, 1), (8, 2), (8, 8), (2, 4), (1, 8), (3, 3)])
def test_workers_have_every_head(heads, ranks):
    parts = [own_heads(heads, ranks, rank) for rank in range(ranks)]
    sizes = {part.stop - part.start for part in parts}
    covered = [head for part in parts for head in range(part.start, part.stop)]
    assert len(sizes) == 1 and covered == sorted(covered) and set(covered) == set(range(heads))
