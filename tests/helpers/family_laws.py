"""The laws of fusion, measured on one family against the reference: how far the engine is from each of them.

A *deviation* is the relative error of logits over all steps of an answer. Laws about equal bits have deviation 0, or
the largest difference of logits. Documents are longer than every window of the families, and questions begin beyond.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from families import Family
from peft import LoraConfig, get_peft_model
from reference_attention import Row, run, run_in_two_steps, use_reference
from tiny import tokenizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvfusion_rag import Document, KVFusionGenerator, UnsupportedModelError
from kvfusion_rag.engine.requests import Request
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.store import MemoryStore
from kvfusion_rag.text.settings import default_settings

ALLOWED = 2e-6  # relative error of logits in float32
STEPS = 5
QUESTION = "who built it?"
DOCUMENTS = (
    Document("the river runs past an old mill and the miller counts sacks of flour while rain falls on the roof where "
             "two grey doves sleep and its lamp was lit for the first time on the river", title="River"),
    Document("in 1874 Amara Osei built a lighthouse of 31 metres", title="Harbour records"),
    "two grey doves sleep while rain falls on the roof",
    "nobody knows, said the clerk",
)  # fmt: skip


class Subject:
    """One family: its random model, once with the reference's attention and once in a generator.

    Args:
        folder: empty folder for an adapter and a store.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.network = family.network()
        self.plain = copy.deepcopy(self.network)  # transformers' own attention, masks and caches
        self.reference = use_reference(copy.deepcopy(self.network))

    @cached_property
    def generator(self) -> KVFusionGenerator:
        """A generator over the family's model. Building it runs the support gate."""
        return KVFusionGenerator(TorchModel(self._backbone(self.network)), store=MemoryStore())

    @cached_property
    def fused(self) -> tuple[Request, torch.Tensor, list[int]]:
        """Request, logits and tokens of the question over all documents in mode "fusion"."""
        return self.answered(self.generator)

    @cached_property
    def tuned(self) -> tuple[KVFusionGenerator, PreTrainedModel]:
        """A generator with a LoRA adapter, and peft's own model with the reference's attention."""
        targets = [
            name
            for name, module in self.plain.named_modules()
            if "att" in name and "gate" not in name and isinstance(module, torch.nn.Linear | Conv1D)
        ]
        settings = LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        peft_model = get_peft_model(copy.deepcopy(self.plain), settings)
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
        peft_model.save_pretrained(str(self.folder / "adapter"))
        backbone = self._backbone(copy.deepcopy(self.plain), self.folder / "adapter")
        merged = use_reference(peft_model.merge_and_unload())
        return KVFusionGenerator(TorchModel(backbone), store=MemoryStore()), merged

    def _backbone(self, network: PreTrainedModel, adapter: Path | None = None) -> Backbone:
        settings = replace(default_settings(tokenizer("byte-bpe")), mode="fusion", max_new_tokens=STEPS)
        name = f"tiny-{self.family.model_type}"
        return Backbone(network, tokenizer("byte-bpe"), settings, model_id=name, adapter=adapter)

    def answered(self, generator: KVFusionGenerator, mode: str = "fusion") -> tuple[Request, torch.Tensor, list[int]]:
        """Return the request, the logits (steps, V) and the tokens of one greedy answer."""
        request = _request(generator, QUESTION, DOCUMENTS, mode)
        ((logits, ids),) = _answers(generator, [request])
        return request, logits, ids


def _request(generator: KVFusionGenerator, question: str, documents: Sequence[Document | str], mode: str) -> Request:
    options = DecodingOptions(max_new_tokens=STEPS)
    return generator._engine.request(question, documents, None, mode, options, focus=None)  # type: ignore[arg-type]


def _answers(generator: KVFusionGenerator, requests: Sequence[Request]) -> list[tuple[torch.Tensor, list[int]]]:
    """Return logits (steps, V) and tokens of requests that are answered together. None of them ends early."""
    steps: list[torch.Tensor] = []
    options, runner = DecodingOptions(max_new_tokens=STEPS), generator._engine.runner
    (batch,) = runner.batches(requests)
    running = runner.start(batch)
    for _ in runner.decode(running, options, on_logits=lambda logits: steps.append(logits.clone())):
        pass
    assert all(len(logits) == len(requests) for logits in steps), "an answer ended early; take another seed"
    return [
        (torch.stack(rows), answer.ids) for rows, answer in zip(zip(*steps, strict=True), running.answers, strict=True)
    ]


def _row(request: Request, answer: Sequence[int]) -> Row:
    """Return prefix, documents, question and answer so far as one row."""
    pieces = request.fused or ()
    prefix = request.layout.prefix if request.fused is not None else ()
    question = (*request.question.ids, *answer[:-1])
    return Row.of(prefix, [p.ids for p in pieces], [p.start for p in pieces], question, request.question.start)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of the logits of one answer."""
    return float((found - expected).norm() / expected.norm())


def _same_answer(logits: torch.Tensor, ids: Sequence[int], expected: torch.Tensor) -> float:
    """Return the error of ``logits``. One causal pass has the logits of all steps, so it also fixes greedy tokens."""
    assert expected.argmax(dim=-1).tolist() == list(ids), "the reference chooses other tokens"
    return relative_error(logits, expected)


# The laws


def fused_is_one_block_masked_pass(subject: Subject) -> float:
    request, logits, ids = subject.fused
    return _same_answer(logits, ids, run(subject.reference, _row(request, ids))[-len(ids) :])


def global_positions_are_consecutive(subject: Subject) -> float:
    request, logits, ids = subject.answered(subject.generator.with_settings(positions="global"))
    row = _row(request, ids)
    assert row.positions.tolist() == list(range(len(row.ids)))
    return _same_answer(logits, ids, run(subject.reference, row)[-len(ids) :])


def shuffled_documents_give_the_same_bits(subject: Subject) -> float:
    report = subject.generator.check_invariance(QUESTION, DOCUMENTS, permutations=2, mode="fusion", focus=None)
    assert len(report.answers) == 1
    return report.max_logit_difference


def batches_equal_singles(subject: Subject) -> float:
    generator = subject.generator
    asked = [  # the first three share a row of the fused cache
        (QUESTION, DOCUMENTS),
        ("why?", DOCUMENTS),
        ("where do two grey doves sleep?", DOCUMENTS[:3]),
        ("who said so?", DOCUMENTS[1:]),
    ]
    requests = [_request(generator, question, documents, "fusion") for question, documents in asked]
    (batch,) = generator._engine.runner.batches(requests)
    assert batch.row_of == [0, 0, 0, 1] and batch.has_foreign
    singles = [_answers(generator, [request])[0] for request in requests]
    errors = []
    for (logits, ids), (expected, tokens) in zip(_answers(generator, requests), singles, strict=True):
        assert ids == tokens
        errors.append(relative_error(logits, expected))
    return max(errors)


def concat_is_generate(subject: Subject) -> float:
    request, logits, ids = subject.answered(subject.generator, "concat")
    prompt = torch.tensor([request.question.ids])
    out = subject.plain.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(ids), pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[0, prompt.shape[1] :].tolist() == ids, "generate chooses other tokens"
    return relative_error(logits, torch.cat(out.logits))


def stored_equals_computed(subject: Subject) -> float:
    _, logits, ids = subject.fused
    place, model = subject.folder / "store", subject.generator._engine.model
    KVFusionGenerator(model, store=str(place)).prefill(DOCUMENTS)
    reading = KVFusionGenerator(model, store=str(place))  # whose memory is empty
    assert {source.origin for source in reading.prefill(DOCUMENTS)} == {"disk"}
    _, found, tokens = subject.answered(reading)
    assert tokens == ids
    return float((found - logits).abs().max())


def adapter_acts_on_question_and_answer_only(subject: Subject) -> float:
    generator, merged = subject.tuned
    _, base, _ = subject.fused
    request, logits, ids = subject.answered(generator)
    assert relative_error(logits[:1], base[:1]) > 1e-3, "the adapter has no effect"
    expected = run_in_two_steps(subject.reference, merged, _row(request, ids))
    return _same_answer(logits, ids, expected[-len(ids) :])


def adapter_off_is_the_base_model(subject: Subject) -> float:
    with_adapter, base = subject.tuned[0]._engine.model, subject.generator._engine.model
    documents = [piece.ids for piece in subject.fused[0].fused or ()]
    found, expected = (dict(model.prefill(documents, None)) for model in (with_adapter, base))
    differences = [
        float((getattr(found[number], part) - getattr(kv, part)).abs().max())
        for number, kv in expected.items()
        for part in ("keys", "values")
    ]
    return max(differences)


def neutral_ape_is_fusion(subject: Subject) -> float | None:
    """Return None if the model's attention cannot be replaced, so that mode "ape" is refused."""
    neutral = subject.generator.with_settings(ape_temperature=1.0, ape_scale=1.0)
    try:
        _, logits, ids = subject.answered(neutral, "ape")
    except UnsupportedModelError:
        return None
    _, expected, tokens = subject.fused
    assert ids == tokens
    return relative_error(logits, expected)


def attribution_equals_weights(subject: Subject) -> float | None:
    """Return the error of the documents' shares of attention and of the answer's log-probability; None if refused."""
    generator, (request, _, ids) = subject.generator, subject.fused
    try:
        found = generator.attribute(QUESTION, DOCUMENTS, mode="fusion", focus=None)
    except UnsupportedModelError:
        return None
    row, weights = _row(request, ids), []
    logits = run(subject.reference, row, weights=weights)[-len(ids) :].double()
    log_probability = float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
    mean = torch.stack([layer[0, :, -len(ids) :].mean(dim=(0, 1)) for layer in weights]).mean(dim=0)  # (S,)
    shares = sorted(float(mean[row.owners == owner].sum()) for owner in range(len(DOCUMENTS)))
    errors = [abs(a - b) for a, b in zip(sorted(d.attention for d in found.documents), shares, strict=True)]
    return max(*errors, abs(found.log_probability / log_probability - 1))


Law = Callable[[Subject], "float | None"]
QUICK: dict[str, Law] = {
    "fused": fused_is_one_block_masked_pass,
    "shuffle": shuffled_documents_give_the_same_bits,
    "concat": concat_is_generate,
}
LONG: dict[str, Law] = {
    "global": global_positions_are_consecutive,
    "batch": batches_equal_singles,
    "stored": stored_equals_computed,
    "adapter": adapter_acts_on_question_and_answer_only,
    "adapter off": adapter_off_is_the_base_model,
    "ape": neutral_ape_is_fusion,
    "attribution": attribution_equals_weights,
}
LAWS = {**QUICK, **LONG}
SAME_BITS = frozenset({"shuffle", "stored", "adapter off"})
