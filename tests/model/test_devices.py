"""The laws on every device: on a CPU in each run, and on a GPU with ``pytest -m gpu``."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import WORDS, backbone, model
from tiny_training import SETTINGS as TRAINING
from tiny_training import batch_of, rows

from kvfusion_rag import DiskStore, Document, DocumentStore, KVFusionGenerator, MemoryLimitError, MemoryStore
from kvfusion_rag.cli import main
from kvfusion_rag.engine.engine import Engine, EngineOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.training.loss import fusion_loss
from tests.fusion.test_fusion_laws import logits_of, random_documents

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ARCHITECTURES = ("llama", "qwen3", "gpt2", "bert")
DOCUMENTS = ["two grey doves sleep", "Amara Osei built a lighthouse of 31 metres", "rain falls on the roof"]
QUESTIONS = ["who built it?", "where do doves sleep?", "how high is the lighthouse, and who built it?"]
HEAD_WIDTH = 16  # flash attention needs multiples of 8, flex attention powers of two


def on(device: str, architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> TorchModel:
    made = backbone(architecture, dtype, **changes)
    name = f"{architecture} on {device}"
    return TorchModel(Backbone(made.model.to(device), made.tokenizer, made.settings, model_id=name))


def tokens(made: KVFusionGenerator, documents=DOCUMENTS, **options) -> tuple[int, ...]:
    return made.answer(QUESTIONS[0], documents, max_new_tokens=8, **options).token_ids


@devices
@dtypes
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_order_and_any_store_gives_the_same_bits(device, dtype, attention, tmp_path):
    loaded = on(device, dtype=dtype, _attn_implementation=attention)
    stores = [
        None,
        MemoryStore(),
        MemoryStore(host=True),
        DocumentStore(None, DiskStore(tmp_path / "one", 1 << 28)),
        DocumentStore(MemoryStore(host=True), DiskStore(tmp_path / "two", 1 << 28)),
    ]
    generators = [KVFusionGenerator(loaded, store=store) for store in stores]
    rng = random.Random(11)
    for _ in range(2):
        documents = random_documents(rng)
        expected, answer = logits_of(generators[0], QUESTIONS[0], documents)
        for made in generators[1:]:
            made.prefill(rng.sample(documents, rng.randint(1, len(documents))))
            for _ in range(2):  # the second time, all documents are stored
                found, found_answer = logits_of(made, QUESTIONS[0], rng.sample(documents, len(documents)))
                assert found.device.type == device and found_answer == answer and found.equal(expected)


@devices
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_equals_single_questions(device, architecture):
    made = KVFusionGenerator(on(device, architecture), store=MemoryStore())
    rng = random.Random(5)
    for documents in ([DOCUMENTS] * 3, [random_documents(rng) for _ in QUESTIONS]):
        batch = made.answer_batch(QUESTIONS, documents, max_new_tokens=8)
        for found, question, row in zip(batch, QUESTIONS, documents, strict=True):
            assert found.token_ids == made.answer(question, row, max_new_tokens=8).token_ids
            assert "".join(made.stream(question, row, max_new_tokens=8)) == found.text


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gpu_and_cpu_give_the_same_answers(architecture):
    by_cpu, by_gpu = (KVFusionGenerator(on(device, architecture), store=None) for device in ("cpu", "cuda"))
    for mode in ("fusion", "concat", "ape"):
        assert tokens(by_gpu, mode=mode) == tokens(by_cpu, mode=mode)
    in_sequence = [made.with_settings(positions="global") for made in (by_cpu, by_gpu)]
    assert tokens(in_sequence[0]) == tokens(in_sequence[1])
    effects = [
        [source.effect for source in made.answer(QUESTIONS[0], DOCUMENTS, attribution="effects").sources]
        for made in (by_cpu, by_gpu)
    ]
    assert effects[0] == pytest.approx(effects[1], abs=1e-3)


@devices
def test_adapter_answers_over_documents_of_the_base_model(device, model_folder, tmp_path):
    made = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model("llama"), made).save_pretrained(tmp_path / "adapter")
    store = MemoryStore()
    base, tuned = (
        KVFusionGenerator.from_pretrained(model_folder, adapter=adapter, device=device, store=store, mode="fusion")
        for adapter in (None, tmp_path / "adapter")
    )
    assert base._engine.model.device.type == tuned._engine.model.device.type == device
    assert tokens(base) != tokens(tuned)
    assert {source.origin for source in tuned.answer("who?", DOCUMENTS).sources} == {"memory"}


@devices
@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_8_bit_weights(device, weights, model_folder):
    pytest.importorskip("torchao")
    from tests.model.test_quantized import FORMATS, load

    made, storeless = (
        load(model_folder, FORMATS[weights], device=device, store=store) for store in (MemoryStore(), None)
    )
    expected = tokens(made)
    assert tokens(made, DOCUMENTS[::-1]) == expected == tokens(storeless)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss(device, dtype):
    loaded = on(device, dtype=dtype, settings=TRAINING)
    bone = loaded.backbone
    bone.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    made = Engine(loaded, TRAINING, store=None)
    batch = batch_of(made, rows(4))
    weights = [weight for name, weight in bone.model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = fusion_loss(made, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.device.type == device and losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_attention_kernels_keep_the_laws(attention, dtype):
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    loaded = on("cuda", dtype=dtype, head_dim=HEAD_WIDTH, _attn_implementation=attention)
    made = KVFusionGenerator(loaded, store=MemoryStore())
    expected, answer = logits_of(made, QUESTIONS[0], DOCUMENTS)
    found, found_answer = logits_of(made, QUESTIONS[0], DOCUMENTS[::-1])
    assert found_answer == answer and found.equal(expected)
    ordinary = KVFusionGenerator(on("cuda", dtype=dtype, head_dim=HEAD_WIDTH), store=None)
    first, _ = logits_of(ordinary, QUESTIONS[0], DOCUMENTS, max_new_tokens=1)
    assert (first - expected[:1]).abs().max() < 5e-2 * first.abs().max()
    batch = made.answer_batch(QUESTIONS, [DOCUMENTS] * 3, max_new_tokens=4)
    assert [len(answer.token_ids) for answer in batch] == [4] * 3


@pytest.mark.gpu
def test_out_of_memory_is_one_error_and_the_next_question_is_answered():
    made = KVFusionGenerator(on("cuda"), store=None, options=EngineOptions(max_fused_tokens=1 << 24))
    expected = tokens(made)
    rng = random.Random(3)
    many = [Document(" ".join(rng.choices(WORDS.split(), k=40)), id=str(n)) for n in range(3000)]
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / whole)
    try:
        with pytest.raises(MemoryLimitError, match="not have enough memory for 1 question"):
            made.answer("who?", many, max_new_tokens=2)
        assert tokens(made) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_answers_do_not_leak_memory():
    made = KVFusionGenerator(on("cuda"), store=MemoryStore())
    for number in range(40):
        made.answer_batch(QUESTIONS, [DOCUMENTS] * 3, max_new_tokens=4)
        if number == 4:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--weights", "int8"]], ids=["", "int8"])
def test_benchmark_runs(options, capsys):
    case = ["--shape", "tiny", "--documents", "3", "--document-tokens", "32", "--answer-tokens", "4"]
    assert main(["bench", "answer", *case, "--device", "cuda", "--repeats", "1", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in found["rows"] if "left_out" not in row] == ["generate", "cold", "memory", "disk"]
    assert all(row["peak_memory_bytes"] > 0 for row in found["rows"])
