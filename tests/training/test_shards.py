"""Weights in shards: two processes train as they do with whole weights, bit for bit, and keep half of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family
from peft import LoraConfig
from safetensors.torch import load_file
from sharded_runs import CASES, RESUMED, base, data, settings
from tiny import tokenizer
from tiny_training import SETTINGS, batch_of, gradients, rows
from torch import distributed

from kvfusion_rag import InvalidInputError, UnsupportedModelError
from kvfusion_rag.engine.engine import Engine
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.training import TrainingConfig, preset, train
from kvfusion_rag.training.shards import Shards

HELPER = Path(__file__).parent.parent / "helpers" / "sharded_runs.py"
ROOT = HELPER.parent.parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of all cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HELPER.parent))), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(HELPER), str(folder)], env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def curve(folder: Path) -> tuple[list[float], list[dict[str, float]]]:
    found = json.loads((folder / "losses.json").read_text())
    return found["losses_nats_per_token"], found["dev_exact_match_percent"]


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare losses, scores, the adapter and the state to resume from, bit for bit."""
    assert curve(found) == curve(expected)
    for file in ("best/adapter_model.safetensors", "checkpoint/optimizer.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_shards_change_no_bit_of_a_run(trained, case):
    assert_same_run(trained / case / "shards", trained / case / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RESUMED if name != "resumed-whole"])
def test_run_with_shards_is_resumed_bit_for_bit(trained, name):
    assert_same_run(trained / name, trained / "resumed-whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["plain", "unequal documents", "distilled"])
def test_two_processes_with_shards_train_as_one_with_whole_weights(trained, case, tmp_path):
    options = dict(CASES[case])
    made = data(unequal=options.pop("unequal", False))
    config, _ = settings(**options, batch_size=4)
    train(made, dev=made[:3] * 7, output=tmp_path, model=base(trained, "llama"), config=config, device="cpu")
    found, expected = curve(trained / case / "shards"), curve(tmp_path)
    assert found[0] == pytest.approx(expected[0], abs=1e-5) and found[1] == expected[1]
    file = "best/adapter_model.safetensors"
    weights = load_file(tmp_path / file)
    for name, weight in load_file(trained / case / "shards" / file).items():
        assert weight.allclose(weights[name], atol=1e-5), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_of_two_processes_keeps_half_of_the_weights(trained):
    memory = json.loads((trained / "memory.json").read_text())
    assert 0.5 < memory["kept"] / memory["whole"] < 0.52 and memory["same_digest"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A group with this process only, which gathers weights from itself."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(family: Family, *, shards: bool) -> tuple[float, dict[str, torch.Tensor], str]:
    """Return loss and gradients of an adapter that is not empty, and the digest of the base weights."""
    backbone = Backbone(family.network(), tokenizer("byte-bpe"), SETTINGS, model_id=family.name)
    kept = Shards(backbone, torch.device("cpu")) if shards else None
    made = Engine(TorchModel(backbone), SETTINGS, store=None)
    torch.manual_seed(0)
    backbone.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    backbone.model.train()
    loss, found = gradients(made, [batch_of(made, rows(4))])
    if kept is not None:
        kept.finish()
    return loss, found, backbone.weights_digest


@pytest.mark.parametrize("name", ["Llama 3", "OPT", "Qwen3 MoE", "gpt-oss", "DeepSeek V2", "Gemma 3n (text)"])
def test_shards_change_no_gradient_of_a_family(alone, name):
    family = next(family for family in FAMILIES if family.name == name)
    loss, found, digest = adapted(family, shards=True)
    whole_loss, expected, whole_digest = adapted(family, shards=False)
    assert (loss, digest) == (whole_loss, whole_digest) and found.keys() == expected.keys()
    assert all(gradient.equal(expected[name]) for name, gradient in found.items()) and len(found) > 10


def test_architecture_whose_layers_are_not_in_one_list_is_refused(alone):
    family = next(family for family in FAMILIES if family.model_type == "longcat_flash")
    with pytest.raises(UnsupportedModelError, match="has no list of its 4 layers"):
        adapted(family, shards=True)


def test_one_process_alone_cannot_keep_shards(tmp_path):
    with pytest.raises(InvalidInputError, match="shard_weights is true, but there is only this process"):
        train(data(), output=tmp_path / "out", device="cpu", config=TrainingConfig(shard_weights=True))
    assert not (tmp_path / "out").exists()


def test_trained_weights_cannot_be_in_shards():
    for wrong in (lambda: TrainingConfig(full=True, shard_weights=True), lambda: preset("paper", shard_weights=True)):
        with pytest.raises(InvalidInputError, match="full and shard_weights are both true"):
            wrong()
