"""Gradient checkpointing computes layers twice, which changes neither loss nor gradients."""

import pytest
import torch
from peft import LoraConfig
from tiny_training import ARCHITECTURES, assert_same_gradients, batch_of, engine, gradients, rows, shared, trainer

from kvfusion_rag import UnsupportedModelError
from kvfusion_rag.data.rows import QARow
from kvfusion_rag.model.attention.functions import GROUPED
from kvfusion_rag.model.loading import load_backbone
from kvfusion_rag.model.location import locate_model
from kvfusion_rag.training.loss import fusion_loss


def prepared(architecture: str, *, full: bool, **changes):
    """Return an engine in training mode whose decoder has gradients: an adapter that is not zero, or all weights."""
    made = engine(architecture, full=full, **changes)
    if not full:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            made.model.decoder.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    made.model.decoder.model.train()
    return made


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "minicpm3"])
def test_loss_and_gradients_equal_those_without_checkpointing(architecture, full):
    data = [*shared([3, 1]), *rows(2, seed=5), QARow("none", "who", (), ())]
    found = []
    for checkpointed in (False, True):
        made = prepared(architecture, full=full)
        if checkpointed:
            made.model.decoder.checkpoint_activations()
        batches = [batch_of(made, data), batch_of(made, rows(2), joined=True)]
        torch.manual_seed(0)  # gpt2 and bert have dropout
        found.append(gradients(made, batches))
    (loss, grads), (checkpointed_loss, checkpointed_grads) = found
    assert checkpointed_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(grads, checkpointed_grads)


def test_less_is_kept_for_the_backward_pass():
    kept = []
    for checkpointed in (False, True):
        made = prepared("llama", full=True)
        if checkpointed:
            made.model.decoder.checkpoint_activations()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            fusion_loss(made, batch_of(made, rows(4)))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_run_with_checkpointing_makes_equal_steps(tmp_path, full):
    losses = []
    for checkpointed in (False, True):
        options = {"max_steps": 3, "full": full, "gradient_checkpointing": checkpointed}
        run = trainer(tmp_path / str(checkpointed), engine(full=full), shared([3, 2]), rows(2), **options)
        losses.append([loss for _, loss in run.run().losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trained_model_is_saved_as_an_ordinary_one(tmp_path):
    options = {"max_steps": 1, "full": True, "gradient_checkpointing": True}
    trainer(tmp_path, engine(full=True), rows(2), **options).run()
    loaded = load_backbone(locate_model(tmp_path / "run" / "best"))
    assert loaded.attention == GROUPED


def test_unsupported_models_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedModelError, match=r"'eager'.*needs 'sdpa'"):
        trainer(tmp_path, engine(_attn_implementation="eager"), rows(2), gradient_checkpointing=True)
    with pytest.raises(UnsupportedModelError, match="loses the fused cache"):  # it holds latents, attention keys
        trainer(tmp_path, engine("minicpm3"), rows(2), gradient_checkpointing=True)
    made = engine()
    monkeypatch.setattr(type(made.model.decoder.model), "supports_gradient_checkpointing", False)
    with pytest.raises(UnsupportedModelError, match="has no gradient checkpointing"):
        trainer(tmp_path, made, rows(2), gradient_checkpointing=True)


def test_model_that_loses_the_cache_is_rejected(tmp_path):
    """Its layers do not pass unknown arguments on to attention."""
    made = engine()
    layer = made.model.decoder.model.model.layers[1]
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"context": None}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="loses the fused cache"):
        trainer(tmp_path, made, rows(2), gradient_checkpointing=True)
