"""Several processes train as one, or are refused: unconnected launches, shards, disagreement, and a shared folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save
from tiny_training import SETTINGS, contents, rows

from kvfusion_rag import InvalidInputError
from kvfusion_rag.data.rows import write_rows
from kvfusion_rag.training import TrainingConfig, train
from kvfusion_rag.training.processes import require_connected, require_own_shards

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    "environment",
    [
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},  # accelerate launch --cpu --num_machines 2
        {"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "2", "RANK": "1"},  # a job of Kubernetes without torchrun
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "16"},
        {"MV2_COMM_WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_announced_processes_that_are_not_connected_are_refused(environment):
    with pytest.raises(InvalidInputError, match=r"connected to .*torchrun"):
        require_connected(1, environment)
    require_connected(2, environment)


@pytest.mark.parametrize(
    "environment",
    [{}, {"ACCELERATE_USE_CPU": "True"}, {"MASTER_ADDR": "localhost", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}],
    ids=str,
)
def test_one_process_alone_may_train(environment):
    require_connected(1, environment)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launch_that_asks_for_shards_is_refused(name, tmp_path, monkeypatch):
    require_own_shards({f"ACCELERATE_USE_{name}": "false"})
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InvalidInputError, match=f"ACCELERATE_USE_{name} is 'true', but only shard_weights"):
        train(rows(4), output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_second_run_into_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    base = save(tmp_path / "base", settings=SETTINGS)
    refused = []

    def run(report=None, **options):
        config = TrainingConfig(batch_size=4, rank=4, eval_every=1, **options)
        return train(rows(8), output=tmp_path / "out", model=base, config=config, resume=True, report=report)

    def run_again(progress):
        before = contents(tmp_path / "out")
        with pytest.raises(InvalidInputError, match="is in use by another training run"):
            run(max_steps=9)
        assert contents(tmp_path / "out") == before
        refused.append(progress.step)

    assert run(run_again, max_steps=2).step == 2 and refused == [1, 2]
    assert run(max_steps=3).step == 3


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Options of ``kvfusion train`` with a global batch of four rows in two processes."""
    save(tmp_path / "base", settings=SETTINGS)
    write_rows(tmp_path / "rows.jsonl", rows(10))
    options = {"--model": tmp_path / "base", "--max-steps": 3, "--batch-size": 2, "--rank": 4, "--dropout": 0}
    return [
        "train",
        str(tmp_path / "rows.jsonl"),
        "--device",
        "cpu",
        *(str(x) for pair in options.items() for x in pair),
    ]


def launch(*commands: list[str], environment: dict[str, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at the same time, as on several machines."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, text=True, env=variables, **pipes) for command in commands]
    done = [process.communicate(timeout=200) for process in running]
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p, out in zip(running, done, strict=True)]


def machines(command: list[str]) -> list[list[str]]:
    """Return the commands of torchrun for a process on each of two machines, here both on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [[*TORCHRUN, *shared, f"--node-rank={rank}", *command] for rank in range(2)]


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())["losses_nats_per_token"]


@pytest.mark.slow
def test_two_machines_train_as_one_process(arguments, tmp_path):
    (one,) = launch(
        [sys.executable, "-m", "kvfusion_rag.cli", *arguments, "--batch-size", "4", "--output", str(tmp_path / "1")]
    )
    assert one.returncode == 0, one.stderr[-2000:]
    command = ["-m", "kvfusion_rag.cli", *arguments, "--output", str(tmp_path / "2")]
    for done in launch(*machines(command)):
        assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)  # sums have another order


@pytest.mark.slow
def test_unconnected_launch_of_accelerate_is_refused(arguments, tmp_path):
    """``accelerate launch --cpu`` for two machines starts two processes that know nothing of each other."""
    cluster = [
        "--cpu",
        "--num_machines=2",
        "--num_processes=2",
        "--main_process_ip=127.0.0.1",
        "--main_process_port=29999",
    ]
    commands = [
        [sys.executable, "-m", "accelerate.commands.launch", *cluster, f"--machine_rank={rank}", "-m",
         "kvfusion_rag.cli", *arguments, "--output", str(tmp_path / str(rank))]
        for rank in range(2)
    ]  # fmt: skip
    for done in launch(*commands):
        assert done.returncode != 0 and "not be connected to the others" in done.stderr
    assert not (tmp_path / "0").exists() and not (tmp_path / "1").exists()


@pytest.mark.slow
def test_connected_processes_that_disagree_are_refused(arguments, tmp_path):
    command = ["-m", "kvfusion_rag.cli", *arguments, "--resume", "--output"]
    (one,) = launch(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", *command, str(tmp_path / "0"), "--max-steps", "1"]
    )
    assert one.returncode == 0, one.stderr[-2000:]
    pair = machines([])  # the second machine does not see the folder of the first, which has a checkpoint
    for done in launch(*([*pair[rank], *command, str(tmp_path / str(rank))] for rank in range(2))):
        assert done.returncode != 0 and "step is 0 in process 1, but 1 in process 0" in done.stderr


@pytest.mark.slow
def test_shards_in_only_one_of_two_processes_are_refused(arguments, tmp_path):
    pair = machines(["-m", "kvfusion_rag.cli", *arguments, "--output", str(tmp_path / "out")])
    for done in launch([*pair[0], "--shard-weights"], pair[1]):
        assert done.returncode != 0 and "shard_weights is False in process 1, but True in process 0" in done.stderr
