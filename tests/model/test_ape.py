"""Mode "ape": the laws of Adaptive Parallel Encoding (arXiv 2502.05431), each over several architectures."""

import logging
import random
import threading

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, GPTJConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvfusion_rag import ContextLimitError, InvalidInputError, KVFusionGenerator, ModelLoadError, UnsupportedModelError
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.positions import block_mask, fused_positions
from kvfusion_rag.text.settings import ModelSettings, load_settings
from tests.fusion.test_fusion_laws import VOCABULARY, architectures, dtypes, logits_of, random_documents
from tests.test_generator import DOCUMENTS

REFERENCE = "tests_dense_ape"


def dense_reference(module, query, key, value, attention_mask, *, scaling, blocks, factors, **kwargs):
    """APE row by row from its definition: two softmaxes with their own sums, merged by exp(S LSE) and exp(LSE)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1)[0].double(), value.repeat_interleave(groups, dim=1)[0].double()
    prefix, documents, temperature, scale = *blocks, *factors
    end = prefix + documents
    out = torch.zeros(*query.shape[1:3], value.shape[-1], dtype=torch.float64)
    for head in range(query.shape[1]):
        for row in range(query.shape[2]):
            seen = attention_mask[0, 0, row]
            logits = (key[head] @ query[0, head, row].double()) * scaling
            inside = torch.zeros_like(seen)
            if row >= end:  # documents and prefix read as ever
                inside[prefix:end] = True
            parts = []
            for part, t, s in ((seen & inside, temperature, scale), (seen & ~inside, 1.0, 1.0)):
                if part.any():
                    exponentials = (logits[part] / t).exp()
                    total = exponentials.sum()
                    parts.append((total**s, (exponentials / total) @ value[head][part]))
            out[head, row] = sum(w * o for w, o in parts) / sum(w for w, _ in parts)
    return out.to(query.dtype).transpose(0, 1)[None], None


def dense_logits(network, prefix, documents, question, factors):
    """Logits after every token of ``question`` in one block-masked pass, the question behind the longest document."""
    AttentionInterface.register(REFERENCE, dense_reference)
    lengths = [len(ids) for ids in documents]
    ids = [*prefix, *(i for document in documents for i in document), *question]
    start = len(prefix) + max(lengths, default=0)
    network.set_attn_implementation(REFERENCE)
    logits = network(
        input_ids=torch.tensor([ids]),
        position_ids=fused_positions(len(prefix), lengths, start, len(question))[None],
        attention_mask=block_mask(len(prefix), lengths, len(question))[None, None],
        blocks=(len(prefix), sum(lengths)),
        factors=factors,
    ).logits
    return logits[0, -len(question) :]


@architectures
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), temperature=st.floats(0.3, 1.5), scale=st.floats(0.3, 1.3))
def test_answers_equal_a_dense_computation_from_the_definition(architecture, seed, temperature, scale):
    rng = random.Random(seed)
    made = tiny.backbone(architecture)
    factors = {"ape_temperature": temperature, "ape_scale": scale, "passage_length": 90, "mode": "ape"}
    gen = KVFusionGenerator(TorchModel(made), store=None).with_settings(**factors)
    documents, question = random_documents(rng, most=4), " ".join(rng.choices(VOCABULARY, k=4))
    steps, ids = logits_of(gen, question, documents)
    asked = gen._engine.encoder.encode_question(question)
    pieces = list(gen._engine.read(documents).keys.values())
    reference = tiny.model(architecture)
    expected = dense_logits(
        reference, gen._engine.encoder.prefix_ids, pieces, [*asked, *ids[:-1]], (temperature, scale)
    )[-len(ids) :]
    difference = (steps - expected).abs().max().item()
    assert difference < 1e-4 * expected.abs().max().item(), f"largest difference {difference}"


@architectures
@dtypes
def test_without_factors_it_is_fusion(architecture, dtype):
    gen = KVFusionGenerator(TorchModel(tiny.backbone(architecture, dtype)), store=None)
    neutral = gen.with_settings(mode="ape", ape_temperature=1.0, ape_scale=1)
    rng = random.Random(1)
    for _ in range(4):
        documents = random_documents(rng)
        expected, found = (logits_of(g, "who built it?", documents)[0] for g in (gen, neutral))
        error = float((found[0] - expected[0]).norm() / expected[0].norm())
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@architectures
def test_the_factors_matter(architecture):
    gen = tiny.generator(architecture, mode="ape", ape_temperature=1.0, ape_scale=1.0)
    plain = logits_of(gen, "who?", DOCUMENTS)[0][0]
    for name in ("ape_temperature", "ape_scale"):
        assert not torch.allclose(logits_of(gen.with_settings(**{name: 0.7}), "who?", DOCUMENTS)[0][0], plain)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16), ("bert", torch.float32)]
)
def test_any_order_gives_the_same_bits(architecture, dtype):
    gen = KVFusionGenerator(TorchModel(tiny.backbone(architecture, dtype)), store=None)
    rng = random.Random(2)
    for _ in range(5):
        report = gen.check_invariance("who?", random_documents(rng), permutations=4, mode="ape")
        assert report.mode == "ape" and report.identical


@architectures
def test_batch_equals_singles(architecture):
    gen = tiny.generator(architecture, prefix="the river ", mode="ape")
    rng = random.Random(5)
    questions = [" ".join(rng.choices(VOCABULARY, k=rng.randint(1, 12))) for _ in range(6)]
    documents = [random_documents(rng) for _ in range(5)] + [[]]  # the last row has none
    batch = gen.answer_batch(questions, documents, max_new_tokens=6)
    for answer, question, row in zip(batch, questions, documents, strict=True):
        single = gen.answer(question, row, max_new_tokens=6)
        assert (answer.text, answer.token_ids, answer.mode) == (single.text, single.token_ids, "ape")


def test_without_documents_it_is_plain_generation():
    gen = tiny.generator("llama", prefix="the river ")
    ids = [gen.answer("who?", [], mode=mode, max_new_tokens=6).token_ids for mode in ("ape", "concat")]
    assert ids[0] == ids[1]


def test_streams_and_stored_documents():
    gen = tiny.generator("llama", mode="ape")
    gen.answer("why?", DOCUMENTS, mode="fusion", max_new_tokens=1)
    stream = gen.stream("who?", DOCUMENTS, max_new_tokens=12)
    text = "".join(stream)
    answer = gen.answer("who?", DOCUMENTS, max_new_tokens=12)
    assert stream.answer is not None and stream.answer.mode == "ape"
    assert text == answer.text and stream.answer.token_ids == answer.token_ids
    assert {source.origin for source in answer.sources} == {"memory"}  # one document, one KV, whatever the mode
    assert answer.usage.cached_document_tokens == answer.usage.document_tokens > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model_folder):
    """A model, and an adapter that changes it."""
    adapter = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny.model("llama"), lora).save_pretrained(adapter)
    return model_folder, adapter


def test_adapter_and_tuned_decoder_take_no_part(folders, tmp_path, caplog):
    model, adapter = folders
    tiny.save(tmp_path, seed=1)
    base = KVFusionGenerator.from_pretrained(model, mode="ape")
    expected = base.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
    for tuning in ({"adapter": adapter}, {"decoder": tmp_path}):
        tuned = KVFusionGenerator.from_pretrained(model, **tuning)
        fused = tuned.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
        with caplog.at_level(logging.INFO):
            answer = tuned.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=8)
        assert answer.token_ids == expected != fused
        assert tuned.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids == fused  # and it is back
        assert "mode ape" in caplog.text and "tuned decoder off" in caplog.text
    assert "temperature 0.9, scale 0.9" in caplog.text


def test_every_other_pass_has_the_models_own_attention(folders):
    """Threads in all modes at once get what one caller gets, and the model names its own attention at any time."""
    gen = KVFusionGenerator.from_pretrained(folders[0], adapter=folders[1])
    modes = ("fusion", "ape", "concat")
    asked = [(f"who has {i} sacks?", modes[i % 3]) for i in range(12)]
    expected = [gen.answer(q, DOCUMENTS, mode=mode, max_new_tokens=5).token_ids for q, mode in asked]
    identity = gen.identity()
    found: list = [None] * len(asked)
    others: list = []

    def work(number: int) -> None:
        question, mode = asked[number]
        found[number] = gen.answer(question, DOCUMENTS, mode=mode, max_new_tokens=5).token_ids
        others.append(gen.identity() != identity)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert not any(others)
    assert gen._engine.model.backbone.model.config._attn_implementation == gen._engine.model.backbone.attention


def test_a_pass_that_fails_gives_the_attention_back():
    gen = tiny.generator("llama")
    expected = gen.answer("who?", DOCUMENTS, max_new_tokens=4).token_ids
    stop = RuntimeError("stop")

    def fail(module, *args):
        raise stop

    gen.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=1)
    hook = gen._engine.model.backbone.model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        gen.answer("who?", DOCUMENTS, mode="ape", max_new_tokens=4)
    hook.remove()
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=4).token_ids == expected


def test_an_attention_that_cannot_be_exchanged_is_refused():
    small = GPTJConfig(n_embd=48, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, vocab_size=512)
    made = Backbone(
        AutoModelForCausalLM.from_config(small), tiny.tokenizer("byte-bpe"), ModelSettings(), model_id="old"
    )
    gen = KVFusionGenerator(TorchModel(made), store=None)
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=2).token_ids
    with pytest.raises(
        UnsupportedModelError, match=r"'old' \(gptj\) cannot answer in mode 'ape' or measure attention: .* exchanged"
    ):
        gen.answer("who?", DOCUMENTS, mode="ape")


def test_the_question_follows_the_longest_document_and_the_window_is_kept():
    gen = tiny.generator("llama", passage_length=400, max_new_tokens=40)
    long = "the river runs past an old mill and sleeps " * 40
    tokens = gen.answer("who?", [long[:300]], mode="ape", max_new_tokens=1).usage.document_tokens
    request = gen._engine.request("who?", [long[:300], "a mill"], None, "ape", DecodingOptions(1))
    assert request.question.start == tokens < 400
    with pytest.raises(ContextLimitError, match="has 512"):
        gen.answer("who?" * 150, [long[:300]], mode="ape")


@pytest.mark.parametrize("name", ["ape_temperature", "ape_scale"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1", None])
def test_factors_are_numbers_above_zero(name, value):
    with pytest.raises(InvalidInputError, match=f"{name} is .* must be a number above 0"):
        ModelSettings(**{name: value})


def test_factors_come_from_the_models_file_and_from_the_caller(folders, tmp_path):
    model = folders[0]
    made = KVFusionGenerator.from_pretrained(model, ape_temperature=0.5, ape_scale=0.7)
    assert (made.settings.ape_temperature, made.settings.ape_scale) == (0.5, 0.7)
    with pytest.raises(InvalidInputError, match="ape_scale is 0"):
        KVFusionGenerator.from_pretrained(model, ape_scale=0)
    (tmp_path / "kvfusion.json").write_text('{"mode": "ape", "ape_temperature": 0.8}')
    found = load_settings(str(tmp_path), tiny.tokenizer("byte-bpe"), model_id="m")
    assert (found.mode, found.ape_temperature, found.ape_scale) == ("ape", 0.8, 0.9)
    (tmp_path / "kvfusion.json").write_text('{"ape_scale": "high"}')
    with pytest.raises(ModelLoadError, match="ape_scale is 'high'"):
        load_settings(str(tmp_path), tiny.tokenizer("byte-bpe"), model_id="m")


def test_other_settings_share_weights_store_and_warnings(caplog):
    gen = tiny.generator("llama", mode="ape")
    gen.prefill(DOCUMENTS)
    other = gen.with_settings(ape_scale=0.5, mode="fusion")
    assert (other.mode, other.settings.ape_scale, gen.settings.ape_scale) == ("fusion", 0.5, 0.9)
    for one in (gen, other):
        answer = one.answer("who?", DOCUMENTS, mode="fusion", max_new_tokens=1)
        assert {s.origin for s in answer.sources} == {"memory"}
    assert caplog.text.count("was not trained") == 1
    with pytest.raises(InvalidInputError, match="'ape_heat' is no setting; the settings are layout"):
        gen.with_settings(ape_heat=1)
