"""Citations: where an answer stands, in the source's own spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfusion_rag import Document
from kvfusion_rag.text.citations import find_citations, find_shared_phrases


def cited(answer: str, text: str) -> str | None:
    citations = find_citations(answer, [("d", Document(text))])
    for c in citations:
        assert text[c.start : c.end] == c.text
    return citations[0].text if citations else None


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("amara osei", "Built by Amara Osei.", "Amara Osei"),
        ("john ' s mill", "It is John's Mill now", "John's Mill"),
        ("3 , 000", "about 3,000 people", "3,000"),
        ("the mill", "A Mill", "Mill"),
        ("cafe", "the Café", "Café"),
        ("strasse", "in der Straße 5", "Straße"),
        ("new york", "New\nYork", "New\nYork"),
        ("art", "Martin", None),  # not inside a word
        ("187", "in 1874", None),
        ("東京", "首都は東京です", "東京"),
        ("", "text", None),
        ("the", "the the", None),
        ("...", "a...", None),
        ("cafe", "cafe\u0301 noir", "cafe\u0301"),
    ],
)
def test_normalised_match(answer, text, found):
    assert cited(answer, text) == found


@given(
    words=st.lists(st.text(st.sampled_from("bcdXYZé12"), min_size=1, max_size=5), min_size=3, max_size=12),
    data=st.data(),
)
def test_any_span_of_words_is_found_again(words, data):
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, len(words)))
    span = cited(" ".join(words[start:end]).upper(), " ".join(words))
    assert span is not None and len(span) > 0


def test_one_citation_a_document_in_the_order_given():
    documents = [("a", Document("x Mill")), ("b", Document("nothing")), ("c", Document("mill, mill"))]
    assert [(c.document_id, c.start) for c in find_citations("mill", documents)] == [("a", 2), ("c", 0)]


KEEPER = "The last keeper, Thomas Grant, moved to the mainland in the same year."
ASKED = "Who was the last keeper of the lighthouse?"


def shared(answer: str, *texts: str) -> list[tuple[str, str]]:
    documents = [(str(n), Document(text)) for n, text in enumerate(texts)]
    found = find_shared_phrases(answer, ASKED, documents)
    for c in found:
        assert texts[int(c.document_id)][c.start : c.end] == c.text
    return [(c.document_id, c.text) for c in found]


def test_a_sentence_is_traced_to_the_document_with_which_it_shares_most_words():
    answer = "The last keeper of the lighthouse was thomas grant."
    assert shared(answer, "Doves sleep.", KEEPER) == [("1", "Thomas Grant")]
    assert shared("He moved to the mainland in 1983.", KEEPER) == [("0", "moved to the mainland in")]


def test_words_of_the_question_and_short_words_are_no_trace():
    assert (
        shared("The last keeper of the lighthouse is of an age.", "the last keeper of the lighthouse is of an") == []
    )
    assert shared("Nobody knows.", KEEPER) == shared("", KEEPER) == shared("Grant", KEEPER) == []


def test_documents_with_equally_long_phrases_are_both_named():
    assert [name for name, _ in shared("It was Thomas Grant", KEEPER, "x", "Thomas Grant kept bees")] == ["0", "2"]
