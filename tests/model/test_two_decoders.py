"""Documents are read while questions are answered: each decoder has modules of its own, and the bits are the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.document_cache import DocumentCache, PositionedCache
from kvfusion_rag.text.settings import default_settings

IDS = torch.tensor([[5, 9, 3, 7, 11, 4]])
WAIT = 60.0  # seconds after which a pass counts as blocked


@pytest.fixture
def tuned(tmp_path) -> Backbone:
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer("byte-bpe")
    settings = default_settings(tokenizer)
    return Backbone(tiny.model("llama"), tokenizer, settings, model_id="tiny", adapter=tmp_path)


def answer_pass(backbone: Backbone, *, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a pass of Dt over an empty context."""
    cache = PositionedCache(torch.empty(1, 0, dtype=torch.long))
    positions = torch.arange(IDS.shape[1])[None]
    last = torch.tensor([IDS.shape[1] - 1])
    with torch.inference_mode():
        return backbone.forward(IDS, positions, torch.ones_like(IDS), cache, last, adapter=adapter)


@pytest.mark.parametrize("adapter", [True, False])
def test_question_is_answered_in_the_middle_of_a_documents_pass(tuned, monkeypatch, adapter):
    expected, document = answer_pass(tuned, adapter=adapter), tuned.prefill(IDS, None)
    in_pass, may_go_on = threading.Event(), threading.Event()
    update = DocumentCache.update

    def pause(self, keys, values, layer, *args, **kwargs):
        in_pass.set()
        assert may_go_on.wait(WAIT)
        return update(self, keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(DocumentCache, "update", pause)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(tuned.prefill, IDS, None)
        try:
            assert in_pass.wait(WAIT)
            logits = pool.submit(answer_pass, tuned, adapter=adapter).result(WAIT)
        finally:
            may_go_on.set()
        read = reading.result(WAIT)
    assert torch.equal(logits, expected)
    assert all(torch.equal(part, other) for part, other in zip(read, document, strict=True))


def test_decoders_share_their_weights(tuned):
    before, answered = tuned.prefill(IDS, None), answer_pass(tuned, adapter=False)
    base = [tensor for name, tensor in tuned.model.named_parameters() if "lora" not in name]
    with torch.no_grad():
        for weights in base:
            weights.mul_(1.5)
    assert not torch.equal(tuned.prefill(IDS, None)[0], before[0])
    assert not torch.equal(answer_pass(tuned, adapter=False), answered)
    with torch.no_grad():
        for weights in base:
            weights.div_(1.5)
    torch.testing.assert_close(tuned.prefill(IDS, None), before)
