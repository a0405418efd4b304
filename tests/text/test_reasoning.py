"""How a model's reasoning is found in its chat template, and where it ends in the tokens of an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_families import family_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_bpe, tokenizer

from kvfusion_rag import InvalidInputError
from kvfusion_rag.fusion.growing_answer import GrowingAnswer
from kvfusion_rag.text.encoder import PlainEncoder, PromptEncoder
from kvfusion_rag.text.reasoning import Harmony, Reasoning, ReasoningStart, Spelling, Tags, find_format
from kvfusion_rag.text.settings import ModelSettings, default_settings, render_answered

TAGGED, OPENED, CHANNELS = "chatml with reasoning", "reasoning that the prompt opens", "channels"
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
CALL = "<|channel|>commentary to=search <|constrain|>json<|message|>"
NEXT = "<|end|><|start|>assistant"


def written_out() -> Any:
    """Return a tokenizer whose template strips tags that are not tokens, as of many fine-tuned models."""
    tok = byte_bpe()
    tok.chat_template = family_tokenizer(TAGGED).chat_template
    return tok


TOKENIZERS = {name: family_tokenizer(name) for name in (TAGGED, OPENED, CHANNELS)} | {"written out": written_out()}


def start_of(name: str, prompt: str, choice: Reasoning = "auto") -> ReasoningStart | None:
    tok = TOKENIZERS[name]
    plain, form = PlainEncoder(tok), find_format(tok, choice)
    spelling = Spelling.of(
        tok, form.marks if form else (), lambda text: plain.encode(text, continues=True), plain.decode
    )
    return ReasoningStart.of(form, prompt, spelling)


def grow(
    name: str, prompt: str, written: str, *, limit: int = 100, budget: int = 100, size: int = 1, stop: Any = ()
) -> tuple[GrowingAnswer, list[str], list[str]]:
    """Feed ``written`` behind ``prompt``; return the answer, and its pieces and those of its reasoning."""
    tok, start = TOKENIZERS[name], start_of(name, prompt)
    plain = PlainEncoder(tok)
    row = GrowingAnswer(
        plain.decode, stop, plain.unsettling_ids,
        limit=limit, reader=start and start.reader(), reasoning_limit=budget,
    )  # fmt: skip
    ends = {tok.eos_token_id, tok.convert_tokens_to_ids("<|return|>"), tok.convert_tokens_to_ids("<|call|>")}
    thoughts, pieces = [], []
    for number, token in enumerate(tok(written, add_special_tokens=False)["input_ids"], start=1):
        row.push(token, is_end=token in ends)
        if number % size == 0 or row.finish_reason:
            thoughts.append(row.take_reasoning())
            pieces.append(row.take())
        if row.finish_reason:
            break
    return row, pieces, thoughts


def test_the_format_is_found_in_template_and_tokens():
    assert (
        find_format(family_tokenizer(TAGGED)) == find_format(family_tokenizer(OPENED)) == Tags("<think>", "</think>")
    )
    assert find_format(family_tokenizer(CHANNELS)) == Harmony()
    assert find_format(tokenizer("byte-bpe")) is None and find_format(tokenizer("unigram")) is None


@pytest.mark.parametrize(
    ("template", "tokens", "found"),
    [
        ("{{ '[INST]' }}", ("[THINK]", "[/THINK]"), Tags("[THINK]", "[/THINK]")),
        ("{% if '</seed:think>' in messages %}{% endif %}", (), Tags("<seed:think>", "</seed:think>")),
        (r"{{ '<think>\n\n</think>\n' }}", (), Tags("<think>", "</think>", "\n")),
        ("{{ '</tool_call></response>' }}", (), None),
    ],
)
def test_tags_need_not_be_those_of_a_known_model(template, tokens, found):
    tok = byte_bpe()
    tok.add_tokens(list(tokens))
    tok.chat_template = template
    assert find_format(tok) == found


def test_settings_override_what_the_template_says():
    tok = family_tokenizer(TAGGED)
    assert find_format(tok, "none") is None
    assert find_format(tok, ("<a>", "</a>\n")) == Tags("<a>", "</a>", "\n")
    assert ModelSettings(reasoning=["<a>", "</a>"]).reasoning == ("<a>", "</a>")
    for wrong in ("think", ["<a>"], ["<a>", ""], None):
        with pytest.raises(InvalidInputError, match=r"reasoning is .* but it must be 'auto', 'none', 'harmony'"):
            ModelSettings(reasoning=wrong)
    with pytest.raises(InvalidInputError, match="reasoning is 'harmony', but the tokenizer lacks one of the tokens"):
        find_format(tok, "harmony")
    assert isinstance(find_format(family_tokenizer(CHANNELS), "harmony"), Harmony)
    assert find_format(tok, "auto") == Tags("<think>", "</think>")  # as the message advises
    with pytest.raises(InvalidInputError, match="max_reasoning_tokens is -1"):
        ModelSettings(max_reasoning_tokens=-1)


@pytest.mark.parametrize(
    ("name", "prompt", "stage"),
    [
        (TAGGED, "<|im_start|>assistant\n", "before"),
        (TAGGED, "<|im_start|>assistant\n<think>\n", "reasoning"),
        (TAGGED, "<|im_start|>assistant\n<think>\n\n</think>\n\n", None),
        (OPENED, "<|Assistant|></think>", None),
        (CHANNELS, "<|end|><|start|>assistant", "reasoning"),
        (CHANNELS, f"<|end|><|start|>assistant{FINAL}", None),
    ],
)  # fmt: skip
def test_the_prompt_says_whether_reasoning_is_open(name, prompt, stage):
    start = start_of(name, prompt)
    assert (None if start is None else start.reader().stage) == stage


@pytest.mark.parametrize(
    ("name", "prompt", "written", "reasoning", "text"),
    [
        (TAGGED, "", "<think>\nthe mill\n</think>\n\nin 1874<|im_end|>", "the mill", "in 1874"),
        (TAGGED, "", "\n<think>the mill</think>in 1874<|im_end|>", "the mill", "in 1874"),
        (TAGGED, "", "in <think>1874</think>!<|im_end|>", "", "in 1874!"),
        (TAGGED, "", "in 1874<|im_end|>", "", "in 1874"),
        (TAGGED, "", "<think>\n\n</think>\n\nin 1874<|im_end|>", "", "in 1874"),
        (TAGGED, "<think>\n", "the mill<|im_end|>", "the mill", ""),
        (OPENED, "<think>\n", "the mill\n</think>\n\nin 1874<|im_end|>", "the mill", "in 1874"),
        (OPENED, "", "<think>\nthe mill</think>\n\nin 1874<|im_end|>", "the mill", "in 1874"),
        ("written out", "", "<think>\nthe mill\n</think>\n\nin 1874<|im_end|>", "the mill", "in 1874"),
        ("written out", "", " <thin ice<|im_end|>", "", "<thin ice"),
        ("written out", "<think>", "the </thin mill</think>**in** 1874<|im_end|>", "the </thin mill", "**in** 1874"),
        (CHANNELS, "", f"{ANALYSIS}the mill<|end|><|start|>assistant{FINAL}in 1874<|return|>", "the mill", "in 1874"),
        (CHANNELS, "", f"{FINAL}in 1874<|return|>", "", "in 1874"),
        (CHANNELS, "", f"{FINAL}in 1874<|end|><|start|>assistant{ANALYSIS}more", "", "in 1874"),
        (CHANNELS, "", f"{ANALYSIS}one{NEXT}{ANALYSIS}two{NEXT}{FINAL}in 1874<|return|>", "one\n\ntwo", "in 1874"),
        (CHANNELS, "", f"{ANALYSIS}mill{NEXT}{CALL}{{}}<|call|>", "mill\n\n{}", ""),
        (CHANNELS, "", "<|channel|>final <|constrain|>json<|message|>{}<|return|>", "", "{}"),
    ],
)  # fmt: skip
def test_reasoning_is_split_from_the_answer(name, prompt, written, reasoning, text):
    prompt = "<|start|>assistant" if name == CHANNELS else f"assistant\n{prompt}"
    for size in (1, 3):
        row, pieces, thoughts = grow(name, prompt, written, size=size)
        assert (row.reasoning, row.text, row.finish_reason) == (reasoning, text, "stop")
        assert ("".join(thoughts), "".join(pieces)) == (reasoning, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_streams_join_to_reasoning_and_answer_whatever_is_written(name, data):
    marks = (
        "<think>",
        "</think>",
        "</",
        "think",
        ">",
        "<|channel|>",
        "final",
        "analysis",
        "<|message|>",
        "<|end|>",
        "<|start|>",
    )
    words = st.sampled_from([*marks, "assistant", " mill", "\n", "é", "東", ".", "**", "<|im_end|>", "<|return|>"])
    written = "".join(data.draw(st.lists(words, max_size=25)))
    prompts = ("<|start|>assistant",) if name == CHANNELS else ("assistant\n", "assistant\n<think>\n")
    prompt, stop = (
        data.draw(st.sampled_from(prompts)),
        data.draw(st.lists(st.sampled_from([".", "mill", "</"]), max_size=2)),
    )
    limit, budget = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    row, pieces, thoughts = grow(name, prompt, written, limit=limit, budget=budget, stop=stop)
    thoughts.append(row.take_reasoning())
    if row.finish_reason:
        assert ("".join(thoughts), "".join(pieces)) == (row.reasoning, row.text)
    else:
        assert row.reasoning.startswith("".join(thoughts)) and row.text.startswith("".join(pieces))
    assert len(row.ids) - row.reasoning_tokens <= limit + 1  # and the end token
    assert not any(s in row.text for s in stop)
    start = start_of(name, prompt)
    assert row.reasoning_tokens <= budget + start.overhead


@pytest.mark.parametrize(
    ("name", "prompt", "written", "closing"),
    [
        (TAGGED, "<think>\n", "one two three", "</think>\n\n"),
        (OPENED, "<think>\n", "one two three", "</think>\n\n"),
        ("written out", "<think>\n", "one two three", "</think>\n\n"),
        (CHANNELS, "", f"{ANALYSIS}one two three", f"<|end|><|start|>assistant{FINAL}"),
    ],
)
def test_used_up_reasoning_is_closed_with_the_models_own_tokens(name, prompt, written, closing):
    tok = TOKENIZERS[name]
    prompt = "<|start|>assistant" if name == CHANNELS else f"assistant\n{prompt}"
    ids = tok(written, add_special_tokens=False)["input_ids"]
    closed = tok(closing, add_special_tokens=False)["input_ids"]
    start = start_of(name, prompt)
    row = GrowingAnswer(PlainEncoder(tok).decode, (), limit=4, reader=start.reader(), reasoning_limit=len(ids))
    added = [row.push(token, is_end=False) for token in ids]
    assert added == ids and row.finish_reason is None
    ignored = [row.push(5, is_end=True) for _ in closed]  # what the model would have written
    assert ignored == closed and row.reasoning_tokens == len(ids) + len(closed)
    answer = tok(" mill mill mill mill", add_special_tokens=False)["input_ids"][:4]
    assert [row.push(token, is_end=False) for token in answer] == answer
    assert row.finish_reason == "length" and row.text == tok.decode(answer).strip()
    assert row.reasoning == "one two three" and row.ids == [*ids, *closed, *answer]


@pytest.mark.parametrize(
    ("written", "closing"),
    [
        ("", FINAL),
        ("<|channel|>", "final<|message|>"),
        ("<|channel|>final", "<|message|>"),
        ("<|channel|>analysis", f"<|message|><|end|><|start|>assistant{FINAL}"),
        (ANALYSIS, f"<|end|><|start|>assistant{FINAL}"),
        (f"{ANALYSIS}mill", f"<|end|><|start|>assistant{FINAL}"),
        (f"{ANALYSIS}mill<|end|>", f"<|start|>assistant{FINAL}"),
        (f"{ANALYSIS}mill<|end|><|start|>", f"assistant{FINAL}"),
        (f"{ANALYSIS}mill<|end|><|start|>assistant", FINAL),
    ],
)
def test_channels_are_closed_wherever_the_budget_ends(written, closing):
    tok = TOKENIZERS[CHANNELS]
    ids, closed = (tok(text, add_special_tokens=False)["input_ids"] for text in (written, closing))
    reader = start_of(CHANNELS, "<|start|>assistant").reader()
    row = GrowingAnswer(PlainEncoder(tok).decode, (), limit=1, reader=reader, reasoning_limit=len(ids))
    for token in ids:
        row.push(token, is_end=False)
    assert [row.push(5, is_end=False) for _ in closed] == closed
    word = tok("mill", add_special_tokens=False)["input_ids"][0]
    assert row.push(word, is_end=False) == word
    assert row.finish_reason == "length" and row.text == tok.decode([word])


def test_written_out_marks_do_not_close_reasoning_whose_tags_are_tokens():
    """A document may contain the tag, and the model may quote it."""
    tok = TOKENIZERS[TAGGED]
    plain = PlainEncoder(tok)
    row = GrowingAnswer(plain.decode, (), limit=9, reader=start_of(TAGGED, "<think>\n").reader(), reasoning_limit=99)
    for token in plain.encode("it says </think> here"):
        row.push(token, is_end=False)
    assert row.reasoning == "it says </think> here" and row.text == ""


def test_limit_of_the_answer_counts_all_tokens_of_an_answer_without_reasoning():
    for name in (TAGGED, "written out"):
        for written in ("\n\n\n\n mill", "mill mill mill", "<thin ice here"):
            row, _, _ = grow(name, "assistant\n", written, limit=2)
            assert len(row.ids) == 2 and row.finish_reason == "length" and row.reasoning_tokens == 0


@pytest.mark.parametrize("name", [TAGGED, OPENED, CHANNELS])
def test_the_fixed_layout_begins_behind_the_reasoning(name):
    """Its answers are short, and a decoder is trained on them."""
    tok = family_tokenizer(name)
    made = default_settings(tok)
    assert start_of(name, made.prompt_template) is None and start_of(name, made.question_template) is None
    encoder = PromptEncoder(tok, replace(made, layout="fixed"))
    ids = encoder.encode_question("who?")
    assert tok.decode(ids).endswith(("</think>\n\n", FINAL))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    shown = render_answered(tok, turns, {"enable_thinking": False})
    assert shown.endswith(made.prompt_template.partition("{prompt}")[2])


def test_reasoning_is_closed_even_if_the_tokenizer_cannot_spell_the_tag():
    tok = tokenizer("unigram")
    plain = PlainEncoder(tok)
    spelling = Spelling.of(tok, ("<a>", "</a>"), plain.encode, plain.decode)
    reader = Tags("<a>", "</a>").reader("<a>", spelling)
    row = GrowingAnswer(plain.decode, (), limit=2, reader=reader, reasoning_limit=1)
    ids = plain.encode("the river runs past an old mill and the miller")
    for token in ids:
        if row.finish_reason is None:
            row.push(token, is_end=False)
    assert row.finish_reason == "length" and len(row.ids) == row.reasoning_tokens + 2
