"""``kvfusion adapt``: only a better adapter is kept, killed runs can be resumed, and wrong input is rejected."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
from places import ANSWER, PLACES, place
from tiny import save, save_speaker, tokenizer
from tiny_training import contents
from transformers import AutoModelForCausalLM, BloomConfig

from kvfusion_rag import InvalidInputError, KVFusionGenerator, RetrievalError, UnsupportedModelError
from kvfusion_rag.adapting import AdaptOptions, adapt, making
from kvfusion_rag.adapting import run as running
from kvfusion_rag.adapting.judging import (
    ADAPTED,
    ADAPTED_FOCUS,
    CONCAT,
    FOCUS,
    SYSTEMS,
    UNTUNED,
    UNTUNED_FOCUS,
    System,
    Verdict,
    best_focus,
    best_system,
    wins,
)
from kvfusion_rag.adapting.stages import Stages
from kvfusion_rag.cli import main
from kvfusion_rag.training.trainer import Trainer


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
def base(speaker_folder) -> Path:
    return speaker_folder


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    for module in (making, running):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(making, "QUESTIONS_AT_ONCE", 8)


@pytest.fixture
def own_questions(monkeypatch) -> None:
    """Build questions from the passages, since a random model cannot write them."""

    def write(writer: KVFusionGenerator, passages) -> list[str]:
        return [f"Who kept the{opening} books of the {passage.text.split()[1]}?" for passage, opening in passages]

    monkeypatch.setattr(making, "write_questions", write)


def fails(monkeypatch, *systems: System) -> None:
    """Replace the answers of ``systems`` by wrong ones, so that others win."""
    answer_rows = running.answer_rows
    wrong = {(one.adapted, one.mode, one.focus) for one in systems}

    def answers(generator, rows, mode, tokens, focus):
        if (generator._engine.model.backbone.has_adapter, mode, focus) in wrong:
            return ["nobody"] * len(rows)
        return answer_rows(generator, rows, mode, tokens, focus)

    monkeypatch.setattr(running, "answer_rows", answers)


def options(**changes) -> AdaptOptions:
    made = AdaptOptions(**{"passages": 16, "held_out": 0.25, "documents": 3, "answer_tokens": 16} | changes)
    training = dataclasses.replace(made.training, epochs=1, batch_size=4, eval_every=2, rank=2, dropout=0.1)
    return dataclasses.replace(made, training=training)


def adapted(base: Path, docs: Path, output: str = "out", **changes):
    arguments = {"questions": docs.parent / "questions.txt", "options": options(), "dtype": "float32"} | changes
    return adapt(base, docs=[docs], output=docs.parent / output, **arguments)


def test_adapter_that_beats_the_untuned_model_is_kept_with_card_and_record(base, docs, tmp_path, monkeypatch):
    fails(monkeypatch, UNTUNED, UNTUNED_FOCUS)
    report = adapted(base, docs)
    assert report.kept and report.margin[0] == report.focus_margin[0] == 100.0 and report.best == ADAPTED.name
    assert [(v.system, v.right) for v in report.verdicts] == [
        ("fusion, untuned", 0.0), ("fusion, adapted", 100.0), ("focus 1, untuned", 0.0), ("focus 1, adapted", 100.0),
        ("concat", 100.0),
    ]  # fmt: skip
    assert report.asked == 24 and report.trained + report.judged == 24 and report.judged == 6
    out = tmp_path / "out"
    gen = KVFusionGenerator.from_pretrained(base, adapter=out / "adapter")
    assert gen.mode == "fusion" and gen.settings.layout == "prompt" and gen.max_new_tokens == 512
    assert gen.settings.focus is None
    assert gen.answer("Who kept the books of the mill?", [place(1), place(2)]).text == ANSWER
    card = (out / "adapter" / "README.md").read_text()
    assert "| fusion, adapted | 100.0 | 100.0 |" in card and "12 files" in card and "24 questions" in card
    assert "answers over all documents" in card and 'The best system is "fusion, adapted"' in card
    record = json.loads((out / "adapter" / "training.json").read_text())
    assert record["config"]["loss"] == "distill" and record["files"]["documents"]["passages"] == 12
    assert {entry.name for entry in out.iterdir()} == {
        "adapt.json", "answers.jsonl", "repeats.jsonl", "adapter", "losses.json", "report.json",
        *(f"{system.stage}.jsonl" for system in SYSTEMS),
    }  # fmt: skip


def test_adapter_that_is_better_with_focus_has_it_by_default(base, docs, tmp_path, monkeypatch):
    fails(monkeypatch, UNTUNED, ADAPTED, UNTUNED_FOCUS)
    report = adapted(base, docs)
    assert report.kept and report.focus == FOCUS and report.best == ADAPTED_FOCUS.name
    gen = KVFusionGenerator.from_pretrained(base, adapter=tmp_path / "out" / "adapter")
    answer = gen.answer("Who kept the books of the mill?", [place(1), place(2)])
    assert gen.settings.focus == FOCUS and sum(source.used for source in answer.sources) == FOCUS
    assert "`focus` 1" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_adapter_that_does_not_win_is_not_kept(base, docs, tmp_path, capsys):
    """Untuned fusion is always right here."""
    command = ["adapt", base, "--docs", docs, "--output", tmp_path / "out", "--questions", tmp_path / "questions.txt"]
    command += ["--max-steps", "2", "--rank", "2", "--documents", "3"]
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "does not beat the untuned model and was not kept" in out and "focus 1, adapted" in out
    assert (
        f'The untuned model is best: kvfusion ask "..." --docs PATH --model {base} --adapter none --mode fusion' in out
    )
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "training").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] is False
    before = contents(tmp_path / "out")
    assert main([str(part) for part in [*command, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is False
    assert contents(tmp_path / "out") == before


def verdicts(**right: float) -> dict[System, Verdict]:
    """Return verdicts with the given shares of right answers, and 50 % of the other systems."""
    names = {"untuned": UNTUNED, "adapted": ADAPTED, "untuned_focus": UNTUNED_FOCUS, "adapted_focus": ADAPTED_FOCUS}
    own = {names[name]: share for name, share in right.items()}
    return {system: Verdict(system.name, own.get(system, 50.0), 60.0) for system in SYSTEMS}


@pytest.mark.parametrize("scores", [(50.0, 60.0), (40.0, 99.0), (50.0, 59.0)])
def test_more_right_answers_or_a_higher_f1_win(scores):
    other, one = Verdict("other", *scores), Verdict("one", 50.0, 60.0)
    assert not other.beats(one) and one.beats(other) == (scores != (50.0, 60.0))


@pytest.mark.parametrize(
    ("right", "kept", "focus", "best"),
    [
        ({}, False, None, UNTUNED),
        ({"adapted": 60}, True, None, ADAPTED),
        ({"adapted": 60, "untuned_focus": 90, "adapted_focus": 80}, True, FOCUS, UNTUNED_FOCUS),
        ({"adapted": 40, "untuned_focus": 60, "adapted_focus": 80}, True, FOCUS, ADAPTED_FOCUS),
        ({"adapted": 40, "untuned_focus": 80, "adapted_focus": 70}, False, FOCUS, UNTUNED_FOCUS),
        ({"untuned": 40, "adapted": 45, "untuned_focus": 40, "adapted_focus": 40}, True, None, CONCAT),
    ],
)
def test_adapter_is_kept_if_it_wins_with_or_without_focus(right, kept, focus, best):
    made = verdicts(**right)
    assert (wins(made), best_focus(made), best_system(made)) == (kept, focus, best)


class Killed(BaseException):
    """Ends a run like a signal."""


@pytest.fixture
def prepared(monkeypatch) -> list:
    """End runs before training, and return what they have prepared."""
    found = []

    def stop(made, *arguments):
        found.append(made)
        raise Killed

    monkeypatch.setattr(running, "_train", stop)
    return found


def kill_at(monkeypatch, stage: str) -> None:
    """Raise at the second chunk of ``stage``, or at the third step of training."""
    if stage == "training":
        step, made = Trainer._step, []

        def stepping(self, *arguments):
            if len(made) == 2:
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


STAGES = (
    "questions",
    "answers",
    "repeats",
    UNTUNED.stage,
    UNTUNED_FOCUS.stage,
    CONCAT.stage,
    "training",
    ADAPTED.stage,
)


@pytest.mark.usefixtures("own_questions", "small_chunks")
def test_run_killed_in_every_stage_equals_an_uninterrupted_one(base, docs, tmp_path, monkeypatch):
    fails(monkeypatch, UNTUNED, UNTUNED_FOCUS)
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


def test_full_disk_is_one_error_and_the_run_can_be_resumed(base, docs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("kvfusion_rag.training.trainer.save_state", lambda *a: (_ for _ in ()).throw(full))
        with pytest.raises(InvalidInputError, match=r"No space left on device.*run the same command again"):
            adapted(base, docs)
    before = contents(tmp_path / "out")
    assert "answers.jsonl" in before and "training/best/training.json" in before  # but there is no checkpoint
    adapted(base, docs)
    after = contents(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.endswith(".jsonl"))


def test_folder_of_another_run_is_rejected_and_unchanged(base, docs, tmp_path, prepared):
    with pytest.raises(Killed):
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


def test_output_must_be_an_empty_folder(base, docs, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    inside = ("file/x", "cannot be used: Not a directory")
    for name, message in (("file", "is a file"), ("full", "contains files, but no adapt.json"), inside):
        with pytest.raises(InvalidInputError, match=message):
            adapted(base, docs, name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_missing_or_too_few_documents_raise(base, docs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RetrievalError, match="no document to read"):
        adapt(base, docs=[empty], output=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="1 passages to ask about, but at least 10"):
        adapt(base, docs=[docs / "mill.txt"], output=tmp_path / "out2")
    assert main(["adapt", str(base), "--docs", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out3")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out3").exists()


def test_unsupported_model_is_rejected(docs, tmp_path):
    made = BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=512)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "alibi")
    tokenizer("byte-bpe").save_pretrained(tmp_path / "alibi")
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        adapted(tmp_path / "alibi", docs)


def test_useless_answers_end_the_run_with_reasons(docs, tmp_path):
    """A random model answers gibberish up to its limit."""
    with pytest.raises(InvalidInputError, match=r"0 of 24 questions are left for training.*(answer|question)"):
        adapted(save(tmp_path / "random", max_position_embeddings=1024), docs)


@pytest.mark.slow
def test_model_without_a_chat_template_can_be_adapted(docs, tmp_path, monkeypatch):
    model = save(tmp_path / "plain", tokens="bpe-byte-fallback", max_position_embeddings=2048)
    monkeypatch.setattr(making, "answer_fault", lambda *a, **k: None)
    monkeypatch.setattr(making, "repeats", lambda *a: True)
    monkeypatch.setattr(making, "answer_from_passage", lambda generator, asked, tokens: generator.answer_batch(
        [question for question, _ in asked], [[p.text] for _, p in asked], mode="concat", max_new_tokens=2
    ))  # fmt: skip
    fails(monkeypatch, UNTUNED, UNTUNED_FOCUS)
    report = adapted(model, docs)
    assert report.steps > 0 and report.losses[0] > 0


def test_passages_of_own_questions_are_in_the_pool(base, docs, tmp_path, prepared):
    texts = {name: f"At the {name}, a man named grant and thomas kept keys." for name in PLACES}
    lines = [{"question": f"Who kept the keys of the {name}?", "passage": text} for name, text in texts.items()]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(Killed):
        adapted(base, docs, questions=tmp_path / "q.jsonl", options=options(held_out=0.34))
    (made,) = [one.rows for one in prepared]
    assert made.asked == 12 == len(made.trained) + len(made.judged)
