"""Loss "distill": Dt over fused passages learns the distribution of the base model over the gold passage only."""

import dataclasses

import pytest
import torch
from tiny import backbone, save, tokenizer
from tiny_training import SETTINGS, contents, engine, rows, trainer
from torch.nn.functional import log_softmax

from kvfusion_rag import InvalidInputError, KVFusionGenerator, MemoryStore
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import Passage, QARow, write_rows
from kvfusion_rag.engine.engine import Engine
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.text.settings import default_settings
from kvfusion_rag.training.checkpoint import load_record
from kvfusion_rag.training.config import TrainingConfig
from kvfusion_rag.training.examples import collate, encode_row, require_trainable
from kvfusion_rag.training.loss import base_log_probabilities, distillation_loss


def prompt_engine() -> Engine:
    """Return an engine that reads questions in the model's chat template."""
    settings = default_settings(tokenizer("byte-bpe"))
    base = backbone("llama", settings=settings, max_position_embeddings=1024)
    return Engine(TorchModel(base), settings, store=MemoryStore())


def distilled(made: Engine, data: list[QARow], *, joined: bool = False):
    options = {"evidence": False, "joined": joined, "loss": "distill"}
    return collate([encode_row(row, made, end_id=made.model.decoder.end_id, **options) for row in data])


def gold_only(row: QARow) -> QARow:
    return dataclasses.replace(row, passages=row.gold)


@pytest.fixture(params=["fixed", "prompt"])
def made(request) -> Engine:
    return engine() if request.param == "fixed" else prompt_engine()


def test_target_is_the_base_models_distribution_in_an_ordinary_pass(made):
    for row in rows(3):
        ((example,),) = distilled(made, [row]).groups
        base = example.base
        (gold,) = base.documents.values()
        # With a passage length, the question is at later positions than in a joined prompt.
        ids = [*base.prefix, *gold, *base.read]
        positions = [*range(len(base.prefix) + len(gold)), *range(base.start, base.start + len(base.read))]
        logits = made.model.backbone.model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions])
        ).logits[0]
        expected = log_softmax(logits[-len(base.target) :], dim=-1)
        torch.testing.assert_close(base_log_probabilities(made, [base]), expected, rtol=1e-3, atol=1e-3)


def test_base_model_reads_the_prompt_of_an_ordinary_question(made):
    (row,) = rows(1)
    documents = [passage.document("1") for passage in row.gold]
    asked = KVFusionGenerator(TorchModel(made.model.backbone), settings=made.settings, store=None).show_prompt(
        row.question, documents, mode="fusion"
    )
    ((example,),) = distilled(made, [row]).groups
    base = example.base
    ids = [*base.prefix, *(i for document in base.documents.values() for i in document), *base.question]
    assert made.model.backbone.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == asked.text


def test_student_that_equals_its_teacher_has_neither_loss_nor_gradient(made):
    """Over the gold passage only, both are the base model."""
    made.model.decoder.model.requires_grad_(True)
    loss = distillation_loss(made, distilled(made, [gold_only(row) for row in rows(3)]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-4)
    gradients = [p.grad for p in made.model.decoder.model.parameters() if p.grad is not None]
    assert gradients and max(float(gradient.abs().max()) for gradient in gradients) < 1e-3
    made.model.decoder.model.zero_grad()
    among_others = distillation_loss(made, distilled(made, rows(3)))
    assert float(among_others.detach()) > 0.01


def test_loss_is_the_divergence_summed_over_the_answer(made):
    (row,) = rows(1)
    batch = distilled(made, [row])
    ((example,),) = batch.groups
    base = base_log_probabilities(made, [example.base])
    tuned = base_log_probabilities(made, [example])  # without an adapter Dt is the base model
    expected = (base.exp() * (base - tuned)).sum()
    torch.testing.assert_close(distillation_loss(made, batch), expected, rtol=1e-3, atol=1e-4)


def test_loss_of_a_batch_is_the_sum_over_its_rows_in_any_grouping(made):
    data = rows(4)
    shared = [*data, *(dataclasses.replace(row, id=f"{row.id}b", question="what is it") for row in data[:2])]
    together = distillation_loss(made, distilled(made, shared))
    singles = sum(distillation_loss(made, distilled(made, [row])) for row in shared)
    torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-3)


def test_teacher_stays_the_base_model_while_the_adapter_is_trained(tmp_path):
    made = engine()
    run = trainer(tmp_path, made, rows(8), max_steps=3, loss="distill", learning_rate=5e-2)
    bases = [example.base for example in run.examples]
    before = base_log_probabilities(made, bases)
    run.run()
    torch.testing.assert_close(base_log_probabilities(made, bases), before, rtol=0, atol=0)
    assert all("lora" in name for name in run.weights)


def test_training_lowers_the_divergence(tmp_path):
    progress = trainer(tmp_path, engine(), rows(8), epochs=6, batch_size=8, loss="distill", learning_rate=1e-2).run()
    assert progress.losses[-1][1] < 0.8 * progress.losses[0][1]


@pytest.mark.parametrize("joined", [0.0, 0.5])
def test_gradient_checkpointing_makes_equal_steps(tmp_path, joined):
    found = [
        trainer(
            tmp_path / str(on), engine(), rows(8), max_steps=2, loss="distill", joined_share=joined,
            gradient_checkpointing=on,
        ).run().losses
        for on in (False, True)
    ]  # fmt: skip
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in found[0]], rel=1e-4)


def test_full_training_distills_from_the_frozen_model(tmp_path):
    made = engine(full=True)
    before = {n: p.clone() for n, p in made.model.backbone.model.named_parameters()}
    run = trainer(tmp_path, made, rows(8), max_steps=4, loss="distill", full=True, batch_size=8)
    losses = [loss for _, loss in run.run().losses]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in made.model.backbone.model.named_parameters())


def test_adapter_is_used_in_the_layout_in_which_it_was_trained(tmp_path):
    base = save(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", rows(4))
    for layout in ("fixed", "prompt"):
        out = tmp_path / layout
        command = ["train", tmp_path / "rows.jsonl", "--model", base, "--output", out, "--max-steps", "1", "--loss"]
        assert main([str(part) for part in (*command, "distill", "--layout", layout)]) == 0
        gen = KVFusionGenerator.from_pretrained(base, adapter=out / "best")
        assert gen.settings.layout == layout and gen.mode == "fusion"
        assert gen.max_new_tokens == (48 if layout == "fixed" else 512)
        assert load_record(out / "best")["config"]["loss"] == "distill"


def test_row_without_a_gold_passage_is_rejected(tmp_path, capsys):
    base = save(tmp_path / "base", settings=SETTINGS)
    bad = dataclasses.replace(rows(1)[0], passages=(Passage("the mill is red"),))
    write_rows(tmp_path / "rows.jsonl", [*rows(2), bad])
    before = contents(tmp_path)
    capsys.readouterr()
    command = ["train", tmp_path / "rows.jsonl", "--model", base, "--output", tmp_path / "out", "--loss", "distill"]
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert "line 3: no passage is gold" in error and error.count("\n") == 1 and contents(tmp_path) == before
    with pytest.raises(InvalidInputError, match="row 1: answers is empty"):
        require_trainable(dataclasses.replace(rows(1)[0], answers=()), "row 1", "distill")


def test_answer_that_is_not_in_the_passage_can_be_distilled(tmp_path):
    data = [dataclasses.replace(row, answers=("it has the colour of a ripe tomato",)) for row in rows(4)]
    assert trainer(tmp_path, engine(), data, max_steps=1, loss="distill").run().step == 1


@pytest.mark.parametrize(("name", "value"), [("loss", "hinge"), ("layout", "chat")])
def test_unknown_loss_or_layout_raises(name, value):
    with pytest.raises(InvalidInputError, match=f"{name} is '{value}'"):
        TrainingConfig(**{name: value})
    with pytest.raises(InvalidInputError, match="evidence"):
        TrainingConfig(loss="distill", evidence=True)
