"""In mode ``concat`` the model reads exactly what transformers' ``generate`` reads, and fused it reads the same text.

Expected ids come from ``apply_chat_template`` over the caller's own messages with the documents' texts in them.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from chat_families import FAMILIES, family_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import config, model, tokenizer

from kvfusion_rag import Document, InvalidInputError, KVFusionGenerator, Message
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.store import MemoryStore
from kvfusion_rag.text.settings import default_settings

DOCUMENTS = [
    Document("the old mill was built in 1874.", id="mill", title="Mill"),
    Document("  Amara Osei lit the lamp\n", id="lamp"),
    Document("two grey doves sleep", id="doves"),
]
TEXTS = [document.text for document in DOCUMENTS]
QUESTION = "who built the mill?"
NEW = 6  # tokens


def chat_generator(tok, *, mode="auto", window=4096, **settings) -> KVFusionGenerator:
    network = model("llama", max_position_embeddings=window)
    own = replace(default_settings(tok), mode=mode, **settings)
    return KVFusionGenerator(Backbone(network, tok, own, model_id="tiny-chat"), store=MemoryStore(), gather=False)


def joined(separator: str = "\n\n") -> str:
    return separator.join(TEXTS)


SHAPES = {
    "documents in the system message": (
        [Message.around("system", "Answer from this:\n", "\nBe brief."), Message("user", QUESTION)],
        [("system", f"Answer from this:\n{joined()}\nBe brief."), ("user", QUESTION)],
    ),
    "documents end the system message": (
        [Message.around("system", "Context: ", ""), Message("user", QUESTION)],
        [("system", f"Context: {joined()}"), ("user", QUESTION)],
    ),
    "one user message": (
        [Message.around("user", "Use the context.\n\n", f"\n\nQuestion: {QUESTION}\nAnswer:")],
        [("user", f"Use the context.\n\n{joined()}\n\nQuestion: {QUESTION}\nAnswer:")],
    ),
    "question before documents": (
        [Message.around("user", f"Question: {QUESTION}\nContext:\n", "", separator="\n---\n")],
        [("user", f"Question: {QUESTION}\nContext:\n{joined(chr(10) + '---' + chr(10))}")],
    ),
    "several turns": (
        [
            Message("system", "Be brief."),
            Message("user", "hello there"),
            Message("assistant", "<think>\nhm\n</think>\n\n hello! "),
            Message.around("user", "Context:\n", f"\n{QUESTION}"),
        ],
        [
            ("system", "Be brief."),
            ("user", "hello there"),
            ("assistant", "<think>\nhm\n</think>\n\n hello! "),
            ("user", f"Context:\n{joined()}\n{QUESTION}"),
        ],
    ),
}


def merged(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """System text in front of the first user turn, for templates that reject the role."""
    (_, told), (_, first), *rest = turns
    return [("user", f"{told}\n\n{first}"), *rest]


def expected_ids(tok, turns, **kwargs) -> list[int]:
    def ids(given):
        messages = [{"role": role, "content": text} for role, text in given]
        return tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]

    has_system = turns[0][0] == "system"
    return ids(merged(turns) if has_system and "no system role" in tok.chat_template else turns)


def generated(gen: KVFusionGenerator, ids: list[int]) -> list[int]:
    """Greedy tokens of transformers' own ``generate``, up to the end token."""
    network, ends = model("llama", max_position_embeddings=4096), gen._backbone.end_ids
    mask = torch.ones(1, len(ids), dtype=torch.long)  # generate would take an id 0 in the prompt for a pad
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
    out = network.generate(torch.tensor([ids]), attention_mask=mask, **options)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_joined_prompt_is_the_callers_own(family, shape):
    tok = family_tokenizer(family)
    gen = chat_generator(tok)
    prompt, turns = SHAPES[shape]
    ids = expected_ids(tok, turns)
    request = gen._engine.request(QUESTION, DOCUMENTS, prompt, None, gen._options({}))
    assert list(request.question.ids) == ids
    answer = gen.answer(QUESTION, DOCUMENTS, prompt=prompt, max_new_tokens=NEW)
    assert answer.mode == "concat" and list(answer.token_ids) == generated(gen, ids)
    assert answer.usage.prompt_tokens == len(ids)
    assert gen.show_prompt(QUESTION, DOCUMENTS, prompt=prompt).text == tok.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spans_of_a_joined_prompt_spell_its_documents(family):
    tok = family_tokenizer(family)
    gen = chat_generator(tok)
    for prompt, _ in SHAPES.values():
        request = gen._engine.request(QUESTION, DOCUMENTS, prompt, "concat", gen._options({}))
        for (start, end), text in zip(request.spans, TEXTS, strict=True):
            assert text.strip() in tok.decode(request.question.ids[start:end])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_fused_document_is_the_ordinary_prompt(family):
    """With documents first in the prompt, fusion of one document reads the caller's text in the caller's order."""
    tok = family_tokenizer(family)
    gen = chat_generator(tok)
    prompt = [Message.around("user", "Use the context.\n\n", f"\n\nQuestion: {QUESTION}\nAnswer:")]
    document = Document("the old mill was built in 1874.")
    fused = gen.show_prompt(QUESTION, [document], prompt=prompt, mode="fusion", chat_template_kwargs=DATE)
    plain = gen.show_prompt(QUESTION, [document], prompt=prompt, mode="concat", chat_template_kwargs=DATE)
    assert fused.text == plain.text


DATE = {"date_string": "1 Jan 2026"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["fusion", "ape"])
def test_any_order_has_the_same_bits_and_questions_share_documents(family, mode):
    gen = chat_generator(family_tokenizer(family), mode=mode)
    for prompt, _ in SHAPES.values():
        report = gen.check_invariance(QUESTION, DOCUMENTS, permutations=3)
        assert report.identical
        first = gen.answer(QUESTION, DOCUMENTS, prompt=prompt, max_new_tokens=NEW)
        asked = [replace(m, text=m.text.replace(QUESTION, "where is it?")) for m in prompt]
        moved = [_moved(old, new) for old, new in zip(prompt, asked, strict=True)]
        second = gen.answer("where is it?", random.Random(1).sample(DOCUMENTS, 3), prompt=moved, max_new_tokens=NEW)
        assert {s.origin for s in second.sources} == {"memory"} and first.mode == mode


def _moved(old: Message, new: Message) -> Message:
    """``new`` with the documents' place moved by what its question is shorter."""
    if old.documents is None or QUESTION not in old.text[: old.documents.offset]:
        return new
    shorter = len(old.text) - len(new.text)
    return replace(new, documents=replace(old.documents, offset=old.documents.offset - shorter))


def test_template_options_reach_the_template():
    tok = family_tokenizer("chatml with reasoning")
    prompt, turns = SHAPES["one user message"]
    for gen, kwargs in (
        (chat_generator(tok), {"enable_thinking": False}),
        (chat_generator(tok, chat_template_kwargs={"enable_thinking": False}), {}),
    ):
        request = gen._engine.request(QUESTION, DOCUMENTS, prompt, None, gen._options({}), kwargs)
        assert list(request.question.ids) == expected_ids(tok, turns, enable_thinking=False)


def test_fused_prefixes_do_not_change_at_midnight():
    gen = chat_generator(family_tokenizer("header tokens and a date"))
    shown = gen.show_prompt(QUESTION, DOCUMENTS, mode="fusion").text
    assert "Today: 26 Jul 2024" in shown
    assert "Today: 26 Jul 2024" not in gen.show_prompt(QUESTION, DOCUMENTS, mode="concat").text


@pytest.mark.parametrize("kind", ["bpe-byte-fallback", "unigram"])
def test_a_model_without_a_chat_template_reads_plain_text(kind):
    tok = tokenizer(kind)
    gen = chat_generator(tok)
    prompt = [Message.around("user", "Use the context.\n\n", f"\n\nQuestion: {QUESTION}\nAnswer:")]
    ids = tok(f"Use the context.\n\n{joined()}\n\nQuestion: {QUESTION}\nAnswer:")["input_ids"]
    request = gen._engine.request(QUESTION, DOCUMENTS, prompt, None, gen._options({}))
    assert list(request.question.ids) == ids


@given(texts=st.lists(st.text(), min_size=3, max_size=3), family=st.sampled_from(list(FAMILIES)))
def test_control_tokens_in_untrusted_texts_stay_text(texts, family):
    """Whatever texts say, the control ids of a prompt are those of the same prompt over harmless texts."""
    tok = family_tokenizer(family)
    gen = GENERATORS.setdefault(family, chat_generator(tok))
    control = gen._encoder.plain.control_ids
    spelt = "".join(gen._encoder.plain.control_tokens)

    def control_in(first: str, second: str, third: str) -> list[list[int]]:
        prompt = [Message.around("system", "a ", f" {first}b"), Message("user", f"who? {second}")]
        found = []
        for mode in ("concat", "fusion"):
            request = gen._engine.request("who?", [f"d {third}"], prompt, mode, gen._options({}))
            pieces = [piece.ids for piece in request.fused or ()]
            assert not any(control.intersection(ids) for ids in pieces)
            found.append([i for i in (*request.prefix, *request.question.ids) if i in control])
        return found

    harmless = control_in("x", "x", "x")
    assert control_in(*(f"{text}{spelt}" for text in texts)) == harmless


GENERATORS: dict[str, KVFusionGenerator] = {}


def test_a_default_limit_shrinks_to_the_room_in_the_window_and_says_so(caplog):
    tok = family_tokenizer("role pipes")
    gen = chat_generator(tok, window=128)
    assert gen.max_new_tokens == 512
    with caplog.at_level("INFO"):
        answer = gen.answer(QUESTION, DOCUMENTS)
    assert answer.usage.total_tokens <= 128
    assert answer.finish_reason in ("stop", "length")
    if answer.finish_reason == "length":
        assert answer.usage.total_tokens == 128 and "cut at its limit" in caplog.text


def test_the_limit_of_the_generation_config_is_the_default():
    tok = family_tokenizer("role pipes")
    network = model("llama", max_position_embeddings=4096)
    network.generation_config.max_new_tokens = 7
    bone = Backbone(network, tok, default_settings(tok), model_id="tiny-chat")
    answer = KVFusionGenerator(bone, store=None, gather=False).answer(QUESTION, DOCUMENTS)
    assert len(answer.token_ids) <= 7
    assert KVFusionGenerator(bone, store=None, gather=False).max_new_tokens == 7


@pytest.mark.parametrize(
    "prompt, named",
    [
        ([Message.around("user", "a", "b"), Message.around("user", "c", "d")], "several messages"),
        ([Message("user", "x", documents=Message.around("user", "long text", "").documents)], "character 9"),
        ([Message("user", "x"), Message("assistant", "y")], "'assistant'"),
    ],
)
def test_a_wrong_place_is_refused(prompt, named):
    gen = chat_generator(family_tokenizer("role pipes"))
    with pytest.raises(InvalidInputError, match=named):
        gen.answer(QUESTION, DOCUMENTS, prompt=prompt)


def test_a_template_that_rejects_the_conversation_says_why():
    gen = chat_generator(family_tokenizer("turns without a system role"))
    gen._backbone.tokenizer.chat_template, kept = "{{ raise_exception('only on Sundays') }}", FAMILIES
    try:
        with pytest.raises(InvalidInputError, match="only on Sundays"):
            gen.answer(QUESTION, DOCUMENTS)
    finally:
        gen._backbone.tokenizer.chat_template = kept["turns without a system role"].template


def test_the_config_of_the_tests_has_room_for_the_families():
    assert max(len(family_tokenizer(name)) for name in FAMILIES) <= config("llama").vocab_size
