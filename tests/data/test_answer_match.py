"""The metrics agree with hand-worked cases of SQuAD's definition."""

import pytest

from kvfusion_rag.data.answer_match import is_right
from kvfusion_rag.evaluation import answer_in_text, exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Mill.", "mill"), ("a 3,000-year-old theatre", "3000yearold theatre"), ("An", ""), ("", "")],
)
def test_normalize(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_answer():
    assert exact_match("the Mill", ["river", "mill!"]) and not exact_match("old mill", ["mill"])
    assert exact_match("", []) and not exact_match("mill", [])


def test_answer_in_text_needs_whole_words():
    assert answer_in_text("it is the old mill.", ["Old Mill"]) and not answer_in_text("milling", ["mill"])
    assert not answer_in_text("anything", [])


def test_f1():
    assert token_f1("old mill", ["the old mill"]) == 1.0
    assert token_f1("old grey mill", ["old mill house"]) == pytest.approx(2 / 3)
    assert token_f1("river", ["mill"]) == 0.0 and token_f1("", []) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [("Unanswerable.", (), True), ("", (), True), ("red", (), False), ("Red", ("red",), True), ("", ("red",), False)],
)
def test_abstaining_is_right_if_there_is_no_answer(prediction, answers, right):
    assert is_right(prediction, answers) == right
