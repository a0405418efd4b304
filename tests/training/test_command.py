"""``kvfusion train``: what it records, draws and refuses."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save

from kvfusion_rag import KVFusionGenerator, ModelLoadError
from kvfusion_rag.cli import main
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.training.curve import SMOOTHED_OVER, smoothed
from tests.training.test_training import SETTINGS, contents, rows


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


def test_what_made_a_decoder_stands_beside_it(base, tmp_path):
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
        and record["base_weights"] == KVFusionGenerator.from_pretrained(base)._backbone.weights_digest
    )
    assert {"kvfusion-rag", "torch", "transformers", "peft", "python"} <= record["run"]["versions"].keys()
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert record["run"]["commit"].removesuffix("-dirty") == commit.stdout.strip()
    assert str(tmp_path) not in json.dumps({key: value for key, value in record.items() if key != "run"})


def test_the_loss_curve_is_a_file_and_a_picture(base, tmp_path, capsys):
    assert run(base, "--max-steps", "5", "--epochs", "3", "--plot", tmp_path / "curve.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["step 2", "step 4", "step 5"]
    assert all("exact match on dev" in line and "(best 0.0 % at step 2)" in line for line in lines[:3])
    curve = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert curve["steps"] == [1, 2, 3, 4, 5] and [score["step"] for score in curve["dev_exact_match_percent"]] == [
        2,
        4,
        5,
    ]
    for name in ("losses_nats_per_token", "learning_rates", "seconds"):
        assert len(curve[name]) == 5
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["best"] == {"step": 2, "value": 0.0}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_that_of_the_whole_run_after_resuming(base, tmp_path):
    assert run(base, "--max-steps", "2") == 0
    assert run(base, "--resume", "--max-steps", "4", "--plot", tmp_path / "curve.svg") == 0
    assert json.loads((tmp_path / "out" / "losses.json").read_text())["steps"] == [1, 2, 3, 4]
    assert (tmp_path / "curve.svg").read_text().rstrip().endswith("</svg>")


def test_the_mean_of_a_constant_is_that_constant():
    assert smoothed([2.0] * 50) == [2.0] * 50
    assert smoothed([0.0, 1.0])[1] == pytest.approx(2 / (SMOOTHED_OVER + 1))


def test_a_plot_without_matplotlib_is_one_error_before_training(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvfusion_rag.evaluation.plots.find_spec", lambda name: None)
    assert run(base, "--plot", tmp_path / "curve.png") == 2
    assert "kvfusion-rag[evaluation]" in capsys.readouterr().err and not (tmp_path / "out").exists()


GOLD = {"text": "the mill is red", "gold": True}
ROW = {"id": "1", "question": "Of what colour is the mill?", "answers": ["red"], "passages": [GOLD]}
BAD_ROWS = [
    ("{", "line 2 is not JSON"),
    ([1], "line 2 holds a list"),
    (ROW | {"question": " "}, "line 2: question"),
    (ROW | {"answers": "red"}, "line 2: answers is 'red'"),
    (ROW | {"answers": [" "]}, "line 2: answers .* must not be blank"),
    (ROW | {"passages": [{"title": "x"}]}, "line 2: passage 1: text"),
    (ROW | {"passages": [GOLD | {"gold": "yes"}]}, "line 2: passage 1: gold"),
    (ROW | {"evidence": 1}, "line 2: evidence"),
    (ROW | {"passages": [{"text": "the mill is red"}]}, "line 2: no passage is gold"),
    (ROW | {"answers": ["blue"]}, "line 2: none of the answers .* stands in its gold passage"),
    (ROW | {"answers": []}, "line 2: answers is empty, but a passage is gold"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_row_that_teaches_nothing_is_one_error_and_nothing_is_written(base, tmp_path, capsys, row, message):
    line = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    before = contents(tmp_path)
    assert main(["train", str(tmp_path / "bad.jsonl"), "--model", str(base), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kvfusion: error: bad.jsonl, ")
    assert re.search(message, error), error
    assert contents(tmp_path) == before


def test_a_damaged_file_is_one_error(base, tmp_path, capsys):
    (tmp_path / "train.jsonl.gz").write_bytes(b"no gzip")
    assert run(base) == 2
    error = capsys.readouterr().err
    assert "train.jsonl.gz cannot be read" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_nothing_of_a_former_run_is_overwritten(base, tmp_path, capsys):
    assert run(base, "--max-steps", "1") == 0
    before = contents(tmp_path / "out")
    other = save(tmp_path / "other", settings=SETTINGS, seed=1)
    for arguments, message in [
        ((), "holds a training run already"),
        (("--resume", "--learning-rate", "1"), "made with learning_rate 0.0002, but this run has 1.0"),
        (("--resume", "--dtype", "bfloat16"), "another base model"),
        (("--resume", "--model", other), "another base model"),
        (("--resume", "--dev-limit", "1"), "3 dev rows, and the 1"),
    ]:
        assert run(base, *arguments) == 2, message
        assert message in capsys.readouterr().err and contents(tmp_path / "out") == before
    (tmp_path / "out" / "checkpoint").rename(tmp_path / "moved")
    assert run(base, "--resume") == 2 and "no checkpoint to go on from" in capsys.readouterr().err


def test_a_curve_of_a_former_run_is_kept(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "losses.json").write_text("mine")
    assert run(base, "--max-steps", "1") == 2 and "losses.json of a run" in capsys.readouterr().err
    assert (tmp_path / "out" / "losses.json").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_told_before_the_model_is_loaded(base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = ["train", tmp_path / "train.jsonl.gz", "--model", tmp_path / "absent", "--output"]
    assert main([str(one) for one in (*arguments, tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be made: Not a directory" in error and error.count("\n") == 1


def test_a_run_that_diverges_ends_with_its_checkpoint_whole(base, tmp_path, capsys):
    """The first step's rate is 0, for the warm-up begins there; the second one's is not."""
    arguments = ("--epochs", "4", "--max-steps", "4", "--warmup", "0.5", "--learning-rate", "1e30", "--eval-every")
    assert run(base, *arguments, "1") == 2
    error = capsys.readouterr().err
    assert re.search(r"step 2 has left weights whose logits are no numbers.* learning_rate below 1e\+30", error), error
    assert "NaN" not in (tmp_path / "out" / "losses.json").read_text()
    assert json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())["progress"]["step"] == 1


def test_a_loss_that_is_no_number_ends_the_run(base, tmp_path, capsys):
    assert run(base, "--epochs", "4", "--max-steps", "4", "--learning-rate", "1e30", "--eval-every", "4") == 2
    assert re.search(r"step 2 has a loss of nan .* learning_rate below 1e\+30", capsys.readouterr().err)
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--targets", "nowhere"), r"targets is \('nowhere',\)"), (("--seed", str(1 << 31)), "0 to 2,147,483,647")],
)
def test_settings_that_no_library_takes_are_one_error(base, capsys, arguments, message):
    assert run(base, "--max-steps", "1", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error


def test_a_picture_is_not_drawn_over_another(base, tmp_path, capsys):
    (tmp_path / "loss.png").write_bytes(b"mine")
    assert run(base, "--max-steps", "1", "--plot", tmp_path / "loss.png") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "loss.png").read_bytes() == b"mine"
    assert not (tmp_path / "out").exists()


def test_the_dev_limit_is_of_each_file(base, tmp_path):
    write_rows(tmp_path / "more.jsonl", rows(4, seed=2))
    assert (
        run(base, "--max-steps", "1", "--dev", tmp_path / "dev.jsonl", tmp_path / "more.jsonl", "--dev-limit", "2")
        == 0
    )
    assert json.loads((tmp_path / "out/best/training.json").read_text())["dev"]["number"] == 4


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


@pytest.mark.parametrize("option", ["adapter", "decoder"])
def test_what_was_trained_on_another_base_model_of_the_same_shape_is_refused(base, tmp_path, caplog, option):
    assert run(base, "--max-steps", "1", *(["--full"] if option == "decoder" else [])) == 0
    tuned = {option: tmp_path / "out" / "best"}
    assert KVFusionGenerator.from_pretrained(base, **tuned)
    assert KVFusionGenerator.from_pretrained(base, dtype="bfloat16", **tuned)  # another digest, the same model
    assert "was trained on" not in caplog.text
    other = save(tmp_path / "third", settings=SETTINGS, seed=2)
    assert KVFusionGenerator.from_pretrained(other, dtype="bfloat16", **tuned)
    assert "in float32; the weights of 'third' in bfloat16 cannot be compared" in caplog.text
    with pytest.raises(ModelLoadError, match=r"'best' was trained on another base model: on 'base'.*'other' differ"):
        KVFusionGenerator.from_pretrained(save(tmp_path / "other", settings=SETTINGS, seed=1), **tuned)


def test_bfloat16_and_checkpoints_from_the_command_line(base, tmp_path):
    assert run(base, "--max-steps", "1", "--dtype", "bfloat16", "--gradient-checkpointing") == 0
    record = json.loads((tmp_path / "out" / "best" / "training.json").read_text())
    assert record["dtype"] == "bfloat16" and record["config"]["gradient_checkpointing"] is True
