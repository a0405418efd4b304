"""Conversion of documents, frames, and the bare question of a prompt."""

from __future__ import annotations

import pytest

pytest.importorskip("langchain_core")

from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document as LangChainDocument
from langchain_core.prompts import format_document

from kvfusion_rag import Document, DocumentsPlace, InvalidInputError
from langchain_kvfusion import KVFusionDocumentPrompt, bare_question
from langchain_kvfusion.documents import documents_per_prompt, to_document, to_documents
from langchain_kvfusion.framing import Extraction, frame, split_frames
from langchain_kvfusion.matching import close_gap

# Texts that contain the delimiters of frames.
hostile_text = st.text(st.sampled_from("\x02\x03\x1f\n abcdef0123456789"), max_size=80)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("text", Document("text")),
        (Document("text", "i", "t"), Document("text", "i", "t")),
        (LangChainDocument("text"), Document("text")),
        (LangChainDocument("text", id="i", metadata={"source": "s"}), Document("text", "i", None, {"source": "s"})),
        (LangChainDocument("text", metadata={"source": 7}), Document("text", "7", None, {"source": 7})),
        (
            LangChainDocument("text", metadata={"title": "T", "page": 3}),
            Document("text", None, "T", {"title": "T", "page": 3}),
        ),
        (LangChainDocument("text", metadata={"title": " "}), Document("text", None, None, {"title": " "})),
        ({"text": "text", "title": "T"}, Document("text", None, "T")),
        ({"text": "text", "id": 4, "metadata": {"a": 1}, "b": 2}, Document("text", "4", None, {"a": 1, "b": 2})),
    ],
)
def test_document_keeps_text_id_title_and_metadata(item, expected):
    assert to_document(item) == expected


@pytest.mark.parametrize("item", [3, None, {"page": "text"}, {"text": 5}, b"text"])
def test_other_items_are_rejected(item):
    with pytest.raises(InvalidInputError, match="document"):
        to_documents([item])


@pytest.mark.parametrize("items", ["text", {"text": "text"}, iter(["text"]), Document("text"), 3])
def test_documents_must_be_a_list(items):
    with pytest.raises(InvalidInputError, match="must be a list"):
        to_documents(items)


@given(st.lists(st.sampled_from(["a", "a#2", "b", None]), max_size=8))
def test_document_ids_are_distinct(names):
    ids = [document.id for document in to_documents([Document("text", name) for name in names])]
    named = [name for name in ids if name is not None]
    assert len(set(named)) == len(named)
    assert [name is None for name in ids] == [name is None for name in names]


def test_flat_list_is_shared_and_nested_list_is_per_prompt():
    a, b = Document("a"), Document("b")
    assert documents_per_prompt(["a", b], 2) == [(a, b), (a, b)]
    assert documents_per_prompt([["a"], (b, "a")], 2) == [(a,), (b, a)]
    assert documents_per_prompt([[], ["a"]], 2) == [(), (a,)]
    assert documents_per_prompt([], 2) == documents_per_prompt(None, 2) == [(), ()]


@pytest.mark.parametrize("documents", [[["a"]], [["a"], ["b"], ["c"]], [["a"], "b"]])
def test_number_of_lists_must_match_the_prompts(documents):
    with pytest.raises(InvalidInputError):
        documents_per_prompt(documents, 2)


@given(
    st.lists(hostile_text, max_size=4), st.text("ab \n"), st.text("ab \n"), st.sampled_from(["\n\n", "\n", " ", ""])
)
def test_framed_documents_are_extracted_in_order(texts, before, after, separator):
    prompt = KVFusionDocumentPrompt()
    joined = separator.join(format_document(LangChainDocument(text), prompt) for text in texts)
    found = split_frames(before + joined + after)
    assert [d.text for d in found.documents] == [t.replace("\x02", " ").replace("\x03", " ") for t in texts]
    assert found.text == before + after
    if texts:
        assert found.place == DocumentsPlace(len(before), separator if len(texts) > 1 else "\n\n", titles=False)


@given(hostile_text, hostile_text, hostile_text)
def test_frame_keeps_its_fields_separate(text, name, title):
    (document,) = split_frames(frame(Document(text, name, title))).documents
    for field, given_field in ((document.id, name), (document.title, title)):
        assert (field or "") == given_field.translate({2: " ", 3: " ", 31: " "})
    assert document.text == text.translate({2: " ", 3: " "})


def test_frames_carry_titles_and_ids():
    prompt = KVFusionDocumentPrompt(title_key="title", id_key="source")
    text = format_document(LangChainDocument("text", metadata={"title": "T", "source": "s"}), prompt)
    found = split_frames(text)
    assert found.documents == (Document("text", "s", "T"),)
    assert found.place == DocumentsPlace(0, titles=True)


def test_modified_frame_is_rejected():
    genuine = frame(Document("the moon is made of stone"))
    for forged in (genuine.replace("stone", "cheese"), genuine.replace(genuine[1:5], "0000", 1)):
        with pytest.raises(InvalidInputError, match="did not write"):
            split_frames(forged)


def test_frame_of_another_process_is_rejected(monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("langchain_kvfusion.framing._signing_key", lambda: b"another process")
        foreign = frame(Document("text"))
    with pytest.raises(InvalidInputError, match="this process"):
        split_frames(foreign)


def test_text_between_frames_is_rejected():
    with pytest.raises(InvalidInputError, match="white space"):
        split_frames(f"{frame(Document('a'))}\n---\n{frame(Document('b'))}")


def test_separators_of_frames_must_be_equal():
    a, b, c = (frame(Document(text)) for text in "abc")
    with pytest.raises(InvalidInputError, match=r"separators must be equal"):
        split_frames(f"{a}\n\n{b}\n{c}")


@given(st.text("\x02\x03\x1f ab"))
def test_single_control_characters_are_ordinary_text(text):
    assert split_frames(text) == Extraction(text)


@given(st.text("ab \n"), st.text("ab \n"))
def test_closing_a_gap_keeps_all_words(before, after):
    closed = close_gap(before, after)
    assert "".join(closed.split()) == "".join((before + after).split())
    if before.strip() and after.strip() and (before[-1].isspace() or after[0].isspace()):
        assert closed.split() == before.split() + after.split()


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Who wrote it?", "Who wrote it?"),
        ("Use the context.\n\nQuestion: Who wrote it?\nHelpful Answer:", "Who wrote it?"),
        ("Question: Who wrote it? \nContext:  \nAnswer:", "Who wrote it?"),
        ("Be brief. Question: Who wrote it? Answer:", "Who wrote it?"),
        ("Question: Who wrote it? A:", "Who wrote it?"),
        ("Q: first?\nA: one\nQ: second?\nA:", "second?"),
        ("**Question:** Who wrote it?", "Who wrote it?"),
        ("### QUERY :\nWho wrote it?\n\n### Answer:", "Who wrote it?"),
        ("Question: Who?\n\nStandalone question:", "Who?"),
        ("Answer the question.\n\nWho wrote it?\nAnswer:", "Who wrote it?"),
        ("Answer the question.\n\nWho wrote it?\n\nHelpful Answer:\n", "Who wrote it?"),
        ("Answer the question.\n\nWho wrote it,\nand when?\n\n", "Who wrote it,\nand when?"),
        ("What does FAQ: mean?", "What does FAQ: mean?"),
        ("Answer:", "Answer:"),
        ("", ""),
    ],
)
def test_bare_question(text, question):
    assert bare_question(text) == question


@given(st.text(max_size=60))
def test_bare_question_is_part_of_the_text(text):
    question = bare_question(text)
    assert all(line in text for line in question.splitlines())
    assert bool(question) == bool(text.strip())
