"""``kvfusion adapt``: each stage goes on where it was killed, the filter drops what it must, only a winner is kept."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
from tiny import backbone, save, save_speaker

from kvfusion_rag import InvalidInputError, KVFusionGenerator, RetrievalError, UnsupportedModelError
from kvfusion_rag.adapting import AdaptOptions, adapt, making
from kvfusion_rag.adapting import run as running
from kvfusion_rag.adapting.filtering import answer_fault, question_fault, repeats, says, whole_sentences
from kvfusion_rag.adapting.judging import Verdict, wins
from kvfusion_rag.adapting.questions import EXAMPLES, openings_of, question_writer, read_questions, write_questions
from kvfusion_rag.adapting.rows import NegativeMiner, make_row, number_of_documents
from kvfusion_rag.adapting.stages import Stages
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import Passage
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.store import MemoryStore
from kvfusion_rag.training.trainer import Trainer
from tests.training.test_training import contents

ANSWER = "thomas grant"
PLACES = (
    "harbour", "mill", "quarry", "bakery", "school", "station", "museum", "chapel", "forge", "brewery", "market",
    "bridge", "castle", "garden", "theatre", "library",
)  # fmt: skip


def place(number: int) -> str:
    """A passage with the answer's words, though not side by side: a negative must not hold the answer."""
    name = PLACES[number]
    return f"The {name} was opened by a man of the name of grant. At the {name}, thomas kept the books of the {name}."


@pytest.fixture
def docs(tmp_path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number, name in enumerate(PLACES):
        (folder / f"{name}.txt").write_text(place(number))
    lines = [f"Who kept the {part} of the {name}?" for name in PLACES for part in ("books", "keys")]
    (tmp_path / "questions.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return save_speaker(tmp_path / "speaker", ANSWER)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    for module in (making, running):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(making, "QUESTIONS_AT_ONCE", 8)


@pytest.fixture
def own_questions(monkeypatch) -> None:
    """The model of the tests cannot write questions, so they are made of the passages."""

    def write(writer: KVFusionGenerator, passages) -> list[str]:
        return [f"Who kept the{opening} books of the {passage.text.split()[1]}?" for passage, opening in passages]

    monkeypatch.setattr(making, "write_questions", write)


def fusion_fails_untuned(monkeypatch) -> None:
    """Answers of the untuned model over fused documents are wrong, so that the adapter wins."""
    answer_rows = running.answer_rows

    def answers(generator, rows, mode, tokens):
        if mode == "fusion" and not generator._engine.model.backbone.has_adapter:
            return ["nobody"] * len(rows)
        return answer_rows(generator, rows, mode, tokens)

    monkeypatch.setattr(running, "answer_rows", answers)


def options(**changes) -> AdaptOptions:
    made = AdaptOptions(**{"passages": 16, "held_out": 0.25, "documents": 3, "answer_tokens": 16} | changes)
    training = dataclasses.replace(made.training, epochs=1, batch_size=4, eval_every=2, rank=2, dropout=0.1)
    return dataclasses.replace(made, training=training)


def adapted(base: Path, docs: Path, output: str = "out", **changes):
    arguments = {"questions": docs.parent / "questions.txt", "options": options(), "dtype": "float32"} | changes
    return adapt(base, docs=[docs], output=docs.parent / output, **arguments)


# The whole way


def test_an_adapter_that_beats_untuned_fusion_is_kept_with_its_card_and_record(base, docs, tmp_path, monkeypatch):
    fusion_fails_untuned(monkeypatch)
    report = adapted(base, docs)
    assert report.kept and report.margin[0] == 100.0
    assert [(v.system, v.right) for v in report.verdicts] == [
        ("fusion, untuned", 0.0), ("fusion, adapted", 100.0), ("concat", 100.0),
    ]  # fmt: skip
    assert report.asked == 32 and report.trained + report.judged == 32 and report.judged == 8
    out = tmp_path / "out"
    gen = KVFusionGenerator.from_pretrained(base, adapter=out / "adapter")
    assert gen.mode == "fusion" and gen.settings.layout == "prompt" and gen.max_new_tokens == 512
    assert gen.answer("Who kept the books of the mill?", [place(1), place(2)]).text == ANSWER
    card = (out / "adapter" / "README.md").read_text()
    assert "| fusion, adapted | 100.0 | 100.0 |" in card and "16 files" in card and "32 questions" in card
    record = json.loads((out / "adapter" / "training.json").read_text())
    assert record["config"]["loss"] == "distill" and record["files"]["documents"]["passages"] == 16
    assert {entry.name for entry in out.iterdir()} == {
        "adapt.json", "answers.jsonl", "repeats.jsonl", "judged-untuned.jsonl", "judged-concat.jsonl",
        "judged-adapted.jsonl", "adapter", "losses.json", "report.json",
    }  # fmt: skip


def test_an_adapter_that_does_not_win_is_not_kept(base, docs, tmp_path, capsys):
    """Untuned fusion gives the answer already, so nothing can be won."""
    command = ["adapt", base, "--docs", docs, "--output", tmp_path / "out", "--questions", tmp_path / "questions.txt"]
    command += ["--max-steps", "2", "--rank", "2", "--documents", "3"]
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "does not beat untuned fusion and was not kept" in out and "fusion, adapted" in out
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "training").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] is False
    before = contents(tmp_path / "out")
    assert main([str(part) for part in [*command, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is False
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("adapted_scores", [(50.0, 60.0), (40.0, 99.0), (50.0, 59.0)])
def test_only_more_right_answers_or_as_many_with_a_higher_f1_win(adapted_scores):
    adapter, untuned = Verdict("adapted", *adapted_scores), Verdict("untuned", 50.0, 60.0)
    assert not wins(adapter, untuned)
    assert wins(untuned, adapter) == (adapted_scores != (50.0, 60.0))


# Going on


class Killed(BaseException):
    """Ends a run as a signal does."""


def kill_at(monkeypatch, stage: str) -> None:
    """The second chunk of ``stage`` is not written down, or the third step of training not made."""
    if stage == "training":
        step, made = Trainer._step, []

        def stepping(self, *arguments):
            if len(made) == 3:
                raise Killed
            made.append(1)
            return step(self, *arguments)

        monkeypatch.setattr(Trainer, "_step", stepping)
        return
    append, written = Stages._append, []

    def appending(self, name, chunk):
        if name == stage:
            if written:
                with self._file(name).open("a") as torn:
                    torn.write(json.dumps(chunk)[:5])
                raise Killed
            written.append(1)
        append(self, name, chunk)

    monkeypatch.setattr(Stages, "_append", appending)


STAGES = ("questions", "answers", "repeats", "judged-untuned", "judged-concat", "training", "judged-adapted")


@pytest.mark.usefixtures("own_questions", "small_chunks")
def test_a_run_that_was_killed_in_every_stage_has_the_losses_of_one_that_was_not(base, docs, tmp_path, monkeypatch):
    fusion_fails_untuned(monkeypatch)
    whole = adapted(base, docs, "whole", questions=None)
    for stage in STAGES:
        with monkeypatch.context() as patch:
            kill_at(patch, stage)
            with pytest.raises(Killed):
                adapted(base, docs, "cut", questions=None)
    cut = adapted(base, docs, "cut", questions=None)
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "cut")]
    assert len(losses[0]["steps"]) >= 4
    for name in ("steps", "losses_nats_per_token", "learning_rates"):
        assert losses[0][name] == losses[1][name]
    assert cut.verdicts == whole.verdicts and cut.dropped == whole.dropped
    for name in ("questions", "answers", "repeats"):
        assert (tmp_path / "cut" / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_goes_on(base, docs, tmp_path):
    leftover = tmp_path / "out" / "training" / "best"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            adapted(base, docs)
    leftover.mkdir(parents=True)
    assert adapted(base, docs).steps > 0


def test_a_full_disk_is_one_sentence_and_loses_nothing(base, docs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("kvfusion_rag.training.trainer.save_state", lambda *a: (_ for _ in ()).throw(full))
        with pytest.raises(InvalidInputError, match=r"No space left on device.*run the same command again"):
            adapted(base, docs)
    before = contents(tmp_path / "out")
    assert "answers.jsonl" in before
    adapted(base, docs)
    after = contents(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.endswith(".jsonl"))


# Refused


def test_a_folder_of_another_run_is_left_as_it_is(base, docs, tmp_path):
    adapted(base, docs)
    before = contents(tmp_path / "out")
    other = save_speaker(tmp_path / "other", "amara osei")
    for changes, message in [
        ({"base": other}, "another model"),
        ({"options": options(seed=1)}, "another option seed"),
        ({"questions": None}, "another questions"),
    ]:
        arguments = {"base": base, **changes}
        with pytest.raises(InvalidInputError, match=message):
            adapted(arguments.pop("base"), docs, **arguments)
    (docs / "more.txt").write_text("The tower was opened by a man of another name in another year.")
    with pytest.raises(InvalidInputError, match="another documents"):
        adapted(base, docs)
    assert contents(tmp_path / "out") == before


def test_the_output_must_be_a_folder_of_its_own(base, docs, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("full", "holds files, but no adapt.json"), ("file/x", "made")):
        with pytest.raises(InvalidInputError, match=message):
            adapted(base, docs, name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_documents_that_are_absent_or_too_few_are_one_error(base, docs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RetrievalError, match="no document to read"):
        adapt(base, docs=[empty], output=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="1 passages that can be asked about, but at least 10"):
        adapt(base, docs=[docs / "mill.txt"], output=tmp_path / "out2")
    assert main(["adapt", str(base), "--docs", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out3")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out3").exists()


def test_a_model_that_cannot_be_fused_is_refused(docs, tmp_path):
    model = save(tmp_path / "windowed", "mistral", sliding_window=8)
    with pytest.raises(UnsupportedModelError):
        adapted(model, docs)


def test_answers_of_no_use_end_the_run_with_their_reasons(docs, tmp_path):
    """A random model answers gibberish until its limit."""
    with pytest.raises(InvalidInputError, match=r"0 of 32 questions are left to train on.*(answer|question)"):
        adapted(save(tmp_path / "random", max_position_embeddings=1024), docs)


def test_a_model_without_a_chat_template_is_adapted_in_plain_wording(docs, tmp_path, monkeypatch):
    model = save(tmp_path / "plain", tokens="bpe-byte-fallback", max_position_embeddings=2048)
    monkeypatch.setattr(making, "answer_fault", lambda *a, **k: None)
    monkeypatch.setattr(making, "repeats", lambda *a: True)
    monkeypatch.setattr(making, "answer_alone", lambda generator, asked, tokens: generator.answer_batch(
        [question for question, _ in asked], [[p.text] for _, p in asked], mode="concat", max_new_tokens=2
    ))  # fmt: skip
    fusion_fails_untuned(monkeypatch)
    report = adapted(model, docs)
    assert report.steps > 0 and report.losses[0] > 0


# Questions


@pytest.mark.parametrize("tokens", ["byte-bpe", "bpe-byte-fallback"])
def test_a_question_goes_on_from_examples_text_and_opening(tokens):
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
    assert written[1] == f"When {joined.text}".strip()  # one fused document is the ordinary prompt


def test_openings_differ_within_a_passage_and_repeat_with_the_seed():
    for number in range(20):
        found = openings_of(number, 3, seed=1)
        assert len(set(found)) == 3 and found[0] == "" and found == openings_of(number, 3, seed=1)


def test_questions_of_the_user_are_read_from_text_and_json_lines(tmp_path):
    (tmp_path / "q.txt").write_text("Who?\n\n  When? \n")
    assert list(read_questions(tmp_path / "q.txt")) == [("Who?", None), ("When?", None)]
    lines = [{"question": "Who?", "passage": "A man.", "title": "Mill"}, {"question": "When?"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(read_questions(tmp_path / "q.jsonl")) == [("Who?", Passage("A man.", "Mill")), ("When?", None)]
    for line, message in (("{", "not JSON"), ("[1]", "holds a list"), ('{"question": " "}', "question is"),
                          ('{"question": "Who?", "passage": 1}', "passage is 1")):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(InvalidInputError, match=f"bad.jsonl, line 1.*{message}"):
            list(read_questions(tmp_path / "bad.jsonl"))


def test_a_question_without_a_passage_gets_the_one_that_bm25_ranks_first():
    miner = NegativeMiner([Passage(place(number)) for number in range(len(PLACES))], seed=0)
    assert [miner.best(f"Who kept the books of the {name}?") for name in PLACES] == list(range(len(PLACES)))
    assert miner.best("Warum?") is None


# Filter

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
def test_degenerate_questions_are_dropped(question, fault):
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
def test_answers_that_teach_nothing_are_dropped(answer, fault):
    found = answer_fault(answer, GOOD, MILL)
    assert found is None if fault is None else found is not None and fault in found


def test_a_cut_answer_keeps_its_whole_sentences():
    assert whole_sentences("Amara Osei built it. It burned down in 1901. Then the") == (
        "Amara Osei built it. It burned down in 1901."
    )
    assert whole_sentences("It is 31.5 metres high. It") == "It is 31.5 metres high."
    assert whole_sentences("Amara Osei built it, and then") == "" == whole_sentences("")
    assert whole_sentences("灯塔建在岩石上。等") == "灯塔建在岩石上。"


def test_an_answer_is_repeated_if_its_own_words_are():
    assert repeats("Amara Osei", "It was Amara Osei.", GOOD, 0.6)
    assert repeats("It was built by Amara Osei", "Amara Osei built it in 1874", GOOD, 0.6)
    assert repeats("Amara Osei in 1874", "Amara Osei", GOOD, 0.6)
    assert not repeats("Amara Osei", "a miller of the name of Grant", GOOD, 0.6)
    assert not repeats("The water mill at Ash Brook was built by Osei", "The water mill was built by Grant", GOOD, 0.6)
    assert not repeats("Amara Osei", "", GOOD, 0.6)


def test_a_text_says_an_answer_if_it_holds_the_words_that_the_question_does_not_have():
    assert says("Amara Osei", "The water mill at Ash Brook was built by Amara Osei.", GOOD)
    assert says("Built in 1874 by Amara Osei.", "The mill was built by Amara Osei.", GOOD)
    assert not says("The water mill at Ash Brook was built by Amara.", "Amara Osei built the mill.", GOOD)
    assert not says("The water mill at Ash Brook was built.", "The water mill was built.", GOOD)


# Rows


def test_negatives_are_near_and_hold_no_answer():
    passages = [Passage(place(number)) for number in range(6)] + [Passage(f"{ANSWER} kept the books of the mill")]
    miner = NegativeMiner(passages, seed=0)
    found = miner.negatives("Who kept the books of the mill?", ANSWER, 1, 5)
    assert len(found) == 5 and passages[1] not in found and passages[6] not in found
    assert len(miner.negatives("Who kept the books of the mill?", "nobody", 1, 50)) == 6


def test_rows_mark_the_gold_passage_in_an_order_of_the_question():
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
def test_options_outside_what_is_allowed_are_refused(name, value):
    with pytest.raises(InvalidInputError, match=f"{name} is {value}"):
        AdaptOptions(**{name: value})


def test_passages_named_by_the_user_are_part_of_the_pool(base, docs, tmp_path):
    texts = {name: f"At the {name}, a man named grant and thomas kept keys." for name in PLACES}
    lines = [{"question": f"Who kept the keys of the {name}?", "passage": text} for name, text in texts.items()]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = adapted(base, docs, questions=tmp_path / "q.jsonl")
    assert report.asked == 16 and report.trained + report.judged == 16
