"""How an answer grows: stop strings across tokens, held-back endings, and the choice of tokens."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKENIZER_KINDS, generator, tokenizer

from kvfusion_rag import InvalidInputError, UnsupportedModelError
from kvfusion_rag.engine.invariance import _logit_difference
from kvfusion_rag.fusion.growing_answer import GrowingAnswer
from kvfusion_rag.fusion.sampling import DecodingOptions, sampler
from kvfusion_rag.text.encoder import PlainEncoder

CPU = torch.device("cpu")
STOPS = st.lists(st.text(st.sampled_from("abc .\n#"), min_size=1, max_size=4), max_size=3)


def grow(text: str, stop: list[str], size: int) -> tuple[GrowingAnswer, list[str]]:
    """Feed ``text`` token by token and take pieces every ``size`` tokens."""
    tok = tokenizer("byte-bpe")
    ids = tok(text, add_special_tokens=False)["input_ids"]
    row, pieces = GrowingAnswer(lambda ids: tok.decode(ids), stop, limit=len(ids)), []
    for number, token in enumerate(ids, start=1):
        row.push(token, is_end=False)
        if number % size == 0 or row.finish_reason:
            pieces.append(row.take())
        if row.finish_reason:
            break
    return row, pieces


@given(text=st.text(st.sampled_from("abc .\n#é東"), min_size=1, max_size=40), stop=STOPS, size=st.integers(1, 4))
def test_streamed_pieces_join_to_the_text_without_stop_strings(text, stop, size):
    row, pieces = grow(text, stop, size)
    assert "".join(pieces) == row.text
    body = text.lstrip()
    cuts = [body.find(s) for s in stop if s in body]
    assert row.text == (body[: min(cuts)] if cuts else body).rstrip()
    assert row.finish_reason == ("stop" if cuts else "length")


def test_an_ending_that_may_become_a_stop_string_is_held_back():
    row = GrowingAnswer("".join, ["##END"], limit=9)
    for token in ("one", " #", "#E"):
        row.push(token, is_end=False)
    assert row.take() == "one"
    row.push("x", is_end=False)
    assert row.take() == " ##Ex"


def test_white_space_in_front_of_a_stop_string_is_held_back():
    row, pieces = GrowingAnswer("".join, ["##END"], limit=9), []
    for token in ("one", " #", "#EN", "D"):
        row.push(token, is_end=False)
        pieces.append(row.take())
    assert "".join(pieces) == row.text == "one"


def test_an_answer_without_stop_strings_is_decoded_on_access():
    calls = []
    row = GrowingAnswer(lambda ids: calls.append(len(ids)) or "".join(ids), [], limit=6)
    for token in "abcdef":
        row.push(token, is_end=False)
    assert not calls and row.text == row.text == "abcdef" and calls == [6]


def test_a_long_stream_is_decoded_in_time_proportional_to_its_length():
    def decoded(length: int) -> int:
        calls, pieces = [], []
        row = GrowingAnswer(lambda ids: calls.append(len(ids)) or "".join(ids), [], limit=length)
        for _ in range(length):
            row.push("x", is_end=False)
            pieces.append(row.take())
        assert "".join(pieces) == row.text == "x" * length and all(pieces[:511])
        return sum(calls)

    assert decoded(8192) < 2.1 * decoded(4096)


def test_the_callers_list_of_stop_strings_may_change():
    stop = ["END"]
    options = DecodingOptions(4, stop=stop)
    stop.append("")
    assert tuple(options.stop) == ("END",)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_non_finite_logits_raise_an_error(temperature):
    gen = generator("llama")
    assert gen.answer("who?", ["the river"], max_new_tokens=3, temperature=temperature)
    with torch.no_grad():
        gen._engine.model.backbone.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"'tiny-llama' produced NaN or infinite logits in"):
        gen.answer("who?", ["the river"], max_new_tokens=3, temperature=temperature)


def test_difference_of_non_finite_logits():
    low, nan = torch.tensor([[1.0, -torch.inf]]), torch.tensor([[1.0, torch.nan]])
    assert _logit_difference([low], [low]) == 0 and _logit_difference([low], [low + 1]) == torch.inf
    assert _logit_difference([low], [nan]) == _logit_difference([nan], [nan]) == torch.inf
    assert _logit_difference([], []) == 0 and _logit_difference([low], []) == torch.inf


def test_an_incomplete_character_is_held_back():
    tok = tokenizer("byte-bpe")
    ids = tok("東", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    _, pieces = grow("a東b", [], 1)
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == "a東b"


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_text(kind, data):
    """Emitted text never changes, even with byte tokens and invalid UTF-8."""
    tok = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, len(tok) - 1), min_size=1, max_size=25))
    unsettling_ids = PlainEncoder(tok).unsettling_ids
    stop, pieces = data.draw(STOPS), []
    row = GrowingAnswer(lambda ids: tok.decode(ids, skip_special_tokens=True), stop, unsettling_ids, limit=len(ids))
    for token in ids:
        row.push(token, is_end=False)
        pieces.append(row.take())
        if row.finish_reason:
            break
    assert "".join(pieces) == row.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"max_new_tokens": True}, {"temperature": -1},
        {"temperature": "0"}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"stop": "END"}, {"stop": [""]},
        {"seed": "1"}, {"seed": True}, {"seed": -1}, {"seed": 2**64}, {"stop": 3},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_name_the_field(wrong):
    (name,) = wrong
    with pytest.raises(InvalidInputError, match=name):
        DecodingOptions(**{"max_new_tokens": 4, **wrong})


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).expand(200, -1)
    drawn = torch.tensor(sampler(DecodingOptions(1, temperature=1.0, top_k=2), 200, CPU)(logits, range(200)))
    assert set(drawn.tolist()) == {0, 1}
    assert set(sampler(DecodingOptions(1, temperature=1.0, top_p=0.5), 200, CPU)(logits, range(200))) == {0}


def test_tiny_temperatures_are_greedy():
    gen = generator("llama")
    greedy = gen.answer("who?", ["the river"], max_new_tokens=5).token_ids
    assert gen.answer("who?", ["the river"], max_new_tokens=5, temperature=1e-40).token_ids == greedy


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[1.0, 0.0]]).expand(4000, -1)
    share = statistics.mean(sampler(DecodingOptions(1, temperature=2.0), 4000, CPU)(logits, range(4000)))
    assert abs(share - 1 / (1 + 2.718281828**0.5)) < 0.04  # four standard errors


def test_a_seed_repeats_and_does_not_touch_torchs_generator():
    gen = generator("llama")
    state = torch.random.get_rng_state()
    first = gen.answer("who?", ["the river"], temperature=1.5, seed=3, max_new_tokens=12)
    batch = gen.answer_batch(
        ["who?", "why?"], [["the river"], ["the mill"]], temperature=1.5, seed=3, max_new_tokens=12
    )
    other = gen.answer("who?", ["the river"], temperature=1.5, seed=4, max_new_tokens=12)
    assert first.token_ids == batch[0].token_ids != other.token_ids
    assert torch.equal(torch.random.get_rng_state(), state)
