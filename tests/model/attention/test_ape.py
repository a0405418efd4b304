"""Mode "ape": the laws of Adaptive Parallel Encoding (arXiv 2502.05431) over several architectures."""

import logging
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import block_masks
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, GPTJConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvfusion_rag import ContextLimitError, InvalidInputError, KVFusionGenerator, UnsupportedModelError
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.positions import fused_positions
from kvfusion_rag.text.settings import ModelSettings
from tests.fusion.test_fusion_laws import VOCABULARY, architectures, dtypes, logits_of, random_documents
from tests.test_generator import DOCUMENTS

REFERENCE = "tests_dense_ape"


def dense_reference(module, query, key, value, attention_mask, *, scaling, blocks, factors, **kwargs):
    """APE from its definition: two softmaxes with their own sums, merged by exp(S LSE) and exp(LSE)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1)[0].double() for x in (key, value))
    prefix, documents, temperature, scale = *blocks, *factors
    logits = (query[0].double() @ key.transpose(1, 2)) * scaling  # (H, N, N)
    slots, seen = torch.arange(logits.shape[-1]), attention_mask[0, 0]
    end = prefix + documents
    inside = (slots[:, None] >= end) & (slots >= prefix) & (slots < end)  # documents and prefix read as usual
    outputs, weights = [], []
    for part, t, s in ((seen & inside, temperature, scale), (seen & ~inside, 1.0, 1.0)):
        exponentials = (logits / t).exp() * part
        total = exponentials.sum(dim=-1, keepdim=True)
        weights.append(torch.where(total > 0, total**s, 0.0))
        outputs.append(weights[-1] * (exponentials @ value) / total.clamp(min=1e-300))
    out = sum(outputs) / sum(weights)
    return out.to(query.dtype).transpose(0, 1)[None], None


def dense_logits(network, prefix, documents, question, factors):
    """Return the logits after every token of ``question`` in one block-masked pass."""
    AttentionInterface.register(REFERENCE, dense_reference)
    lengths = [len(ids) for ids in documents]
    ids = [*prefix, *(i for document in documents for i in document), *question]
    start = len(prefix) + max(lengths, default=0)
    positions = fused_positions(len(prefix), lengths, start, len(question))
    network.set_attn_implementation(REFERENCE)
    logits = network(
        input_ids=torch.tensor([ids]),
        position_ids=positions[None],
        attention_mask=block_masks(network.config, len(prefix), lengths, len(question), positions),
        blocks=(len(prefix), sum(lengths)),
        factors=factors,
    ).logits
    return logits[0, -len(question) :]


@architectures
@settings(max_examples=2)
@given(seed=st.integers(0, 2**16), temperature=st.floats(0.3, 1.5), scale=st.floats(0.3, 1.3))
def test_answers_equal_a_dense_computation_from_the_definition(architecture, seed, temperature, scale):
    rng = random.Random(seed)
    factors = {"ape_temperature": temperature, "ape_scale": scale, "passage_length": 90, "mode": "ape"}
    gen = tiny.generator(architecture, store=None).with_settings(**factors)
    documents, question = random_documents(rng, most=3), " ".join(rng.choices(VOCABULARY, k=4))
    steps, ids = logits_of(gen, question, documents, max_new_tokens=3)
    encoder, pieces = gen._engine.encoder, list(gen._engine.read(documents).keys.values())
    read = [*encoder.encode_question(question), *ids[:-1]]
    expected = dense_logits(tiny.model(architecture), encoder.prefix_ids, pieces, read, (temperature, scale))
    expected = expected[-len(ids) :]
    difference = (steps - expected).abs().max().item()
    assert difference < 1e-4 * expected.abs().max().item(), f"largest difference {difference}"


@architectures
@dtypes
def test_neutral_factors_equal_fusion_and_others_do_not(architecture, dtype):
    gen = KVFusionGenerator(TorchModel(tiny.backbone(architecture, dtype)), store=None)
    neutral = gen.with_settings(mode="ape", ape_temperature=1.0, ape_scale=1)
    for documents in (random_documents(random.Random(1)), DOCUMENTS):
        expected, found = (logits_of(g, "who built it?", documents, 1)[0] for g in (gen, neutral))
        assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 3e-2)
    for name in ("ape_temperature", "ape_scale"):
        changed = logits_of(neutral.with_settings(**{name: 0.7}), "who built it?", DOCUMENTS, 1)[0]
        assert not torch.allclose(changed, expected)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("bert", torch.float32)]
)
def test_any_order_gives_the_same_bits(architecture, dtype):
    made = TorchModel(tiny.backbone(architecture, dtype))
    gen = KVFusionGenerator(made, store=None).with_settings(max_new_tokens=8)
    rng = random.Random(2)
    for _ in range(3):
        report = gen.check_invariance("who?", random_documents(rng), permutations=3, mode="ape")
        assert report.mode == "ape" and report.identical


@architectures
def test_batch_equals_single_questions(architecture):
    gen = tiny.generator(architecture, prefix="the river ", mode="ape")
    rng = random.Random(5)
    questions = [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 12))) for _ in range(4)]
    documents = [random_documents(rng) for _ in range(3)] + [[]]  # the last row has no documents
    batch = gen.answer_batch(questions, documents, max_new_tokens=4)
    for answer, question, row in zip(batch, questions, documents, strict=True):
        single = gen.answer(question, row, max_new_tokens=4)
        assert (answer.text, answer.token_ids, answer.mode) == (single.text, single.token_ids, "ape")


def test_without_documents_it_is_ordinary_generation():
    gen = tiny.generator("llama", prefix="the river ")
    ids = [gen.answer("who?", [], mode=mode, max_new_tokens=6).token_ids for mode in ("ape", "concat")]
    assert ids[0] == ids[1]


def test_stream_equals_answer_and_shares_documents_with_fusion():
    gen = tiny.generator("llama", mode="ape")
    gen.answer("why?", DOCUMENTS, mode="fusion", max_new_tokens=1)
    stream = gen.stream("who?", DOCUMENTS, max_new_tokens=12)
    text = "".join(stream)
    answer = gen.answer("who?", DOCUMENTS, max_new_tokens=12)
    assert stream.answer is not None and stream.answer.mode == "ape"
    assert text == answer.text and stream.answer.token_ids == answer.token_ids
    assert {source.origin for source in answer.sources} == {"memory"}
    assert answer.usage.cached_document_tokens == answer.usage.document_tokens > 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny.model("llama"), lora).save_pretrained(folder)
    return folder


def test_adapter_and_tuned_decoder_are_off(model_folder, adapter, tmp_path, caplog):
    tiny.save(tmp_path, seed=1)
    base = KVFusionGenerator.from_pretrained(model_folder, mode="ape")
    expected = base.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
    for tuning in ({"adapter": adapter}, {"decoder": tmp_path}):
        tuned = KVFusionGenerator.from_pretrained(model_folder, **tuning)
        fused = tuned.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
        with caplog.at_level(logging.INFO):
            answer = tuned.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=8)
        assert answer.token_ids == expected != fused
        assert tuned.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids == fused  # on again
        assert "mode ape" in caplog.text and "tuned decoder off" in caplog.text
    assert "temperature 0.9, scale 0.9" in caplog.text


def test_threads_in_all_modes_get_the_answers_of_a_single_thread(model_folder, adapter):
    gen = KVFusionGenerator.from_pretrained(model_folder, adapter=adapter)
    questions = [(f"who has {i} sacks?", ("fusion", "ape", "concat")[i % 3]) for i in range(9)]

    def answer(question: tuple) -> tuple:
        text, mode = question
        return gen.answer(text, DOCUMENTS, mode=mode, max_new_tokens=4).token_ids, gen.identity()

    expected = [answer(question) for question in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(answer, questions)) == expected
    backbone = gen._engine.model.backbone
    assert backbone.model.config._attn_implementation == backbone.attention


def test_failed_pass_restores_the_attention():
    gen = tiny.generator("llama")
    expected = gen.answer("who?", DOCUMENTS, max_new_tokens=4).token_ids

    def fail(module, *args):
        raise RuntimeError("stop")

    gen.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=1)
    hook = gen._engine.model.backbone.model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        gen.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=4)
    hook.remove()
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=4).token_ids == expected


def test_model_whose_attention_cannot_be_replaced_is_rejected():
    small = GPTJConfig(n_embd=48, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, vocab_size=512)
    network, tok = AutoModelForCausalLM.from_config(small), tiny.tokenizer("byte-bpe")
    gen = KVFusionGenerator(TorchModel(Backbone(network, tok, ModelSettings(), model_id="old")), store=None)
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=2).token_ids
    with pytest.raises(UnsupportedModelError, match=r"'old' \(gptj\) cannot"):
        gen.answer("who?", DOCUMENTS, mode="ape")


def test_question_follows_the_longest_document_within_the_window():
    gen = tiny.generator("llama", passage_length=400, max_new_tokens=40)
    document = ("the river runs past an old mill and sleeps " * 40)[:300]
    tokens = gen.answer("who?", [document], mode="ape", max_new_tokens=1).usage.document_tokens
    request = gen._engine.request("who?", [document, "a mill"], None, "ape", DecodingOptions(1))
    assert request.question.start == tokens < 400
    with pytest.raises(ContextLimitError, match="has 512"):
        gen.answer("who?" * 150, [document], mode="ape")


def test_caller_sets_the_factors(model_folder):
    made = KVFusionGenerator.from_pretrained(model_folder, ape_temperature=0.5, ape_scale=0.7)
    assert (made.settings.ape_temperature, made.settings.ape_scale) == (0.5, 0.7)
    with pytest.raises(InvalidInputError, match="ape_scale is 0"):
        KVFusionGenerator.from_pretrained(model_folder, ape_scale=0)


def test_other_settings_share_weights_store_and_warnings(caplog):
    gen = tiny.generator("llama", mode="ape")
    gen.prefill(DOCUMENTS)
    other = gen.with_settings(ape_scale=0.5, mode="fusion")
    assert (other.mode, other.settings.ape_scale, gen.settings.ape_scale) == ("fusion", 0.5, 0.9)
    for one in (gen, other):
        answer = one.answer("who?", DOCUMENTS, mode="fusion", max_new_tokens=1)
        assert {s.origin for s in answer.sources} == {"memory"}
    assert caplog.text.count("was not trained") == 1
    with pytest.raises(InvalidInputError, match=r"'ape_heat' is not an option of KVFusionGenerator\.with_settings"):
        gen.with_settings(ape_heat=1)
