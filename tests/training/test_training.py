"""Training: the loss is that of one block-masked pass, the gradient reaches Dt alone, runs can be taken up again."""

import copy
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, backbone, save, tokenizer
from torch.nn.functional import cross_entropy

from kvfusion_rag import InvalidInputError, KVFusionGenerator, MemoryStore, ModelLoadError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import Passage, QARow, write_rows
from kvfusion_rag.engine.document_kvs import Scope
from kvfusion_rag.engine.engine import Engine, EngineOptions
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.positions import block_mask, fused_positions
from kvfusion_rag.text.encoder import PromptEncoder
from kvfusion_rag.text.settings import ModelSettings
from kvfusion_rag.training.checkpoint import recover
from kvfusion_rag.training.config import TrainingConfig, preset
from kvfusion_rag.training.examples import collate, encode_row
from kvfusion_rag.training.loss import fusion_loss
from kvfusion_rag.training.trainer import Trainer

VOCABULARY = WORDS.split()
SETTINGS = ModelSettings(prefix="<|im_start|>", document_template="{text}\n", passage_length=24, max_new_tokens=8)
ARCHITECTURES = ("llama", "qwen3", "gpt2", "bert")


def rows(number: int, passages: int = 3, seed: int = 0) -> list[QARow]:
    """Rows whose gold passage says of what colour a thing is, among passages about other things."""
    rng = random.Random(seed)
    made = []
    for i in range(number):
        colour = rng.choice(["red", "blue", "green", "grey"])
        others = [Passage(" ".join(rng.choices(VOCABULARY, k=6))) for _ in range(passages - 1)]
        both = [*others, Passage(f"thing {i} is {colour}", gold=True)]
        rng.shuffle(both)
        made.append(
            QARow(str(i), f"of what colour is thing {i}", (colour,), tuple(both), evidence=f"thing {i} is {colour}")
        )
    return made


def engine(
    architecture: str = "llama",
    *,
    store: MemoryStore | None = None,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> Engine:
    base = backbone(architecture, dtype, settings=SETTINGS, **changes)
    decoder = None
    if full:
        decoder = Backbone(copy.deepcopy(base.model), base.tokenizer, SETTINGS, model_id="decoder")
    return Engine(TorchModel(base, decoder), SETTINGS, store=store, options=EngineOptions(max_fused_tokens=100_000))


def batch_of(made: Engine, data: list[QARow], **options):
    options = {"evidence": False, "joined": False} | options
    return collate([encode_row(row, made, end_id=made.model.decoder.end_id, **options) for row in data])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_that_of_one_block_masked_pass(architecture):
    made = engine(architecture)
    for row in rows(3):
        batch = batch_of(made, [row])
        ((example,),) = batch.groups
        documents, read = list(example.documents.values()), list(example.read)
        lengths, prefix = [len(d) for d in documents], list(made.encoder.prefix_ids)
        ids = [*prefix, *(i for d in documents for i in d), *read]
        logits = made.model.backbone.model(
            input_ids=torch.tensor([ids]),
            position_ids=fused_positions(len(prefix), lengths, example.start, len(read))[None],
            attention_mask=block_mask(len(prefix), lengths, len(read))[None, None],
        ).logits[0]
        target = torch.tensor(example.target)
        expected = cross_entropy(logits[-len(target) :], target, reduction="sum")
        torch.testing.assert_close(fusion_loss(made, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_is_the_sum_of_its_rows_fused_and_joined(architecture):
    made = engine(architecture)
    data = [*rows(4), QARow("none", "who", (), ())]
    for joined in (False, True):
        together = fusion_loss(made, batch_of(made, data, joined=joined))
        singles = sum(fusion_loss(made, batch_of(made, [row], joined=joined)) for row in data)
        torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-3)


def test_only_answer_tokens_and_the_end_are_trained():
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


def test_stored_and_computed_documents_give_the_same_loss_and_gradients():
    gradients = []
    for store in (None, MemoryStore()):
        made = engine(store=store)
        made.model.decoder.model.requires_grad_(True)
        for _ in range(2):  # the second pass reads from the store, if there is one
            made.model.decoder.model.zero_grad()
            fusion_loss(made, batch_of(made, rows(4))).backward()
        gradients.append([p.grad.clone() for p in made.model.decoder.model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_documents_are_prefilled_without_dropout_while_the_same_model_is_trained(architecture):
    made, ids = engine(architecture), {"k": (20, 30, 40)}
    expected = made.document_kvs.get(ids, Scope(made.encoder.prefix_ids))["k"]
    made.model.decoder.model.train()
    assert torch.equal(made.document_kvs.get(ids, Scope(made.encoder.prefix_ids))["k"].values, expected.values)
    assert made.model.decoder.model.training


def trainer(tmp_path: Path, made: Engine, data: list[QARow], dev: list[QARow] | None = None, **config) -> Trainer:
    settings = {"batch_size": 4, "learning_rate": 2e-3, "epochs": 50, "dropout": 0.0} | config
    return Trainer(made, data, dev or [], TrainingConfig(**settings), tmp_path / "run")


def test_gradient_reaches_the_adapter_alone_and_prefill_stays_frozen(tmp_path):
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
        assert kept is not None and torch.equal(kept, weight), name
    assert any(not torch.equal(p, started[n]) for n, p in run.weights.items())
    assert torch.equal(made.document_kvs.get({"k": (20, 30, 40)}, Scope(made.encoder.prefix_ids))["k"].keys, kv.keys)


def test_full_training_changes_the_decoder_and_not_the_prefill_model(tmp_path):
    made = engine(full=True)
    before = {n: p.clone() for n, p in made.model.backbone.model.named_parameters()}
    trainer(tmp_path, made, rows(8), max_steps=2, full=True).run()
    assert all(torch.equal(p, before[n]) for n, p in made.model.backbone.model.named_parameters())
    changed = [n for n, p in made.model.decoder.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > len(before) / 2


def test_a_run_learns_and_what_it_saves_answers_like_the_trainer(tmp_path):
    """Eight rows of one gold passage and three others, learned by heart."""
    base = save(tmp_path / "base", settings=SETTINGS)
    data = rows(8, passages=4)
    for full in (False, True):
        loaded = KVFusionGenerator.from_pretrained(base)._engine.model.backbone
        decoder = KVFusionGenerator.from_pretrained(base)._engine.model.backbone if full else None
        made = Engine(
            loaded, loaded.settings, store=MemoryStore(), namespace="", max_fused_tokens=100_000, tokens_per_pass=None,
            decoder=decoder,
        )  # fmt: skip
        run = Trainer(
            made, data, data,
            TrainingConfig(
                full=full, batch_size=8, epochs=60, learning_rate=3e-3 if full else 1e-2,
                dropout=0.0, rank=32, eval_every=30,
            ),
            tmp_path / f"full-{full}",
        )  # fmt: skip
        progress = run.run()
        # A random frozen head bounds how sure an adapter can become: 0.57 nats a token at the best.
        assert progress.losses[-1][1] < (0.05 if full else 0.6) < progress.losses[0][1]
        assert progress.best == 100.0
        options = (
            {"decoder": tmp_path / f"full-{full}" / "best"}
            if full
            else {"adapter": tmp_path / f"full-{full}" / "best"}
        )
        gen = KVFusionGenerator.from_pretrained(base, **options)
        answers = [gen.answer(row.question, [p.text for p in row.passages]).text for row in data]
        assert answers == [row.answers[0] for row in data]
        record = json.loads((tmp_path / f"full-{full}" / "best" / "training.json").read_text())
        assert record["base_weights"] == loaded.weights_digest and record["config"]["full"] is full


def test_what_was_trained_on_joined_prompts_answers_in_concat_and_nothing_else_does(tmp_path):
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


def test_dev_rows_are_answered_in_the_mode_that_is_trained(tmp_path, caplog):
    caplog.set_level("INFO")
    for share, mode in ((0.0, "fusion"), (0.5, "fusion"), (1.0, "concat")):
        caplog.clear()
        trainer(tmp_path / mode / str(share), engine(), rows(4), rows(2), max_steps=1, joined_share=share).run()
        assert {r.message.split(" (")[0] for r in caplog.records if r.message.startswith("mode ")} == {f"mode {mode}"}


def test_a_tuned_decoder_that_read_joined_prompts_alone_says_so_in_mode_fusion(caplog):
    made = engine(full=True)
    made.settings = dataclasses.replace(SETTINGS, mode="concat", tuned_concat=True)
    made.request("who", ["a"], None, "fusion", DecodingOptions(4))
    assert "its own mode is 'concat'" in caplog.text


@pytest.mark.parametrize("kind", ["byte-bpe", "unigram", "bpe-byte-fallback", "wordpiece"])
def test_evidence_can_be_told_from_the_answer(kind):
    encoder = PromptEncoder(tokenizer(kind), SETTINGS)
    mark = encoder.evidence_mark
    whole = encoder.decode(list(encoder.encode_answer(f"red{SETTINGS.evidence_separator}thing 1 is red")))
    assert mark is not None and whole.split(mark)[0].strip() == "red"


def test_evidence_that_could_not_be_told_from_the_answer_is_refused(tmp_path):
    made = engine()
    made.prompts.encoder = PromptEncoder(
        made.model.backbone.tokenizer, dataclasses.replace(SETTINGS, evidence_separator=" | ")
    )
    with pytest.raises(InvalidInputError, match="evidence_separator"):
        trainer(tmp_path, made, rows(2), evidence=True)


def test_answers_of_a_decoder_that_was_trained_on_evidence_end_before_it(tmp_path):
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
    (whole,) = run._engine.answer_all([request], options)
    assert whole.text == f"{data[0].answers[0]}\nEvidence: {data[0].evidence}"
    assert json.loads((tmp_path / "run/best/kvfusion.json").read_text())["tuned_evidence"]


def test_the_answer_that_is_trained_stands_in_the_gold_passage():
    made, passages = engine(), (Passage("made in the United States", gold=True), Passage("USA"))
    batch = batch_of(made, [QARow("1", "where", ("USA", "United States"), passages)])
    text = made.encoder.decode([i for i in batch.labels[0].tolist() if i != -100])
    assert text.strip() == "United States"


@pytest.mark.slow
def test_thirty_two_rows_of_one_gold_passage_and_nineteen_others_are_learned_by_heart(tmp_path):
    data = rows(32, passages=20)
    options = {"batch_size": 8, "epochs": 60, "learning_rate": 1e-2, "rank": 32, "eval_every": 40}
    run = trainer(tmp_path, engine(store=MemoryStore()), data, data, **options)
    assert run.run().best == 100.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_run_taken_up_again_goes_on_as_if_it_had_not_stopped(tmp_path, full, dtype):
    options = {"eval_every": 3, "max_steps": 6, "full": full, "dropout": 0.1 if not full else 0.0}

    def run(name):
        return trainer(tmp_path / name, engine(full=full, dtype=dtype), rows(20), **options)

    whole = run("whole").run()
    with pytest.raises(KeyboardInterrupt):
        run("cut").run(report=lambda progress: (_ for _ in ()).throw(KeyboardInterrupt))  # after step 3
    again = run("cut").run(resume=True)
    assert again.losses == whole.losses and len(again.losses) == 6
    assert again.learning_rates == whole.learning_rates
    finals = [load_file(tmp_path / name / "run" / "checkpoint" / "optimizer.safetensors") for name in ("whole", "cut")]
    assert finals[0].keys() == finals[1].keys() and all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    def run(made=None, data=None, dev=None, **changes):
        options = {"max_steps": 1, "rank": 4} | changes
        return trainer(tmp_path, made or engine(), data or rows(8), dev, **options)

    run().run()
    before = contents(tmp_path / "run")
    other = engine(initializer_range=0.5)  # the same shapes
    with torch.no_grad():
        other.model.backbone.model.get_input_embeddings().weight += 1
    twin = Backbone(other.model.backbone.model, other.model.tokenizer, SETTINGS, model_id="twin")
    other = Engine(TorchModel(twin), SETTINGS, store=None, options=EngineOptions(max_fused_tokens=100_000))
    for changed, error, message in [
        ({"made": other}, ModelLoadError, "another base model: .*'tiny-llama'.*'twin'"),
        ({"made": engine(dtype=torch.bfloat16)}, ModelLoadError, r"another base model: .*\(float32\).*\(bfloat16\)"),
        ({"rank": 8}, InvalidInputError, "made with rank 4, but this run has 8"),
        ({"learning_rate": 1e-5}, InvalidInputError, "learning_rate"),
        ({"data": rows(9)}, InvalidInputError, "8 training rows, and the 9"),
        ({"data": rows(8)[::-1]}, InvalidInputError, "8 training rows, and the 8"),
        ({"dev": rows(2)}, InvalidInputError, "0 dev rows, and the 2"),
    ]:
        with pytest.raises(error, match=message):
            run(**changed).run(resume=True)
    (tmp_path / "run" / "checkpoint" / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="cannot read the checkpoint"):
        run(max_steps=2).run(resume=True)
    assert contents(tmp_path / "run") == before | {"checkpoint/optimizer.safetensors": b"damaged"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_may_go_on_for_longer_but_not_for_less_than_it_did(tmp_path):
    short = {"epochs": 1, "eval_every": 2}
    assert trainer(tmp_path, engine(), rows(16), **short).run().step == 4
    longer = trainer(tmp_path, engine(), rows(16), epochs=3, eval_every=3).run(resume=True)
    assert longer.step == 12 and len(longer.losses) == 12 and [s for s, _ in longer.seconds] == list(range(1, 13))
    assert longer.learning_rates[3][1] < 1e-3 < longer.learning_rates[4][1]  # the longer schedule's from here on
    assert [seconds for _, seconds in longer.seconds] == sorted(seconds for _, seconds in longer.seconds)
    with pytest.raises(InvalidInputError, match="has made 12 steps already, but this run ends after 8"):
        trainer(tmp_path, engine(), rows(16), epochs=2).run(resume=True)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch, test_training as t
torch.set_num_threads(1)
out = Path(sys.argv[1])
run = t.trainer(out, t.engine(), t.rows(10), max_steps=3, batch_size=int(sys.argv[2]), rank=4)
progress = run.run()
if run._processes.is_main_process:
    print([loss for _, loss in progress.losses])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_one_process_and_two_make_the_same_steps(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    found = []
    for processes, batch_size in ((1, 4), (2, 2)):
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, *launch, str(script), str(tmp_path / str(processes)), str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)  # sums over processes are added up in another order


def test_rows_that_do_not_fit_are_left_out_and_named(tmp_path, caplog):
    long = QARow("long", "who? " * 300, ("red",), rows(1)[0].passages)
    run = trainer(tmp_path, engine(), [*rows(2), long])
    assert len(run.examples) == 2 and "long" in caplog.text
    with pytest.raises(InvalidInputError, match="not one of the 1 rows"):
        trainer(tmp_path, engine(), [long])


def test_a_dev_row_that_does_not_fit_counts_as_wrong_and_ends_no_run(tmp_path, caplog):
    data = rows(4)
    long = QARow("long", "who? " * 300, ("red",), data[0].passages)
    run = trainer(tmp_path, engine(store=MemoryStore()), data, [*data, long], rank=32, epochs=60, learning_rate=1e-2)
    assert "1 of 5 dev rows do not fit" in caplog.text
    assert run.run().best == 80.0


@pytest.mark.parametrize("left", [("new", "old"), ("old",)], ids=str)
def test_a_run_killed_between_two_renames_goes_on(tmp_path, left):
    folder = tmp_path / "run" / "checkpoint"
    trainer(tmp_path, engine(), rows(8), max_steps=2).run()
    for suffix in left:
        shutil.copytree(folder, folder.with_name(f"checkpoint.{suffix}"))
    if left == ("old",):  # killed while the fresh one was being written
        (tmp_path / "run" / "checkpoint.new").mkdir()
    shutil.rmtree(folder)
    recover(folder)
    assert trainer(tmp_path, engine(), rows(8), max_steps=3).run(resume=True).step == 3


def test_lora_and_full_need_the_right_decoder(tmp_path):
    with pytest.raises(InvalidInputError, match="full training needs"):
        trainer(tmp_path, engine(), rows(2), full=True)
    with pytest.raises(InvalidInputError, match="full training needs"):
        trainer(tmp_path, engine(full=True), rows(2))


@pytest.mark.parametrize(
    "wrong", [{"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}, {"weight_decay": -1.0}, {"seed": -1}, {"dropout": 2.0}]
)
def test_settings_that_would_train_nothing_or_backwards_are_refused(wrong):
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


def test_the_train_command_makes_an_adapter_that_ask_and_evaluate_take(tmp_path, capsys):
    base = save(tmp_path / "model", settings=SETTINGS)
    write_rows(tmp_path / "train.jsonl.gz", rows(8))
    command = ["train", str(tmp_path / "train.jsonl.gz"), "--model", str(base), "--output", str(tmp_path / "out")]
    dev = ["--dev", str(tmp_path / "train.jsonl.gz"), "--dev-limit", "2"]
    assert main([*command, *dev, "--max-steps", "2", "--batch-size", "4", "--rank", "4", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["step"] == 2 and done["config"]["rank"] == 4 and len(done["scores"]) == 1
    gen = KVFusionGenerator.from_pretrained(base, adapter=tmp_path / "out" / "best")
    assert gen.settings.passage_length == SETTINGS.passage_length and gen.identity()["adapter"]
    assert main(command) == 2  # the output is there already, and nothing of it is lost
    assert "resume" in capsys.readouterr().err
    assert main([*command, *dev, "--resume", "--max-steps", "2", "--rank", "4", "--batch-size", "4"]) == 0
    assert main(["train", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "x")]) == 2
    (tmp_path / "bad.jsonl").write_text('{"question": "who?", "answers": "x", "passages": []}\n')
    assert main(["train", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "x"), "--model", str(base)]) == 2
    assert "bad.jsonl, line 1: answers" in capsys.readouterr().err
