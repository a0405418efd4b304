"""In mode ``concat`` the model reads exactly what transformers' ``generate`` reads, and in fusion the same text.

Expected ids come from ``apply_chat_template`` over the caller's own messages, with the documents' texts in them.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from chat_families import FAMILIES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config, model, tokenizer

from kvfusion_rag import Document, InvalidInputError, KVFusionGenerator, Message
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
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
NEW_TOKENS = 6
DATE = {"date_string": "1 Jan 2026"}

families = pytest.mark.parametrize("family", FAMILIES)


def chat_generator(tok, *, mode="auto", window=4096, max_new_tokens=None, **changes) -> KVFusionGenerator:
    network = model("llama", max_position_embeddings=window)
    network.generation_config.max_new_tokens = max_new_tokens
    own = replace(default_settings(tok), mode=mode, **changes)
    loaded = TorchModel(Backbone(network, tok, own, model_id="tiny-chat"))
    return KVFusionGenerator(loaded, store=MemoryStore(), gather=False)


@cache
def family_generator(family: str) -> KVFusionGenerator:
    return chat_generator(family_tokenizer(family))


@cache
def transformers_model():
    return model("llama", max_position_embeddings=4096)


def joined(separator: str = "\n\n") -> str:
    return separator.join(TEXTS)


REASONED = "<think>\nhm\n</think>\n\n hello! "
# Messages, and the turns that the chat template gets for them.
PROMPTS = {
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
        [("user", f"Question: {QUESTION}\nContext:\n" + joined("\n---\n"))],
    ),
    "several turns": (
        [
            Message("system", "Be brief."), Message("user", "hello there"), Message("assistant", REASONED),
            Message.around("user", "Context:\n", f"\n{QUESTION}"),
        ],
        [
            ("system", "Be brief."), ("user", "hello there"), ("assistant", REASONED),
            ("user", f"Context:\n{joined()}\n{QUESTION}"),
        ],
    ),
    "the assistant's turn last": (
        [Message.around("user", "Context:\n", f"\n{QUESTION}"), Message("assistant", "Wait.")],
        [("user", f"Context:\n{joined()}\n{QUESTION}"), ("assistant", "Wait.")],
    ),
}  # fmt: skip


def request(generator, prompt, mode=None, question=QUESTION, documents=DOCUMENTS, kwargs=None):
    return generator._engine.request(question, documents, prompt, mode, DecodingOptions(NEW_TOKENS), kwargs)


def expected_ids(tok, turns, **kwargs) -> list[int]:
    if turns[0][0] == "system" and "no system role" in tok.chat_template:  # the text opens the first user turn
        (_, system), (_, first), *rest = turns
        turns = [("user", f"{system}\n\n{first}"), *rest]
    messages = [{"role": role, "content": text} for role, text in turns]
    return tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]


def generated(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """Greedy tokens of transformers' own ``generate``, up to the end token."""
    mask = torch.ones(1, len(ids), dtype=torch.long)  # generate would take an id 0 in the prompt for padding
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": sorted(end_ids), "pad_token_id": 0}
    return transformers_model().generate(torch.tensor([ids]), attention_mask=mask, **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", PROMPTS)
@families
def test_joined_prompt_has_the_ids_of_apply_chat_template(family, name):
    tok, generator = family_tokenizer(family), family_generator(family)
    prompt, turns = PROMPTS[name]
    ids = expected_ids(tok, turns)
    made = request(generator, prompt)
    assert list(made.question.ids) == ids
    assert generator.show_prompt(QUESTION, DOCUMENTS, prompt=prompt).text == tok.decode(ids)
    for (start, end), text in zip(made.spans, TEXTS, strict=True):
        assert text.strip() in tok.decode(made.question.ids[start:end])


@families
def test_joined_prompt_has_the_answer_of_generate(family):
    tok, generator = family_tokenizer(family), family_generator(family)
    for prompt, turns in PROMPTS.values():
        ids = expected_ids(tok, turns)
        limits = {"max_new_tokens": NEW_TOKENS, "max_reasoning_tokens": NEW_TOKENS}
        answer = generator.answer(QUESTION, DOCUMENTS, prompt=prompt, **limits)
        tokens = list(answer.token_ids[:NEW_TOKENS])  # an answer after reasoning has further ones
        assert answer.mode == "concat" and tokens == generated(ids, generator._engine.model.end_ids)
        assert answer.usage.prompt_tokens == len(ids)


@families
def test_one_fused_document_is_the_ordinary_prompt(family):
    """With documents first in the prompt, fusion of one document reads the caller's text in the caller's order."""
    generator, prompt = family_generator(family), PROMPTS["one user message"][0]
    fused, plain = (
        generator.show_prompt(QUESTION, DOCUMENTS[:1], prompt=prompt, mode=mode, chat_template_kwargs=DATE).text
        for mode in ("fusion", "concat")
    )
    today = re.compile("(?<=Current date: ).*")  # it is fixed in fused prompts only
    assert today.sub("", fused) == today.sub("", plain)


@families
@pytest.mark.parametrize("mode", ["fusion", "ape"])
def test_any_order_has_the_same_bits_and_questions_share_documents(family, mode):
    limits = {"max_new_tokens": NEW_TOKENS, "max_reasoning_tokens": NEW_TOKENS}
    generator = chat_generator(family_tokenizer(family), mode=mode, **limits)
    assert generator.check_invariance(QUESTION, DOCUMENTS, permutations=3).identical
    shuffled = random.Random(1).sample(DOCUMENTS, 3)
    for prompt, _ in PROMPTS.values():
        first = generator.answer(QUESTION, DOCUMENTS, prompt=prompt, max_new_tokens=1)
        other = [with_question(message, "where is it?") for message in prompt]
        second = generator.answer("where is it?", shuffled, prompt=other, max_new_tokens=1)
        assert {s.origin for s in second.sources} == {"memory"} and first.mode == mode


def with_question(message: Message, question: str) -> Message:
    """Put another question into a message, and move the documents' place accordingly."""
    changed = replace(message, text=message.text.replace(QUESTION, question))
    place = message.documents
    if place is None or QUESTION not in message.text[: place.offset]:
        return changed
    return replace(changed, documents=replace(place, offset=place.offset + len(question) - len(QUESTION)))


def test_template_options_reach_the_template():
    tok, options = family_tokenizer("chatml with reasoning"), {"enable_thinking": False}
    prompt, turns = PROMPTS["one user message"]
    own = chat_generator(tok, chat_template_kwargs=options)
    for made in (request(own, prompt), request(family_generator("chatml with reasoning"), prompt, kwargs=options)):
        assert list(made.question.ids) == expected_ids(tok, turns, **options)


def test_date_is_fixed_in_fused_prompts_only():
    generator = family_generator("header tokens and a date")
    shown = {m: generator.show_prompt(QUESTION, DOCUMENTS, mode=m).text for m in ("fusion", "concat")}
    assert "Today: 26 Jul 2024" in shown["fusion"] and "Today: 26 Jul 2024" not in shown["concat"]


@pytest.mark.parametrize("kind", ["bpe-byte-fallback", "unigram"])
def test_model_without_chat_template_reads_plain_text(kind):
    tok = tokenizer(kind)
    prompt, [(_, text)] = PROMPTS["one user message"]
    assert list(request(chat_generator(tok), prompt).question.ids) == tok(text)["input_ids"]


@settings(max_examples=40)
@given(texts=st.lists(st.text(), min_size=3, max_size=3), family=st.sampled_from(list(FAMILIES)))
def test_control_tokens_in_untrusted_texts_stay_text(texts, family):
    """The control ids of a prompt are those of the same prompt over harmless texts."""
    generator = family_generator(family)
    control = generator._engine.encoder.plain.control_ids
    control_text = "".join(generator._engine.encoder.plain.control_tokens)

    def control_in(first: str, second: str, third: str) -> list[list[int]]:
        prompt = [Message.around("system", "a ", f" {first}b"), Message("user", f"who? {second}")]
        found = []
        for mode in ("concat", "fusion"):
            made = request(generator, prompt, mode, "who?", [f"d {third}"])
            assert not any(control.intersection(piece.ids) for piece in made.fused or ())
            found.append([i for i in (*made.scope.prefix, *made.question.ids) if i in control])
        return found

    assert control_in(*(f"{text}{control_text}" for text in texts)) == control_in("x", "x", "x")


def test_default_limit_shrinks_to_the_window(caplog):
    generator = chat_generator(family_tokenizer("role pipes"), window=128)
    assert generator.max_new_tokens == 512
    with caplog.at_level("INFO"):
        answer = generator.answer(QUESTION, DOCUMENTS)
    assert answer.finish_reason in ("stop", "length") and answer.usage.total_tokens <= 128
    if answer.finish_reason == "length":
        assert answer.usage.total_tokens == 128 and "cut at its limit" in caplog.text


def test_generation_config_sets_the_default_limit():
    generator = chat_generator(family_tokenizer("role pipes"), max_new_tokens=7)
    assert len(generator.answer(QUESTION, DOCUMENTS).token_ids) <= 7 == generator.max_new_tokens


@pytest.mark.parametrize(
    "prompt, named",
    [
        ([Message.around("user", "a", "b"), Message.around("user", "c", "d")], "several messages"),
        ([Message("user", "x", documents=Message.around("user", "long text", "").documents)], "character 9"),
    ],
)
def test_invalid_place_of_documents_is_rejected(prompt, named):
    with pytest.raises(InvalidInputError, match=named):
        family_generator("role pipes").answer(QUESTION, DOCUMENTS, prompt=prompt)


def test_template_that_rejects_the_conversation_gives_its_reason(monkeypatch):
    generator = family_generator("turns without a system role")
    monkeypatch.setattr(generator._engine.model.tokenizer, "chat_template", "{{ raise_exception('only on Sundays') }}")
    with pytest.raises(InvalidInputError, match="only on Sundays"):
        generator.answer(QUESTION, DOCUMENTS)


def test_tiny_models_have_room_for_every_family():
    assert max(len(family_tokenizer(name)) for name in FAMILIES) <= config("llama").vocab_size
