"""The loss: it equals that of one block-masked pass, and only answers are trained."""

import dataclasses

import pytest
import torch
from masks import block_masks
from tiny import tokenizer
from tiny_training import ARCHITECTURES, SETTINGS, batch_of, engine, gradients, rows, trainer
from torch.nn.functional import cross_entropy

from kvfusion_rag import InvalidInputError, MemoryStore
from kvfusion_rag.data.rows import Passage, QARow
from kvfusion_rag.engine.document_kvs import Scope
from kvfusion_rag.model.positions import fused_positions
from kvfusion_rag.text.encoder import PromptEncoder
from kvfusion_rag.training.loss import fusion_loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_equals_one_block_masked_pass(architecture):
    made = engine(architecture)
    for row in rows(3):
        batch = batch_of(made, [row])
        ((example,),) = batch.groups
        documents, read = list(example.documents.values()), list(example.read)
        lengths, prefix = [len(d) for d in documents], list(made.encoder.prefix_ids)
        ids = [*prefix, *(i for d in documents for i in d), *read]
        positions, network = fused_positions(len(prefix), lengths, example.start, len(read)), made.model.backbone.model
        logits = network(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            attention_mask=block_masks(network.config, len(prefix), lengths, len(read), positions),
        ).logits[0]
        target = torch.tensor(example.target)
        expected = cross_entropy(logits[-len(target) :], target, reduction="sum")
        torch.testing.assert_close(fusion_loss(made, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_of_a_batch_is_the_sum_over_its_rows(architecture):
    made = engine(architecture)
    data = [*rows(4), QARow("none", "who", (), ())]
    for joined in (False, True):
        together = fusion_loss(made, batch_of(made, data, joined=joined))
        singles = sum(fusion_loss(made, batch_of(made, [row], joined=joined)) for row in data)
        torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-3)


def test_only_answer_tokens_and_end_token_are_trained():
    made = engine()
    (row,) = rows(1)
    batch = batch_of(made, [row])
    text = made.encoder.decode([i for i in batch.labels[0].tolist() if i != -100])
    assert text.split() == list(row.answers)
    assert batch.labels[0, -1].item() == made.model.decoder.end_id
    with_evidence = batch_of(made, [row], evidence=True)
    assert row.evidence in made.encoder.decode([i for i in with_evidence.labels[0].tolist() if i != -100])
    unanswerable = batch_of(made, [QARow("u", "who", (), row.passages)])
    assert "Unanswerable" in made.encoder.decode([i for i in unanswerable.labels[0].tolist() if i != -100])


def test_stored_and_computed_documents_give_equal_gradients():
    found = []
    for store in (None, MemoryStore()):
        made = engine(store=store)
        made.model.decoder.model.requires_grad_(True)
        for _ in range(2):  # the second pass reads from the store, if there is one
            pass_gradients = gradients(made, [batch_of(made, rows(4))])[1]
        found.append(pass_gradients)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_documents_are_prefilled_without_dropout_during_training(architecture):
    made, ids = engine(architecture), {"k": (20, 30, 40)}
    expected = made.document_kvs.get(ids, Scope(made.encoder.prefix_ids))["k"]
    made.model.decoder.model.train()
    assert torch.equal(made.document_kvs.get(ids, Scope(made.encoder.prefix_ids))["k"].values, expected.values)
    assert made.model.decoder.model.training


@pytest.mark.parametrize("kind", ["byte-bpe", "unigram", "bpe-byte-fallback", "wordpiece"])
def test_evidence_can_be_separated_from_the_answer(kind):
    encoder = PromptEncoder(tokenizer(kind), SETTINGS)
    mark = encoder.evidence_mark
    whole = encoder.decode(list(encoder.encode_answer(f"red{SETTINGS.evidence_separator}thing 1 is red")))
    assert mark is not None and whole.split(mark)[0].strip() == "red"


def test_inseparable_evidence_is_rejected(tmp_path):
    made = engine()
    made.prompts.encoder = PromptEncoder(
        made.model.backbone.tokenizer, dataclasses.replace(SETTINGS, evidence_separator=" | ")
    )
    with pytest.raises(InvalidInputError, match="evidence_separator"):
        trainer(tmp_path, made, rows(2), evidence=True)


def test_trained_answer_is_in_the_gold_passage():
    made, passages = engine(), (Passage("made in the United States", gold=True), Passage("USA"))
    batch = batch_of(made, [QARow("1", "where", ("USA", "United States"), passages)])
    text = made.encoder.decode([i for i in batch.labels[0].tolist() if i != -100])
    assert text.strip() == "United States"
