"""The trainer: only Dt is trained, a run learns, and wrong settings are rejected."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from tiny import save
from tiny_training import SETTINGS, engine, rows, trainer

from kvfusion_rag import InvalidInputError, KVFusionGenerator, MemoryStore
from kvfusion_rag.data.rows import QARow
from kvfusion_rag.engine.document_kvs import Scope
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.training import train
from kvfusion_rag.training.config import TrainingConfig, preset


def test_only_the_adapter_is_trained_and_prefill_stays_frozen(tmp_path):
    made = engine()
    before = {n: p.clone() for n, p in made.model.backbone.model.named_parameters()}
    kv = made.document_kvs.get({"k": (20, 30, 40)}, Scope(made.encoder.prefix_ids))["k"]
    run = trainer(tmp_path, made, rows(8), max_steps=3)
    assert run.weights and all("lora" in name for name in run.weights)
    started = {n: p.clone() for n, p in run.weights.items()}
    run.run()
    after = dict(made.model.backbone.model.named_parameters())
    for name, weight in before.items():
        kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert kept is not None and kept.equal(weight), name
    assert any(not p.equal(started[n]) for n, p in run.weights.items())
    assert made.document_kvs.get({"k": (20, 30, 40)}, Scope(made.encoder.prefix_ids))["k"].keys.equal(kv.keys)


def test_full_training_changes_only_the_decoder(tmp_path):
    made = engine(full=True)
    before = {n: p.clone() for n, p in made.model.backbone.model.named_parameters()}
    trainer(tmp_path, made, rows(8), max_steps=2, full=True).run()
    assert all(p.equal(before[n]) for n, p in made.model.backbone.model.named_parameters())
    changed = [n for n, p in made.model.decoder.model.named_parameters() if not p.equal(before[n])]
    assert len(changed) > len(before) / 2


@pytest.mark.parametrize("full", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_run_learns_and_its_saved_decoder_answers_like_the_trainer(tmp_path, full):
    base = save(tmp_path / "base", settings=SETTINGS)
    data = rows(8, passages=4)
    learning = {"epochs": 30 if full else 60, "learning_rate": 5e-3 if full else 1e-2, "eval_every": 30}
    config = TrainingConfig(full=full, batch_size=8, dropout=0.0, rank=32, **learning)
    progress = train(data, dev=data, output=tmp_path / "run", model=base, config=config, device="cpu")
    # The frozen random output matrix limits an adapter to 0.57 nats per token.
    assert progress.losses[-1][1] < (0.2 if full else 0.6) < progress.losses[0][1]
    assert progress.best == 100.0
    best = tmp_path / "run" / "best"
    gen = KVFusionGenerator.from_pretrained(base, **{"decoder" if full else "adapter": best})
    answers = [gen.answer(row.question, [p.text for p in row.passages]).text for row in data]
    assert answers == [row.answers[0] for row in data]
    record = json.loads((best / "training.json").read_text())
    assert record["base_weights"] == gen._engine.model.backbone.weights_digest and record["config"]["full"] is full


def test_only_a_decoder_trained_on_joined_prompts_is_used_in_concat(tmp_path):
    base = save(tmp_path / "base", settings=SETTINGS)
    data = rows(4)
    documents = [p.text for p in data[0].passages]
    plain = KVFusionGenerator.from_pretrained(base).answer(data[0].question, documents, mode="concat").token_ids
    for share, changes in ((0.0, False), (1.0, True)):
        made = engine()
        run = trainer(tmp_path / str(share), made, data, max_steps=4, joined_share=share, learning_rate=2e-2)
        assert all(example.joined == changes for example in run.examples)
        run.run()
        gen = KVFusionGenerator.from_pretrained(base, adapter=tmp_path / str(share) / "run" / "best")
        found = gen.answer(data[0].question, documents, mode="concat").token_ids
        assert (found != plain) == changes == gen.settings.tuned_concat
        assert gen.settings.mode == ("concat" if changes else "fusion")


def test_dev_rows_are_answered_in_the_trained_mode(tmp_path, caplog):
    caplog.set_level("INFO")
    for share, mode in ((0.0, "fusion"), (0.5, "fusion"), (1.0, "concat")):
        caplog.clear()
        trainer(tmp_path / mode / str(share), engine(), rows(4), rows(2), max_steps=1, joined_share=share).run()
        assert {r.message.split(" (")[0] for r in caplog.records if r.message.startswith("mode ")} == {f"mode {mode}"}


def test_decoder_trained_on_joined_prompts_warns_in_mode_fusion(caplog):
    made = engine(full=True)
    made.settings = dataclasses.replace(SETTINGS, mode="concat", tuned_concat=True)
    made.request("who", ["a"], None, "fusion", DecodingOptions(4))
    assert "its own mode is 'concat'" in caplog.text


def test_answers_of_a_decoder_trained_on_evidence_end_before_it(tmp_path):
    data = rows(2)
    run = trainer(
        tmp_path, engine(full=True), data, data, full=True, evidence=True, batch_size=2, epochs=60, learning_rate=1e-2,
        eval_every=60,
    )  # fmt: skip
    run.run()
    documents = [p.text for p in data[0].passages]
    options = DecodingOptions(30)
    request = run._engine.request(data[0].question, documents, None, None, options)
    (answer,) = run._engine.answer_all([request], options)
    assert (answer.text, answer.finish_reason) == (data[0].answers[0], "stop")
    run._engine.settings = dataclasses.replace(run._engine.settings, tuned_evidence=False)
    request = run._engine.request(data[0].question, documents, None, None, options)
    (whole,) = run._engine.answer_all([request], options)
    assert whole.text == f"{data[0].answers[0]}\nEvidence: {data[0].evidence}"
    assert json.loads((tmp_path / "run/best/kvfusion.json").read_text())["tuned_evidence"]


@pytest.mark.slow
def test_32_rows_with_20_passages_are_learned(tmp_path):
    data = rows(32, passages=20)
    options = {"batch_size": 8, "epochs": 60, "learning_rate": 1e-2, "rank": 32, "eval_every": 40}
    run = trainer(tmp_path, engine(store=MemoryStore()), data, data, **options)
    assert run.run().best == 100.0


def test_rows_that_do_not_fit_are_dropped_and_named(tmp_path, caplog):
    long = QARow("long", "who? " * 300, ("red",), rows(1)[0].passages)
    run = trainer(tmp_path, engine(), [*rows(2), long])
    assert len(run.examples) == 2 and "long" in caplog.text
    with pytest.raises(InvalidInputError, match="none of the 1 rows"):
        trainer(tmp_path, engine(), [long])


def test_dev_row_that_does_not_fit_counts_as_wrong(tmp_path, caplog, monkeypatch):
    data = rows(4)
    long = QARow("long", "who? " * 300, ("red",), data[0].passages)
    run = trainer(tmp_path, engine(), data, [*data, long], max_steps=1)
    assert "1 of 5 dev rows do not fit" in caplog.text
    right = [SimpleNamespace(text=row.answers[0]) for row in data]
    monkeypatch.setattr(run._engine, "answer_all", lambda requests, options: right)
    assert run.run().best == 80.0


def test_wrong_decoder_for_lora_or_full_training_is_rejected(tmp_path):
    with pytest.raises(InvalidInputError, match="full training needs"):
        trainer(tmp_path, engine(), rows(2), full=True)
    with pytest.raises(InvalidInputError, match="full training needs"):
        trainer(tmp_path, engine(full=True), rows(2))


@pytest.mark.parametrize(
    "wrong", [{"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}, {"weight_decay": -1.0}, {"seed": -1}, {"dropout": 2.0}]
)
def test_invalid_settings_raise(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_presets():
    assert preset("paper").full and preset("paper").batch_size * preset("paper").accumulation == 64
    assert preset("lora", rank=4, alpha=None).rank == 4
    for wrong in (
        {"name": "x"},
        {"name": "lora", "ranks": 3},
        {"name": "lora", "rank": 0},
        {"name": "lora", "dropout": 2},
    ):
        with pytest.raises(InvalidInputError):
            preset(**wrong)
