"""Training in the workers of Ray Train's ``TorchTrainer``: two of them train as one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save
from tiny_training import SETTINGS, rows

from kvfusion_rag.data.rows import read_rows, write_rows
from kvfusion_rag.training import TrainingConfig, train

ray = pytest.importorskip("ray")
torch_train = pytest.importorskip("ray.train.torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())["losses_nats_per_token"]


def run(options: dict[str, Any]) -> None:
    data = list(read_rows(options["rows"]))
    config = TrainingConfig(max_steps=3, rank=4, dropout=0.0, eval_every=2, **options["config"])
    arguments = {"model": options["model"], "dev": data[:3], "device": "cpu", "progress": False}
    train(data, output=options["output"], config=config, **arguments)


@pytest.mark.parametrize("shard_weights", [False, True], ids=["whole", "shards"])
def test_two_workers_train_as_one_process(shard_weights, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows(10))
    options = {"rows": str(tmp_path / "rows.jsonl"), "model": str(save(tmp_path / "base", settings=SETTINGS))}
    run({**options, "output": str(tmp_path / "one"), "config": {"batch_size": 4}})
    there = {"output": str(tmp_path / "two"), "config": {"batch_size": 2, "shard_weights": shard_weights}}
    torch_train.TorchTrainer(
        run,
        train_loop_config={**options, **there},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
