"""``kvfusion train``: record, loss curve, and wrong input."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save
from tiny_training import SETTINGS, contents, rows

from kvfusion_rag import KVFusionGenerator, ModelLoadError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.training.curve import SMOOTHED_OVER, losses_figure, smoothed
from kvfusion_rag.training.progress import Progress


@pytest.fixture
def base(tmp_path) -> Path:
    write_rows(tmp_path / "train.jsonl.gz", rows(8))
    write_rows(tmp_path / "dev.jsonl", rows(3, seed=1))
    return save(tmp_path / "base", settings=SETTINGS)


def run(base: Path, *arguments: str | Path) -> int:
    folder = base.parent
    command = ["train", folder / "train.jsonl.gz", "--dev", folder / "dev.jsonl", "--model", base, "--output"]
    command += [folder / "out", "--batch-size", "4", "--rank", "4", "--eval-every", "2", *arguments]
    return main([str(part) for part in command])


def test_record_of_the_training_is_beside_the_decoder(base, tmp_path):
    assert run(base, "--max-steps", "2") == 0
    record = json.loads((tmp_path / "out" / "best" / "training.json").read_text())
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("train.jsonl.gz", "dev.jsonl")
    }
    assert record["files"]["rows"] == [{"name": "train.jsonl.gz", "sha256": digests["train.jsonl.gz"]}]
    assert record["files"]["dev"] == [{"name": "dev.jsonl", "sha256": digests["dev.jsonl"]}]
    assert record["config"]["rank"] == 4 and record["dtype"] == "float32" and record["trained_rows"] == 8
    assert record["rows"]["number"] == 8 and record["dev"]["number"] == 3
    assert record["settings"]["passage_length"] == SETTINGS.passage_length
    assert (
        record["base_model"]
        and record["base_weights"] == KVFusionGenerator.from_pretrained(base)._engine.model.backbone.weights_digest
    )
    assert {"kvfusion-rag", "torch", "transformers", "peft", "python"} <= record["run"]["versions"].keys()
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert record["run"]["commit"].removesuffix("-dirty") == commit.stdout.strip()
    assert str(tmp_path) not in json.dumps({key: value for key, value in record.items() if key != "run"})


def test_loss_curve_is_written_and_plotted_for_the_whole_run(base, tmp_path, capsys):
    assert run(base, "--max-steps", "2", "--plot", tmp_path / "curve.png") == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run(base, "--resume", "--max-steps", "3", "--epochs", "3", "--plot", tmp_path / "curve.svg") == 0
    assert (tmp_path / "curve.svg").read_text().rstrip().endswith("</svg>")
    lines = [line for line in capsys.readouterr().out.splitlines() if "exact match on dev" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"]
    assert all("(best 0.0 % at step 2)" in line for line in lines)
    curve = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert curve["steps"] == [1, 2, 3] and [score["step"] for score in curve["dev_exact_match_percent"]] == [2, 3]
    assert all(len(curve[name]) == 3 for name in ("losses_nats_per_token", "learning_rates", "seconds"))
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["best"] == {"step": 2, "value": 0.0}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 5000])
@pytest.mark.parametrize("scored", [False, True])
def test_steps_on_the_axis_of_the_plot_are_whole(steps, scored):
    progress = Progress(steps, [(step, 1.0) for step in range(1, steps + 1)], scores=[(steps, 50.0)] * scored)
    figure = losses_figure(progress, title="t")
    figure.canvas.draw()
    ticks = figure.axes[-1].get_xticks()
    assert len(ticks) and all(tick == round(tick) for tick in ticks)


def test_moving_average_of_a_constant_is_constant():
    assert smoothed([2.0] * 50) == [2.0] * 50
    assert smoothed([0.0, 1.0])[1] == pytest.approx(2 / (SMOOTHED_OVER + 1))


def test_plot_without_matplotlib_raises_before_training(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.evaluation.plots.find_spec", lambda name: None)
    assert run(base, "--plot", tmp_path / "curve.png") == 2
    assert '".[evaluation]"' in capsys.readouterr().err and not (tmp_path / "out").exists()


GOLD = {"text": "the mill is red", "gold": True}
ROW = {"id": "1", "question": "Of what colour is the mill?", "answers": ["red"], "passages": [GOLD]}
BAD_ROWS = [  # malformed rows are tested with the formats
    ("{", "line 2 is not JSON"),
    (ROW | {"passages": [{"text": "the mill is red"}]}, "line 2: no passage is gold"),
    (ROW | {"answers": ["blue"]}, "line 2: none of the answers .* is in its gold passage"),
    (ROW | {"answers": []}, "line 2: answers is empty, but a passage is gold"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_untrainable_row_is_one_error_and_nothing_is_written(base, tmp_path, capsys, row, message):
    line = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    before = contents(tmp_path)
    assert main(["train", str(tmp_path / "bad.jsonl"), "--model", str(base), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kvfusion: error: bad.jsonl, ")
    assert re.search(message, error), error
    assert contents(tmp_path) == before


def test_damaged_file_is_one_error(base, tmp_path, capsys):
    (tmp_path / "train.jsonl.gz").write_bytes(b"no gzip")
    assert run(base) == 2
    error = capsys.readouterr().err
    assert "train.jsonl.gz' cannot be read" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_previous_run_is_not_overwritten(base, tmp_path, capsys):
    assert run(base, "--max-steps", "1") == 0
    before = contents(tmp_path / "out")
    other = save(tmp_path / "other", settings=SETTINGS, seed=1)
    for arguments, message in [
        ((), "already contains a training run"),
        (("--resume", "--learning-rate", "1"), "made with learning_rate 0.0002, but this run has 1.0"),
        (("--resume", "--dtype", "bfloat16"), "another base model"),
        (("--resume", "--model", other), "another base model"),
        (("--resume", "--dev-limit", "1"), "3 dev rows, but the 1"),
    ]:
        assert run(base, *arguments) == 2, message
        assert message in capsys.readouterr().err and contents(tmp_path / "out") == before
    (tmp_path / "out" / "checkpoint").rename(tmp_path / "moved")
    assert run(base, "--resume") == 2 and "no checkpoint to resume from" in capsys.readouterr().err


def test_loss_curve_of_a_previous_run_is_kept(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "losses.json").write_text("mine")
    assert run(base, "--max-steps", "1") == 2 and "losses.json of a run" in capsys.readouterr().err
    assert (tmp_path / "out" / "losses.json").read_text() == "mine"


def test_folder_that_cannot_be_created_raises_before_the_model_is_loaded(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = ["train", tmp_path / "train.jsonl.gz", "--model", tmp_path / "absent", "--output"]
    assert main([str(one) for one in (*arguments, tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be used: Not a directory" in error and error.count("\n") == 1


def test_diverging_run_keeps_its_checkpoint(base, tmp_path, capsys):
    """The first step has a learning rate of 0, where the warm-up begins. The second has not."""
    arguments = ("--epochs", "4", "--max-steps", "4", "--warmup", "0.5", "--learning-rate", "1e30", "--eval-every")
    assert run(base, *arguments, "1") == 2
    error = capsys.readouterr().err
    assert re.search(r"after step 2 the logits are NaN or infinite.* learning_rate below 1e\+30", error), error
    assert "NaN" not in (tmp_path / "out" / "losses.json").read_text()
    assert json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())["progress"]["step"] == 1


def test_nan_loss_ends_the_run(base, tmp_path, capsys):
    assert run(base, "--epochs", "4", "--max-steps", "4", "--learning-rate", "1e30", "--eval-every", "4") == 2
    assert re.search(r"step 2 has a loss of nan .* learning_rate below 1e\+30", capsys.readouterr().err)
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--targets", "nowhere"), r"targets is \('nowhere',\)"), (("--seed", str(1 << 31)), "0 to 2,147,483,647")],
)
def test_settings_that_libraries_reject_are_one_error(base, capsys, arguments, message):
    assert run(base, "--max-steps", "1", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error


def test_plot_is_not_overwritten(base, tmp_path, capsys):
    (tmp_path / "loss.png").write_bytes(b"mine")
    assert run(base, "--max-steps", "1", "--plot", tmp_path / "loss.png") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "loss.png").read_bytes() == b"mine"
    assert not (tmp_path / "out").exists()


def test_dev_limit_applies_to_each_file(base, tmp_path):
    write_rows(tmp_path / "more.jsonl", rows(4, seed=2))
    assert (
        run(base, "--max-steps", "1", "--dev", tmp_path / "dev.jsonl", tmp_path / "more.jsonl", "--dev-limit", "2")
        == 0
    )
    assert json.loads((tmp_path / "out/best/training.json").read_text())["dev"]["number"] == 4


@pytest.mark.slow
def test_two_processes_print_one_object(base, tmp_path):
    arguments = ["train", tmp_path / "train.jsonl.gz", "--model", base, "--output", tmp_path / "out", "--json"]
    arguments += ["--max-steps", "2", "--batch-size", "2"]
    code = (
        "import sys, torch; torch.set_num_threads(1); from kvfusion_rag.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "script.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, tmp_path / "script.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["step"] == 2


@pytest.mark.parametrize("option", ["adapter", pytest.param("decoder", marks=pytest.mark.slow)])
def test_decoder_of_another_base_model_with_the_same_shape_is_rejected(base, tmp_path, caplog, option):
    assert run(base, "--max-steps", "1", *(["--full"] if option == "decoder" else [])) == 0
    tuned = {option: tmp_path / "out" / "best"}
    assert KVFusionGenerator.from_pretrained(base, **tuned)
    assert KVFusionGenerator.from_pretrained(base, dtype="bfloat16", **tuned)  # the same model with another digest
    assert "was trained on" not in caplog.text
    other = save(tmp_path / "third", settings=SETTINGS, seed=2)
    assert KVFusionGenerator.from_pretrained(other, dtype="bfloat16", **tuned)
    assert "in float32; the weights of 'third' in bfloat16 cannot be compared" in caplog.text
    with pytest.raises(ModelLoadError, match=r"'best' was trained on another base model: on 'base'.*'other' differ"):
        KVFusionGenerator.from_pretrained(save(tmp_path / "other", settings=SETTINGS, seed=1), **tuned)


def test_bfloat16_and_gradient_checkpointing_are_options(base, tmp_path):
    assert run(base, "--max-steps", "1", "--dtype", "bfloat16", "--gradient-checkpointing") == 0
    record = json.loads((tmp_path / "out" / "best" / "training.json").read_text())
    assert record["dtype"] == "bfloat16" and record["config"]["gradient_checkpointing"] is True


def test_command_makes_an_adapter_that_can_be_loaded(tmp_path, capsys):
    base = save(tmp_path / "model", settings=SETTINGS)
    write_rows(tmp_path / "train.jsonl.gz", rows(8))
    command = ["train", str(tmp_path / "train.jsonl.gz"), "--model", str(base), "--output", str(tmp_path / "out")]
    dev = ["--dev", str(tmp_path / "train.jsonl.gz"), "--dev-limit", "2"]
    assert main([*command, *dev, "--max-steps", "2", "--batch-size", "4", "--rank", "4", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["step"] == 2 and done["config"]["rank"] == 4 and len(done["scores"]) == 1
    gen = KVFusionGenerator.from_pretrained(base, adapter=tmp_path / "out" / "best")
    assert gen.settings.passage_length == SETTINGS.passage_length and gen.identity()["adapter"]
    assert main(command) == 2  # the output exists already
    assert "resume" in capsys.readouterr().err
    assert main([*command, *dev, "--resume", "--max-steps", "2", "--rank", "4", "--batch-size", "4"]) == 0
    assert main(["train", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "x")]) == 2
    (tmp_path / "bad.jsonl").write_text('{"question": "who?", "answers": "x", "passages": []}\n')
    assert main(["train", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "x"), "--model", str(base)]) == 2
    assert "bad.jsonl, line 1: answers" in capsys.readouterr().err
