"""Citations: the place of an answer in the documents, in the source's own spelling."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfusion_rag import Document
from kvfusion_rag.text.citations import find_citations, find_shared_phrases

KEEPER = "The last keeper, Thomas Grant, moved to the mainland in the same year."
QUESTION = "Who was the last keeper of the lighthouse?"


def cited(answer: str, text: str) -> str | None:
    citations = find_citations(answer, [("d", Document(text))])
    assert all(text[c.start : c.end] == c.text for c in citations)
    return citations[0].text if citations else None


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("amara osei", "Built by Amara Osei.", "Amara Osei"),
        ("john ' s mill", "It is John's Mill now", "John's Mill"),
        ("3 , 000", "about 3,000 people", "3,000"),
        ("the mill", "A Mill", "Mill"),
        ("cafe", "the Café", "Café"),
        ("strasse", "in der Straße 5", "Straße"),
        ("new york", "New\nYork", "New\nYork"),
        ("art", "Martin", None),  # inside a word
        ("187", "in 1874", None),
        ("東京", "首都は東京です", "東京"),
        ("", "text", None),
        ("the", "the the", None),
        ("...", "a...", None),
        ("cafe", "cafe\u0301 noir", "cafe\u0301"),
    ],
)
def test_normalized_match(answer, text, expected):
    assert cited(answer, text) == expected


@settings(max_examples=30)
@given(words=st.lists(st.text("bcdXYZé12", min_size=1, max_size=5), min_size=3, max_size=12), data=st.data())
def test_any_run_of_words_is_found(words, data):
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, len(words)))
    assert cited(" ".join(words[start:end]).upper(), " ".join(words))


def test_one_citation_per_document_in_the_given_order():
    documents = [("a", Document("x Mill")), ("b", Document("nothing")), ("c", Document("mill, mill"))]
    assert [(c.document_id, c.start) for c in find_citations("mill", documents)] == [("a", 2), ("c", 0)]


@pytest.mark.parametrize(
    ("answer", "texts", "expected"),
    [
        ("The last keeper of the lighthouse was thomas grant.", ["Doves sleep.", KEEPER], [("1", "Thomas Grant")]),
        ("He moved to the mainland in 1983.", [KEEPER], [("0", "moved to the mainland in")]),
        # words of the question and short words are not enough
        ("The last keeper of the lighthouse is of an age.", ["the last keeper of the lighthouse is of an"], []),
        ("Nobody knows.", [KEEPER], []),
        ("", [KEEPER], []),
        ("Grant", [KEEPER], []),
        (
            "It was Thomas Grant",
            ["Thomas Grant", "x", "Thomas Grant kept bees"],
            [("0", "Thomas Grant"), ("2", "Thomas Grant")],
        ),
    ],
)
def test_longest_shared_phrase(answer, texts, expected):
    documents = [(str(n), Document(text)) for n, text in enumerate(texts)]
    found = find_shared_phrases(answer, QUESTION, documents)
    assert [(c.document_id, c.text) for c in found] == expected
    assert all(texts[int(c.document_id)][c.start : c.end] == c.text for c in found)
