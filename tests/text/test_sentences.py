"""Sentences cover the text, end where a reader ends them, and take linear time to find."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag.text import sentences
from kvfusion_rag.text.sentences import sentence_spans


@pytest.mark.parametrize("window", [5, sentences.WINDOW])
@given(st.text(alphabet="ab. \n!?DrA。”\xa0\u2028\ud800é", max_size=60))
def test_spans_cover_the_text_and_are_not_blank(window, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "WINDOW", window)
        pieces = [text[start:end] for start, end in sentence_spans(text)]
    assert "".join(pieces) == text
    assert all(piece.strip() for piece in pieces[1:])


def test_sentences_end_where_a_reader_ends_them():
    text = 'Dr. J. Smith (ca. 1900) of St. Ives left. "Why?" asked Mr. Lee.[1] He paid 3.5 dollars! 東京です。次です。'
    assert [text[start:end].strip() for start, end in sentence_spans(text)] == [
        'Dr. J. Smith (ca. 1900) of St. Ives left.', '"Why?" asked Mr. Lee.[1]', "He paid 3.5 dollars!", "東京です。",
        "次です。",
    ]  # fmt: skip


def test_a_sentence_across_two_windows_is_not_cut(monkeypatch):
    monkeypatch.setattr(sentences, "WINDOW", 30)
    text = "The mill is red. The river runs past it. It is old."
    assert len(sentence_spans(text)) == 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [".", "\n", '." ', "« a. ", "灯塔守护人", "a", "Dr. "])
def test_a_megabyte_of_repeated_marks_takes_seconds(unit):
    text = unit * (1_000_000 // len(unit))
    assert sentence_spans(text)[-1][1] == len(text)
