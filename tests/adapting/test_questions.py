"""Questions, their filter, and the rows that are built from them."""

import dataclasses
import json

import pytest
from places import ANSWER, PLACES, place
from tiny import backbone

from kvfusion_rag import InvalidInputError, KVFusionGenerator
from kvfusion_rag.adapting import AdaptOptions
from kvfusion_rag.adapting.filtering import answer_fault, question_fault, repeats, says, whole_sentences
from kvfusion_rag.adapting.questions import EXAMPLES, openings_of, question_writer, read_questions, write_questions
from kvfusion_rag.adapting.rows import NegativeMiner, make_row, number_of_documents
from kvfusion_rag.data.rows import Passage
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.store import MemoryStore


@pytest.mark.parametrize("tokens", ["byte-bpe", "bpe-byte-fallback"])
def test_question_continues_examples_text_and_opening(tokens):
    base = backbone("llama", tokens=tokens, max_position_embeddings=2048)
    generator = KVFusionGenerator(TorchModel(base), store=MemoryStore(), gather=False)
    start = "<s>" if tokens == "bpe-byte-fallback" else ""
    writer = question_writer(generator, start)
    passage = Passage(place(0), "Harbour")
    shown = writer.show_prompt("Question: When", [passage.document("1")], mode="fusion").text
    assert shown.endswith(f"Text: Harbour. {place(0)}\nQuestion: When") and shown.count("Answer:") == len(EXAMPLES)
    written = write_questions(writer, [(passage, ""), (passage, " When")])
    assert written[1].startswith("When") and all("\n" not in text for text in written)
    joined = writer.answer("Question: When", [passage.document("1")], mode="concat", max_new_tokens=40, stop=["\n"])
    assert written[1] == f"When {joined.text}".strip()  # one fused document is an ordinary prompt


def test_openings_differ_within_a_passage_and_repeat_with_the_seed():
    for number in range(20):
        found = openings_of(number, 3, seed=1)
        assert len(set(found)) == 3 and found[0] == "" and found == openings_of(number, 3, seed=1)


def test_own_questions_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "q.txt").write_text("Who?\n\n  When? \n")
    assert list(read_questions(tmp_path / "q.txt")) == [("Who?", None), ("When?", None)]
    lines = [{"question": "Who?", "passage": "A man.", "title": "Mill"}, {"question": "When?"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(read_questions(tmp_path / "q.jsonl")) == [("Who?", Passage("A man.", "Mill")), ("When?", None)]
    for line, message in (("{", "not JSON"), ("[1]", "is a list"), ('{"question": " "}', "question is"),
                          ('{"question": "Who?", "passage": 1}', "passage is 1")):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(InvalidInputError, match=f"bad.jsonl, line 1.*{message}"):
            list(read_questions(tmp_path / "bad.jsonl"))


def test_question_without_a_passage_gets_the_first_of_bm25():
    miner = NegativeMiner([Passage(place(number)) for number in range(len(PLACES))], seed=0)
    assert [miner.best(f"Who kept the books of the {name}?") for name in PLACES] == list(range(len(PLACES)))
    assert miner.best("Warum?") is None


MILL = Passage(
    "The water mill at Ash Brook was built by Amara Osei in 1874. It burned down in 1901.", "Ash Brook Mill"
)
GOOD = "Who built the water mill at Ash Brook?"


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        (GOOD, None),
        ("Who built it?", "too short"),
        (f"Who built {'the mill ' * 25}?", "too long"),
        ("The water mill at Ash Brook was built", "no question mark"),
        ("What is the text about the mill about?", "the text itself"),
        ("What is the difference between a light and a candle?", "does not name"),
        ("Who was it that did it?", "does not name"),
        ("When did the water mill at Ash Brook burn?", None),
        ("who BUILT the water mill at Ash-Brook?", "repeated"),
    ],
)
def test_useless_questions_are_dropped(question, fault):
    seen = {"who built water mill at ash brook", "who built water mill at ashbrook"} if fault == "repeated" else set()
    found = question_fault(question, MILL, seen)
    assert found is None if fault is None else found is not None and fault in found


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Amara Osei", None),
        ("It was built by Amara Osei in 1874.", None),
        (" . ", "empty"),
        ("The water mill at Ash Brook was built.", "only repeats"),
        ("It was built by Napoleon Bonaparte of France.", "not from the passage"),
    ],
)
def test_useless_answers_are_dropped(answer, fault):
    found = answer_fault(answer, GOOD, MILL)
    assert found is None if fault is None else found is not None and fault in found


def test_truncated_answer_keeps_its_complete_sentences():
    assert whole_sentences("Amara Osei built it. It burned down in 1901. Then the") == (
        "Amara Osei built it. It burned down in 1901."
    )
    assert whole_sentences("It is 31.5 metres high. It") == "It is 31.5 metres high."
    assert whole_sentences("Amara Osei built it, and then") == "" == whole_sentences("")
    assert whole_sentences("灯塔建在岩石上。等") == "灯塔建在岩石上。"


def test_answer_is_repeated_if_its_own_words_are():
    assert repeats("Amara Osei", "It was Amara Osei.", GOOD, 0.6)
    assert repeats("It was built by Amara Osei", "Amara Osei built it in 1874", GOOD, 0.6)
    assert repeats("Amara Osei in 1874", "Amara Osei", GOOD, 0.6)
    assert not repeats("Amara Osei", "a miller of the name of Grant", GOOD, 0.6)
    assert not repeats("The water mill at Ash Brook was built by Osei", "The water mill was built by Grant", GOOD, 0.6)
    assert not repeats("Amara Osei", "", GOOD, 0.6)


def test_text_says_an_answer_if_it_contains_the_words_that_are_not_in_the_question():
    assert says("Amara Osei", "The water mill at Ash Brook was built by Amara Osei.", GOOD)
    assert says("Built in 1874 by Amara Osei.", "The mill was built by Amara Osei.", GOOD)
    assert not says("The water mill at Ash Brook was built by Amara.", "Amara Osei built the mill.", GOOD)
    assert not says("The water mill at Ash Brook was built.", "The water mill was built.", GOOD)


def test_negatives_are_similar_and_do_not_contain_the_answer():
    passages = [Passage(place(number)) for number in range(6)] + [Passage(f"{ANSWER} kept the books of the mill")]
    miner = NegativeMiner(passages, seed=0)
    found = miner.negatives("Who kept the books of the mill?", ANSWER, 1, 5)
    assert len(found) == 5 and passages[1] not in found and passages[6] not in found
    assert len(miner.negatives("Who kept the books of the mill?", "nobody", 1, 50)) == 6


def test_gold_passage_is_marked_and_can_be_at_any_slot():
    gold, others = Passage(place(0)), [Passage(place(number)) for number in range(1, 5)]
    rows = [make_row(0, f"Question {n}?", "x", gold, others, seed=0) for n in range(40)]
    assert {row.passages.index(dataclasses.replace(gold, gold=True)) for row in rows} == set(range(5))
    assert all(len(row.gold) == 1 for row in rows)
    assert rows[3] == make_row(0, "Question 3?", "x", gold, others, seed=0)
    assert {number_of_documents(f"Question {n}?", 5, seed=0) for n in range(200)} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("name", "value"),
    [("passages", 0), ("questions_per_passage", 4), ("held_out", 1.0), ("documents", 1), ("min_f1", 0.0)],
)
def test_invalid_options_raise(name, value):
    with pytest.raises(InvalidInputError, match=f"{name} is {value}"):
        AdaptOptions(**{name: value})
