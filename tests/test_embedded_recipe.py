"""The recipe of the embedded model: its fast loss is the product's, and a run can be taken up again to the bit."""

import argparse
import copy
import json
import lzma
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from groups import GroupSampler, Mixture, Stage, Text, texts_of
from pretrain_llama import Run as Pretraining
from pretrain_llama import build, prepare
from reader import BertReader, CacheReader
from safetensors.torch import load
from tiny import WORDS
from train_base import SETTINGS, Run, embedding_tokenizer, extend_positions, load_start, nearest, warm_start
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from kvfusion_rag import InvalidInputError, KVFusionGenerator
from kvfusion_rag.backbone import Backbone
from kvfusion_rag.engine import Engine
from kvfusion_rag.positions import additive, packed_mask
from kvfusion_rag.prompts import PromptEncoder
from kvfusion_rag.qa import Passage, QARow
from kvfusion_rag.training.examples import collate, encode_row
from kvfusion_rag.training.formats import Example
from kvfusion_rag.training.loss import fusion_loss

STAGES = (Stage(2, 2, 40, 2), Stage(3, 2, 40, 3))
VOCABULARY = WORDS.split()


def example(number: int, rng: random.Random) -> Example:
    name = f"{rng.choice(['Amara', 'Edda', 'Tomas'])} Number{number}"
    text = " ".join(
        [*rng.choices(VOCABULARY, k=12), f"and so it was built by {name} in 1874", *rng.choices(VOCABULARY, k=9)]
    )
    return Example(
        "here", str(number), f"who built thing {number}?", (name,), (Passage(text, f"Thing_{number}", True),)
    )


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    rng = random.Random(3)
    return texts_of(example(n, rng) for n in range(12))


@pytest.fixture(scope="module")
def tokenizer():
    return embedding_tokenizer()


def network(tokenizer, seed: int = 0) -> BertLMHeadModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    return BertLMHeadModel(config)


def sampler(texts, tokenizer, **mixture) -> GroupSampler:
    return GroupSampler(
        texts, texts[:3], nearest(texts), tokenizer, PromptEncoder(tokenizer, SETTINGS), end_id=1,
        question_position=192, mixture=Mixture(**mixture), seed=5,
    )  # fmt: skip


def test_texts_are_distinct_contexts_with_their_questions(texts):
    assert len(texts) == 12 and all(t.title == f"Thing {n}" for n, t in enumerate(texts))
    for text in texts:
        ((_, answer, start),) = text.questions
        assert text.text[start:].startswith(answer)


def test_a_batch_asks_what_its_documents_answer(texts, tokenizer):
    batch = sampler(texts, tokenizer, cloze=0.0, joined_every=99).batch(STAGES[1], 1, 0, 0.0)
    assert batch.documents.shape == (6, 40) and batch.questions > 0
    for group in range(2):
        documents = [tokenizer.decode(ids[ids != 0]) for ids in batch.documents[group * 3 : group * 3 + 3]]
        for number in range(int(batch.owner[group].max()) + 1):
            ids = batch.ids[group][batch.owner[group] == number]
            answer = tokenizer.decode(ids[ids.tolist().index(tokenizer.sep_token_id) + 1 :])
            assert any(answer in document for document in documents)
            assert batch.positions[group][batch.owner[group] == number].tolist() == list(range(192, 192 + len(ids)))


def test_unanswerable_questions_come_from_other_documents(texts, tokenizer):
    made = sampler(texts, tokenizer, cloze=0.0, unanswerable=1.0, large=2, joined_every=99).batch(STAGES[0], 1, 0, 0.0)
    labels = tokenizer.decode(made.labels[made.labels > 1])
    assert "unanswerable" in labels
    assert 0 < (made.golds >= 0).sum() < made.questions


def test_a_swapped_answer_stands_wherever_the_old_one_stood(texts, tokenizer):
    text = Text(
        "Built by Amara Oke in 1874, it was sold by Amara Oke in 1902. Amara Okeke came later.",
        "A house",
        [
            ("who built it?", "Amara Oke", 9),
            ("when was it built?", "1874", 22),
            ("when did Amara Oke sell it?", "1902", 56),
            ("who sold it, and when?", "Amara Oke in 1902", 43),
        ],
    )
    made = sampler([*texts, text], tokenizer)._swap_answer(
        random.Random(1), replace(text, questions=text.questions[:1])
    )
    asked, new, _ = made.questions[0]
    assert asked == "who built it?" and new != "Amara Oke" and made.text.count(new) == 2
    assert "Amara Okeke came later" in made.text and "Amara Oke " not in made.text
    for seed in range(20):
        made = sampler([*texts, text], tokenizer)._swap_answer(random.Random(seed), text)
        assert all(made.text[start:].startswith(answer) for _, answer, start in made.questions)
        if (
            "Amara Oke " not in made.text
        ):  # the question that names the old one no longer holds, nor does a longer answer
            assert {question for question, _, _ in made.questions} == {"who built it?", "when was it built?"}


def test_a_question_on_a_swapped_document_is_never_called_unanswerable(texts, tokenizer):
    options = {"cloze": 0.0, "unanswerable": 1.0, "large": 2, "swapped": 1.0, "joined_every": 99}
    made, checked = sampler(texts, tokenizer, **options), 0
    for step in range(1, 9):
        batch = made.batch(STAGES[1], step, 0, 0.0)
        documents = tokenizer.batch_decode([ids[ids != 0] for ids in batch.documents])
        for group in range(2):
            for number in range(int(batch.owner[group].max()) + 1):
                asked = tokenizer.decode(batch.ids[group][batch.owner[group] == number])
                thing = re.search(r"thing (\d+)", asked)
                if thing and "unanswerable" in asked:
                    opening = " ".join(texts[int(thing[1])].text.split()[:12])
                    assert not any(opening in document for document in documents[group * 3 : group * 3 + 3])
                    checked += 1
    assert checked > 5


@pytest.mark.parametrize("joined", [False, True])
def test_golds_are_the_documents_that_answer(texts, tokenizer, joined):
    options = {"cloze": 0.0, "swapped": 0.5, "joined_every": 1 if joined else 99, "joined_tokens": 120}
    batch = sampler(texts, tokenizer, **options).batch(STAGES[1], 1, 0, 0.0)
    slots = batch.documents.view(len(batch.ids), -1)
    row = batch.targets // batch.ids.shape[1]
    trained = batch.golds >= 0
    assert trained.sum() == batch.questions
    for group, label, gold in zip(row[trained], batch.labels[trained], batch.golds[trained], strict=True):
        assert label in slots[group][batch.sources[group] == gold]


def test_batches_are_a_function_of_seed_and_step(texts, tokenizer):
    one, two = sampler(texts, tokenizer), sampler(texts, tokenizer)
    one.batch(STAGES[0], 0, 0, 0.0)
    a, b = one.batch(STAGES[1], 7, 30, 0.5), two.batch(STAGES[1], 7, 30, 0.5)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("documents", "ids", "owner", "labels"))


@pytest.mark.parametrize("joined", [False, True])
def test_the_loss_is_the_products_own(texts, tokenizer, joined):
    """Packed groups in one compiled pass = each question alone over documents fused (or joined) by the engine."""
    model = network(tokenizer)
    batch = sampler(texts, tokenizer, joined_every=1 if joined else 99, joined_tokens=90).batch(STAGES[1], 1, 0, 0.0)
    found = BertReader(model, compiled=False, dtype=torch.float32).loss(batch).answer
    slow = CacheReader(model, bidirectional=True, dtype=torch.float32).loss(batch).answer
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (found, slow)]
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        if "token_type" not in name:  # its second row is never read
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
    assert slow.item() == pytest.approx(found.item(), rel=1e-5)
    bone = Backbone(copy.deepcopy(model), tokenizer, SETTINGS, model_id="tiny")
    engine = Engine(bone, SETTINGS, store=None, namespace="", max_fused_tokens=10**6, tokens_per_pass=None)
    expected = 0.0
    groups = len(batch.ids)
    for group, rows in enumerate(batch.documents.view(groups, -1, batch.documents.shape[1])):
        documents = {engine.supply.key(tuple(ids[ids != 0].tolist())): tuple(ids[ids != 0].tolist()) for ids in rows}
        longest = max(map(len, documents.values()))
        for number in range(int(batch.owner[group].max()) + 1):
            ids = batch.ids[group][batch.owner[group] == number].tolist()
            asked = ids.index(tokenizer.sep_token_id) + 1
            sample = encode_row(
                QARow("1", "x", ("y",), (Passage("z"),)), engine, end_id=1, evidence=False, joined=False
            )
            target = (*ids[asked:], 1)
            start = longest if joined else 192
            values = {"documents": documents, "question": tuple(ids[:asked]), "target": target, "start": start}
            sample = type(sample)(**{"joined": False, **values})
            expected += fusion_loss(engine, collate([sample])).item()
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("joined", [False, True])
def test_guided_attention_is_the_attention_on_the_answering_document(texts, tokenizer, joined):
    """The guide's loss = the one computed from the attention weights of transformers' own eager attention."""
    model = network(tokenizer)
    options = {"joined_every": 1 if joined else 99, "joined_tokens": 90, "unanswerable": 0.3, "large": 2}
    batch = sampler(texts, tokenizer, **options).batch(STAGES[1], 1, 0, 0.0)
    found = BertReader(model, compiled=False, dtype=torch.float32, guided=2).loss(batch)
    model.set_attn_implementation("eager")
    context, seen = CacheReader(model, bidirectional=True, dtype=torch.float32)._read_documents(
        batch.documents, len(batch.ids)
    )
    weights = model(
        input_ids=batch.ids, position_ids=batch.positions, past_key_values=context, output_attentions=True,
        attention_mask=additive(packed_mask(seen, batch.owner), model.dtype),
    ).attentions  # fmt: skip
    expected, right, known = 0.0, 0, 0
    for at, gold in zip(batch.targets, batch.golds, strict=True):
        group, place = divmod(int(at), batch.ids.shape[1])
        if gold < 0:
            continue
        known += 1
        for shares in weights:
            mass = [
                shares[group, :, place, : seen.shape[1]][:, batch.sources[group] == d].sum().item() for d in range(3)
            ]
            expected -= math.log(mass[gold] / sum(mass)) / len(weights)
            right += max(mass) == mass[gold]
    assert found.attention.item() == pytest.approx(expected / known, rel=1e-4)
    assert found.found.item() == pytest.approx(right / known / len(weights))
    (gradient,) = torch.autograd.grad(found.attention, [model.bert.encoder.layer[0].attention.self.query.weight])
    assert gradient.abs().max() > 0


def arguments(folder, **changes) -> argparse.Namespace:
    folder.mkdir(exist_ok=True)
    options = {
        "output": folder,
        "eager": True,
        "joined": False,
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "dtype": "float32",
        "warmup": 1,
        "eval_every": 2,
        "seed": 0,
    }
    return argparse.Namespace(**options | changes)


def stored(folder) -> dict[str, torch.Tensor]:
    """All tensors of the one checkpoint that a run has left."""
    (state,) = (folder / "checkpoint").iterdir()
    return load(b"".join(part.read_bytes() for part in sorted(state.glob("*.safetensors.*"))))


def test_a_resumed_run_is_an_uninterrupted_one(texts, tokenizer, tmp_path):
    whole = Run(
        network(tokenizer), tokenizer, SETTINGS, sampler(texts, tokenizer), STAGES, arguments(tmp_path / "whole")
    )
    whole.train([])
    part = Run(
        network(tokenizer), tokenizer, SETTINGS, sampler(texts, tokenizer), STAGES, arguments(tmp_path / "part")
    )
    steps = part._batches()
    part._batches = lambda: (next(steps) for _ in range(2))  # stopped after two steps
    part.train([])
    again = Run(
        network(tokenizer, 9), tokenizer, SETTINGS, sampler(texts, tokenizer), STAGES, arguments(tmp_path / "part")
    )
    again.load()
    assert again.step == 2
    again.train([])
    for name, tensor in whole.model.named_parameters():
        assert torch.equal(tensor, dict(again.model.named_parameters())[name]), name
    saved = [stored(folder) for folder in (tmp_path / "whole", tmp_path / "part")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
    generator = KVFusionGenerator.from_pretrained(tmp_path / "part/model")
    assert generator.settings == SETTINGS and generator.gate.passed
    assert [json.loads(line)["step"] for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()] == [2, 4, 5]


def test_dev_rows_that_do_not_fit_count_as_wrong_and_end_no_run(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("train_base.exact_match", lambda text, answers: True)
    run = Run(
        network(tokenizer), tokenizer, SETTINGS, sampler(texts, tokenizer), STAGES, arguments(tmp_path, joined=True)
    )
    run._export()
    short = QARow("short", "who built it?", ("lima",), (Passage("lima stands here", gold=True),))
    long = QARow("long", "who built it?", ("lima",), (Passage("lima stands here " * 200, gold=True),) * 2)
    assert (run._evaluate([short]), run._evaluate([short, long])) == (100, 50)


def tiny_run(step: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimiser after a few steps."""
    torch.manual_seed(step)
    model = torch.nn.Linear(40, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(step):
        model(torch.randn(3, 40)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_checkpoint_travels_in_small_parts_and_the_former_one_survives_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PART_BYTES", 5_000)
    model, optimizer = tiny_run(2)
    with pytest.raises(InvalidInputError, match="holds no whole checkpoint"):
        checkpoints.load_tensors(tmp_path, model, optimizer, {"seed": 0})
    checkpoints.save_tensors(tmp_path, model, optimizer, {"step": 2}, {"seed": 0})
    (state,) = tmp_path.iterdir()
    sizes = [path.stat().st_size for path in sorted(state.glob("state.safetensors.*"))]
    assert len(sizes) == -(-sum(sizes) // 5_000) > 3 and set(sizes[:-1]) == {5_000} and 0 < sizes[-1] <= 5_000

    write, remove = Path.write_bytes, checkpoints.shutil.rmtree

    def killed_while_writing(path, content):
        if path.name.endswith("003"):
            raise KeyboardInterrupt
        return write(path, content)

    def killed_while_removing(path, **options):
        if path.name == "000001":
            (path / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    again, other = tiny_run()
    for step, where, name, patch in (
        (2, Path, "write_bytes", killed_while_writing),  # the former one is left
        (3, checkpoints.shutil, "rmtree", killed_while_removing),  # the new one is there
    ):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(where, name, patch)
            checkpoints.save_tensors(tmp_path, *tiny_run(3), {"step": 3}, {"seed": 0})
        assert checkpoints.load_tensors(tmp_path, again, other, {"seed": 0}) == {"step": step}
        assert torch.equal(again.weight, tiny_run(step)[0].weight)
    checkpoints.save_tensors(tmp_path, *tiny_run(4), {"step": 4}, {"seed": 0})
    assert checkpoints.load_tensors(tmp_path, again, other, {"seed": 0}) == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]


def test_a_checkpoint_of_another_run_is_refused(texts, tokenizer, tmp_path):
    def run(stages=STAGES[:1], **changes) -> Run:
        data = tmp_path / "questions.jsonl"
        args = arguments(tmp_path / "base", **{"questions": [data], "plain": [], "eval_every": 9, **changes})
        return Run(network(tokenizer), tokenizer, SETTINGS, sampler(texts, tokenizer), stages, args)

    (tmp_path / "questions.jsonl").write_text("one")
    run().train([])
    run(threads=7, eval_every=3, device="cuda:1", dev=["x"], output=tmp_path / "base").load()
    for changes, message in (
        ({"stages": STAGES}, "stages .*'steps': 2"),
        ({"learning_rate": 1.0}, r"learning_rate 0\.001, but this run has 1\.0; name another output folder"),
        ({"seed": 3}, "seed 0, but this run has 3"),
        ({"plain": [tmp_path / "questions.jsonl"]}, r"plain \[\], but this run has \['questions.jsonl"),
    ):
        with pytest.raises(InvalidInputError, match=f"^the checkpoint in 'base' was made with {message}"):
            run(**changes).load()
    (tmp_path / "questions.jsonl").write_text("two")
    with pytest.raises(InvalidInputError, match="made with questions"):
        run().load()


def pretraining(texts, folder, **changes) -> argparse.Namespace:
    """Token files of ``texts`` in a folder, and the arguments of a run on them."""
    if not folder.exists():
        folder.mkdir()
        with lzma.open(folder / "text.txt.xz", "wt") as out:
            out.write("\n\n".join(text.text for text in texts))
        prepare([folder / "text.txt.xz"], folder)
    options = {"output": folder, "window": 40, "batch": 3, "steps": 4, "repeat": 0.5, "learning_rate": 1e-3,
               "warmup": 1, "save_every": 2, "device": "cpu:0", "eager": True, "seed": 0}  # fmt: skip
    return argparse.Namespace(**options | changes)


def pretrained(args, seed: int = 0) -> Pretraining:
    tokens = PreTrainedTokenizerFast.from_pretrained(args.output / "model")
    torch.manual_seed(seed)
    return Pretraining(build(tokens, 64, 2), tokens, args)


def test_a_resumed_pretraining_is_an_uninterrupted_one(texts, tmp_path):
    whole, part = (pretrained(pretraining(texts, tmp_path / name)) for name in ("whole", "part"))
    whole.train()
    batch = part.batch

    def stopped(step):
        if step == 2:
            raise KeyboardInterrupt
        return batch(step)

    part.batch = stopped
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = pretrained(part.args, seed=9)
    again.load()
    assert again.step == 2 and again.batch(3).shape == (3, 40)
    again.train()
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    saved = [stored(run.args.output) for run in (whole, again)]
    assert any(name.startswith("exp_avg_sq/") for name in saved[0])
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])


def test_autocast_is_told_the_kind_of_a_numbered_device(texts, tmp_path, monkeypatch):
    kinds, autocast = set(), torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: kinds.add(kind) or autocast(kind, **options))
    run = pretrained(pretraining(texts, tmp_path / "a", steps=1))
    assert run.args.device == "cpu:0"
    # In place of the model, which calls autocast itself
    run._compiled = lambda **given: argparse.Namespace(loss=run.model.lm_head.weight.sum())
    run.train()
    assert kinds == {"cpu"}


def test_pretraining_refuses_stale_tokens_and_another_run(texts, tmp_path):
    args = pretraining(texts, tmp_path / "a", steps=1)
    with pytest.raises(InvalidInputError, match=r"a' holds 1 token files already, .* remove them"):
        prepare([tmp_path / "a/text.txt.xz"], tmp_path / "a")
    pretrained(args).train()
    pretrained(pretraining(texts, tmp_path / "a", steps=1, save_every=9, eager=True, device="cpu")).load()
    with pytest.raises(InvalidInputError, match="in 'a' was made with steps 1, but this run has 4; name"):
        pretrained(pretraining(texts, tmp_path / "a")).load()
    np.save(tmp_path / "a/tokens/0001.npy", np.zeros(99, dtype=np.uint16))
    with pytest.raises(InvalidInputError, match=r"made with tokens \['0000\.npy"):
        pretrained(args).load()


def test_a_llama_is_pretrained_and_then_reads_groups(texts, tmp_path):
    """Route (b) from text to a model that ``from_pretrained`` loads."""
    pretrained(pretraining(texts, tmp_path / "llama")).train()
    model, tokens, settings = load_start(tmp_path / "llama/model")
    groups = GroupSampler(
        texts, [], nearest(texts), tokens, PromptEncoder(tokens, settings), end_id=tokens.eos_token_id,
        question_position=256, mixture=Mixture(), seed=1,
    )  # fmt: skip
    Run(model, tokens, settings, groups, STAGES[:1], arguments(tmp_path / "base")).train([])
    generator = KVFusionGenerator.from_pretrained(tmp_path / "base/model")
    assert generator.gate.passed and generator.settings == settings


def test_extended_positions_leave_the_old_ones_alone(tokenizer):
    model = network(tokenizer)
    ids = torch.arange(2000, 2030)[None]
    before = model(input_ids=ids).logits
    extend_positions(model, 1200)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert model(input_ids=torch.full((1, 1200), 2000)).logits.isfinite().all()


def test_the_warm_start_keeps_the_embedding_models_weights(tokenizer):
    model = warm_start(tokenizer)
    assert model.config.is_decoder and model.num_parameters() < 23e6
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
