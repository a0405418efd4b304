"""Checkpoints: a resumed run equals an uninterrupted one, and checkpoints of other runs are rejected."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import SETTINGS, contents, engine, rows, shared, train_interrupted, trainer

from kvfusion_rag import InvalidInputError, ModelLoadError
from kvfusion_rag.engine.engine import Engine, EngineOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.training.checkpoint import load_record, recover
from kvfusion_rag.training.record import require_same_run


@pytest.mark.parametrize(
    ("full", "dtype"),
    [
        (False, torch.float32),
        (True, torch.bfloat16),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(True, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, full, dtype):
    options = {"eval_every": 2, "max_steps": 4, "full": full, "dropout": 0.1 if not full else 0.0}

    def run(name):
        return trainer(tmp_path / name, engine(full=full, dtype=dtype), rows(12), **options)

    whole = run("whole").run()
    train_interrupted(run("cut"))
    resumed = run("cut").run(resume=True)
    assert resumed.losses == whole.losses and len(resumed.losses) == 4
    assert resumed.learning_rates == whole.learning_rates
    finals = [load_file(tmp_path / name / "run" / "checkpoint" / "optimizer.safetensors") for name in ("whole", "cut")]
    assert finals[0].keys() == finals[1].keys() and all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss": "distill"}, {"gradient_checkpointing": True}], ids=str)
def test_resumed_run_with_options_equals_an_uninterrupted_one(tmp_path, options):
    options |= {"dropout": 0.1, "eval_every": 2, "max_steps": 4}
    whole = trainer(tmp_path / "whole", engine(), rows(8), **options).run()
    train_interrupted(trainer(tmp_path / "cut", engine(), rows(8), **options))
    assert trainer(tmp_path / "cut", engine(), rows(8), **options).run(resume=True).losses == whole.losses


def test_resumed_run_over_shared_documents_equals_an_uninterrupted_one(tmp_path):
    data, options = shared([3, 2, 4, 1, 5]), {"eval_every": 2, "max_steps": 4, "dropout": 0.1, "epochs": 3}
    whole = trainer(tmp_path / "whole", engine(), data, **options).run()
    train_interrupted(trainer(tmp_path / "cut", engine(), data, **options))
    assert trainer(tmp_path / "cut", engine(), data, **options).run(resume=True).losses == whole.losses


def test_checkpoint_of_another_run_is_rejected_and_kept(tmp_path):
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
        ({"data": rows(9)}, InvalidInputError, "8 training rows, but the 9"),
        ({"data": rows(8)[::-1]}, InvalidInputError, "8 training rows, but the 8"),
        ({"dev": rows(2)}, InvalidInputError, "0 dev rows, but the 2"),
    ]:
        with pytest.raises(error, match=message):
            run(**changed).run(resume=True)
    (tmp_path / "run" / "checkpoint" / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="cannot read the checkpoint"):
        run(max_steps=2).run(resume=True)
    assert contents(tmp_path / "run") == before | {"checkpoint/optimizer.safetensors": b"damaged"}


def test_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It has neither loss nor layout, which were today's defaults."""
    run = trainer(tmp_path, engine(), rows(8), max_steps=1)
    run.run()
    record = load_record(Path(run.output) / "checkpoint")
    for name in ("loss", "layout"):
        del record["config"][name]
    require_same_run(record, run._record)
    other = json.loads(json.dumps(run._record, default=str))
    other["config"]["loss"] = "distill"
    with pytest.raises(InvalidInputError, match="loss 'answer'"):
        require_same_run(record, other)


def test_resumed_run_can_be_longer_but_not_shorter(tmp_path):
    short = {"epochs": 1, "eval_every": 2, "batch_size": 2}
    assert trainer(tmp_path, engine(), rows(8), **short).run().step == 4
    longer = trainer(tmp_path, engine(), rows(8), epochs=3, eval_every=3, batch_size=2).run(resume=True)
    assert longer.step == 12 and len(longer.losses) == 12 and [s for s, _ in longer.seconds] == list(range(1, 13))
    assert longer.learning_rates[3][1] < 1e-3 < longer.learning_rates[4][1]  # from here on the longer schedule
    assert [seconds for _, seconds in longer.seconds] == sorted(seconds for _, seconds in longer.seconds)
    with pytest.raises(InvalidInputError, match="is at step 12, but this run ends after 8"):
        trainer(tmp_path, engine(), rows(8), epochs=2, batch_size=2).run(resume=True)


@pytest.mark.parametrize("left", [("new", "old"), ("old",)], ids=str)
def test_run_killed_between_two_renames_is_resumed(tmp_path, left):
    folder = tmp_path / "run" / "checkpoint"
    trainer(tmp_path, engine(), rows(8), max_steps=2).run()
    for suffix in left:
        shutil.copytree(folder, folder.with_name(f"checkpoint.{suffix}"))
    if left == ("old",):  # killed while the new one was written
        (tmp_path / "run" / "checkpoint.new").mkdir()
    shutil.rmtree(folder)
    recover(folder)
    assert trainer(tmp_path, engine(), rows(8), max_steps=3).run(resume=True).step == 3


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch, tiny_training as t
torch.set_num_threads(1)
out = Path(sys.argv[1])
run = t.trainer(out, t.engine(), t.rows(10), max_steps=3, batch_size=int(sys.argv[2]), rank=4)
progress = run.run()
if run._processes.is_main_process:
    print([loss for _, loss in progress.losses])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_one_and_two_processes_make_equal_steps(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests' / 'helpers'}"}
    found = []
    for processes, batch_size in ((1, 4), (2, 2)):
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, *launch, str(script), str(tmp_path / str(processes)), str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)  # sums over processes have another order
