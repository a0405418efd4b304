"""Training in bfloat16: updates too small for its 8 bits of mantissa are not lost."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import engine, rows, trainer

from kvfusion_rag import InvalidInputError
from kvfusion_rag.training.weights import MasterWeights

SMALL = 1e-4  # size of an AdamW step; half the distance of bfloat16 numbers from 0.1 on is 2.4e-4 or more
STEPS = 8


def changed_share(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Return the share of weights that changed."""
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    return changed / sum(tensor.numel() for tensor in before.values())


def test_small_updates_change_bfloat16_weights_and_are_not_rounded_away(tmp_path):
    options = {"full": True, "learning_rate": SMALL, "max_steps": STEPS, "warmup": 0.0, "batch_size": 8}
    run = trainer(tmp_path, engine(full=True, dtype=torch.bfloat16), rows(8), **options)
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    plain = copy.deepcopy(before)
    run.run()
    assert all(weight.dtype == torch.bfloat16 for weight in run.weights.values())
    matrices = {name for name, weight in before.items() if weight.dim() > 1}

    optimizer = torch.optim.AdamW(plain.values(), lr=SMALL, weight_decay=0.0)
    for _ in range(STEPS):  # the largest steps of AdamW, all in one direction
        for weight in plain.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    large = {n: before[n].abs() > 0.1 for n in matrices}
    assert all(torch.equal(plain[n][large[n]], before[n][large[n]]) for n in matrices)
    kept = {n: run.weights[n].detach()[large[n]] for n in matrices}
    assert changed_share({n: before[n][large[n]] for n in matrices}, kept) > 0.1


def test_adapter_of_a_bfloat16_model_is_updated_in_float32_and_saved_in_bfloat16(tmp_path):
    run = trainer(tmp_path, engine(dtype=torch.bfloat16), rows(8), max_steps=3)
    run.run()
    copies = load_file(tmp_path / "run" / "checkpoint" / "optimizer.safetensors")
    assert {copies[name].dtype for name in copies if name.startswith("weight/")} == {torch.float32}
    saved = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    for name, weight in run.weights.items():
        assert torch.equal(weight, copies[f"weight/{name}"].bfloat16())
    assert any(not torch.equal(w, w.bfloat16().float()) for n, w in copies.items() if n.startswith("weight/"))


def test_decoder_is_saved_in_bfloat16(tmp_path):
    trainer(tmp_path, engine(full=True, dtype=torch.bfloat16), rows(4), max_steps=1, full=True).run()
    saved = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_gradients_are_accumulated_in_float32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = MasterWeights({"w": weight})
    for gradient in [256.0, *[1.0] * 8]:  # 256 + 1 is 256 in bfloat16
        (weight * gradient).sum().backward()
        masters.take_gradients()
    assert masters.gradients()[0].item() == 264.0 and weight.grad is None


def test_float32_weights_are_their_own_copies():
    weight = torch.nn.Parameter(torch.ones(2))
    assert MasterWeights({"w": weight}).copies["w"] is weight


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(tmp_path):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        options = {"full": True, "learning_rate": 3e-3, "max_steps": 30, "batch_size": 8}
        run = trainer(tmp_path / str(dtype), engine(full=True, dtype=dtype), rows(8), **options)
        losses.append([loss for _, loss in run.run().losses])
    assert losses[0][-1] < losses[0][0] / 10
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.1)


def test_float16_is_rejected(tmp_path):
    with pytest.raises(InvalidInputError, match="float16, whose gradients vanish"):
        trainer(tmp_path, engine(dtype=torch.float16), rows(2))
