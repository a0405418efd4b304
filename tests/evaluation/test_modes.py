"""``doctor --measure``: shipped questions, the best mode, and its use by mode ``auto``."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
from indexes import WordEmbedder

from kvfusion_rag import InvalidInputError, KVFusionGenerator
from kvfusion_rag.cli import main
from kvfusion_rag.data.answer_match import answer_in_text
from kvfusion_rag.evaluation.modes import (
    CHOICES,
    ModeQuestion,
    ModeResult,
    best_measured,
    best_weight,
    measure_modes,
    shipped_questions,
)
from kvfusion_rag.home import home
from kvfusion_rag.schema import Document
from kvfusion_rag.text.measured_mode import Measured

ANSWER = "Amara Osei"


@pytest.fixture
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "home"))


def test_each_shipped_question_is_answered_by_one_of_its_five_documents():
    questions = shipped_questions()
    assert len(questions) == len({q.question for q in questions}) == 40
    for q in questions:
        assert len({d.id for d in q.documents}) == 5
        assert sum(answer_in_text(d.text, [q.answers[0]]) for d in q.documents) == 1, q.question
    places = [next(n for n, d in enumerate(q.documents) if answer_in_text(d.text, [q.answers[0]])) for q in questions]
    assert {places.count(n) for n in range(5)} == {8}  # the right document is at every slot equally often


def test_modes_are_judged_by_their_answers():
    gen = tiny.speaker(ANSWER)
    documents = (Document(f"{ANSWER} built it"), Document("two grey doves sleep"))
    asked = [
        ModeQuestion("who built it?", (ANSWER,), documents),
        ModeQuestion("who sleeps?", ("the doves",), documents),
    ]
    results, weight = measure_modes(gen, asked)
    assert [(result.mode, result.focus) for result in results] == list(CHOICES) and weight == 0
    assert {result.right for result in results} == {50.0}
    assert all(0 < result.first_token <= result.total for result in results)


def test_best_weight_ranks_documents_with_an_answer_highest():
    rows = []
    for letter, best in (("a", 0), ("b", 2), ("c", 1)):
        documents = [
            Document(f"{'Elm' if n == best else 'two'} grey doves {letter} {n}", score=float(n == best))
            for n in range(3)
        ]
        rows.append(ModeQuestion(f"which tree {letter}?", ("Elm",), tuple(documents)))
    weight = best_weight(tiny.untuned(), rows)
    ranked = tiny.untuned().with_settings(focus_weight=weight)
    for row, best in zip(rows, (0, 2, 1), strict=True):
        sources = ranked.answer(row.question, row.documents, mode="fusion", focus=1, max_new_tokens=1).sources
        assert [source.used for source in sources] == [n == best for n in range(3)]
    bare = [ModeQuestion(r.question, r.answers, tuple(Document(d.text) for d in r.documents)) for r in rows]
    assert best_weight(tiny.untuned(), bare) == 0


def test_best_mode_has_the_most_right_answers():
    def best(*results):
        return best_measured(results, 0.5)

    concat = ModeResult("concat", 55.0)
    assert best(ModeResult("fusion", 50.0), ModeResult("ape", 60.0), concat) == Measured("ape", None, 0.5)
    assert best(ModeResult("fusion", 55.0), ModeResult("ape", 55.0), concat) == Measured("fusion", None, 0.5)
    assert best(ModeResult("fusion", reason="refused"), concat) == Measured("concat", None, 0.5)
    focused = [ModeResult("fusion", 50.0, focus=1), ModeResult("fusion", 52.0, focus=2), ModeResult("fusion", 52.0)]
    assert best(*focused, concat) == Measured("concat", None, 0.5)
    assert best(*focused[:2], concat) == Measured("concat", 2, 0.5)


def test_measured_mode_is_the_default_of_these_weights_only(own_home):
    made, others = tiny.untuned(), tiny.untuned(seed=1)
    assert made.default_mode()[0] == "concat"
    made.keep_measurement(Measured("ape"), [])
    again = tiny.untuned()
    assert again.default_mode() == ("ape", "measured best by kvfusion doctor --measure")
    assert again.answer("who?", ["the mill"], max_new_tokens=2).mode == "ape"
    made.keep_measurement(Measured("fusion", 1, 0.5), [])
    answer = tiny.untuned().answer("who?", ["the mill", "two doves"], max_new_tokens=2)
    assert answer.mode == "fusion" and [source.used for source in answer.sources].count(True) == 1
    assert tiny.untuned().default_focus() == 1
    assert others.default_mode()[0] == "concat"


def test_given_mode_overrides_the_measured_one(own_home):
    tiny.untuned().keep_measurement(Measured("ape"), [])
    assert tiny.untuned(mode="concat").mode == "concat"


def test_damaged_measurement_is_reported_and_ignored(own_home, caplog):
    tiny.untuned().keep_measurement(Measured("ape"), [])
    (file,) = (home() / "measured").iterdir()
    whole = json.loads(file.read_text())
    for damaged in ("{", json.dumps({**whole, "focus": "all"}), json.dumps({**whole, "focus_weight": -1})):
        file.write_text(damaged)
        assert tiny.untuned().mode == "concat"
    with caplog.at_level(logging.WARNING):
        assert tiny.untuned().mode == "concat"
    assert "doctor --measure again" in caplog.text


def test_unwritable_folder_of_measurements_is_named(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("KVFUSION_HOME", str(tmp_path / "taken"))
    with pytest.raises(InvalidInputError, match=r"taken.*KVFUSION_HOME"):
        tiny.untuned().keep_measurement(Measured("ape"), [])


def test_command_prints_the_table_and_keeps_the_mode(own_home, capsys, monkeypatch, tmp_path):
    few = shipped_questions()[:2]
    monkeypatch.setattr("kvfusion_rag.evaluation.modes.shipped_questions", lambda: few)
    monkeypatch.setattr("kvfusion_rag.evaluation.modes.MAX_ANSWER_TOKENS", 4)
    folder = tiny.save(tmp_path / "model", max_position_embeddings=4096)
    assert main(["doctor", str(folder), "--measure"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{mode}" in out for mode in ("fusion", "ape", "concat")) and "measured best" in out
    assert main(["doctor", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mode_reason"].startswith("measured best") and found["measured"] is None


def test_command_without_measuring_names_the_option(own_home, capsys, model_folder):
    assert main(["doctor", str(model_folder)]) == 0
    out = capsys.readouterr().out
    assert "do not measure the quality of answers" in out and "default mode: concat" in out


def test_untuned_ask_answers_like_generate_on_the_shown_prompt(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kvfusion_rag.retrieval.SentenceTransformerEmbedder", lambda name, device: WordEmbedder())
    folder = tiny.save(tmp_path / "model", max_position_embeddings=4096)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "mill.txt").write_text("the old mill was built in 1874")
    options = ["--docs", str(tmp_path / "docs"), "--model", str(folder), "--max-new-tokens", "6", "--show-prompt"]
    assert main(["ask", "who built it?", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    gen = KVFusionGenerator.from_pretrained(folder, gather=False)
    tok = gen._engine.model.backbone.tokenizer
    ids = tok(found["prompt"], add_special_tokens=False)["input_ids"]
    assert tok.decode(ids) == found["prompt"] and "the old mill was built in 1874" in found["prompt"]
    network = tiny.model("llama", max_position_embeddings=4096)
    ends = sorted(gen._engine.model.backbone.end_ids)
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = network.generate(
        torch.tensor([ids]), attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    assert found["mode"] == "concat"
    assert found["text"] == gen._engine.encoder.decode(out[0, len(ids) :].tolist()).strip()
