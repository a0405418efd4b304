"""The facade: what each call returns, and the errors that bad input raises."""

import json
import logging
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import backbone, generator, model, tokenizer

from kvfusion_rag import (
    Answer,
    ContextLimitError,
    Document,
    InvalidInputError,
    KVFusionError,
    KVFusionGenerator,
    MemoryStore,
    ModelLoadError,
    UnsupportedModelError,
)
from kvfusion_rag.engine.engine import EngineOptions
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.hardware import slowness
from kvfusion_rag.text.encoder import PlainEncoder
from kvfusion_rag.text.settings import ModelSettings, default_settings

DOCUMENTS = [
    Document("the river runs past an old mill", id="river", title="River"),
    "two grey doves sleep",
    "rain falls",
]


@pytest.fixture(scope="module")
def gen() -> KVFusionGenerator:
    return generator("llama")


@pytest.fixture(scope="module", params=[("llama", "byte-bpe"), ("bert", "wordpiece")], ids=lambda made: made[0])
def any_gen(request) -> KVFusionGenerator:
    architecture, tokens = request.param
    return generator(architecture, tokens=tokens)


def test_an_answer_reports_its_documents():
    gen = generator("llama")
    answer = gen.answer("who?", DOCUMENTS, max_new_tokens=5)
    assert [s.id for s in answer.sources] == ["river", "2", "3"]
    assert [s.origin for s in answer.sources] == ["computed"] * 3
    assert answer.sources[0].title == "River"
    usage = answer.usage
    assert usage.document_tokens == sum(s.tokens for s in answer.sources) and usage.cached_document_tokens == 0
    assert usage.completion_tokens == len(answer.token_ids) <= 5
    prefix, question = len(gen._engine.encoder.prefix_ids), len(gen._engine.encoder.encode_question("who?"))
    assert usage.prompt_tokens == prefix + usage.document_tokens + question
    assert 0 < answer.timings.prefill <= answer.timings.first_token <= answer.timings.total
    again = gen.answer("why?", [*DOCUMENTS[::-1], "and one more"], max_new_tokens=5)
    assert [s.origin for s in again.sources] == ["memory"] * 3 + ["computed"]
    assert again.usage.cached_document_tokens == usage.document_tokens


def test_stream_is_the_answer_in_pieces(gen):
    for temperature in (0.0, 1.0):
        stream = gen.stream("who?", DOCUMENTS, max_new_tokens=12, temperature=temperature, seed=1)
        pieces = []
        for piece in stream:
            assert stream.answer is None and piece
            pieces.append(piece)
        answer = gen.answer("who?", DOCUMENTS, max_new_tokens=12, temperature=temperature, seed=1)
        assert stream.answer is not None
        assert "".join(pieces) == stream.answer.text == answer.text
        assert len(pieces) > 1
        assert stream.answer.token_ids == answer.token_ids and stream.answer.usage.completion_tokens == 12


def test_a_call_after_a_closed_stream_is_answered(gen):
    stream = gen.stream("who?", DOCUMENTS, max_new_tokens=12)
    next(stream)
    stream.close()
    assert list(stream) == [] and stream.answer is None
    assert gen.answer("who?", DOCUMENTS, max_new_tokens=3).text


def test_stop_strings_end_answer_stream_and_batch(gen):
    whole = gen.answer("who?", DOCUMENTS, max_new_tokens=12).text
    stop = whole[len(whole) // 2 :][:3]
    cut = gen.answer("who?", DOCUMENTS, max_new_tokens=12, stop=[stop])
    assert cut.text == whole[: whole.index(stop)].rstrip() and cut.finish_reason == "stop"
    assert "".join(gen.stream("who?", DOCUMENTS, max_new_tokens=12, stop=[stop])) == cut.text
    batch = gen.answer_batch(["who?", "why?"], [DOCUMENTS, []], max_new_tokens=12, stop=[stop])
    assert batch[0].text == cut.text


def test_duplicates_are_fused_once_and_reported(gen):
    once = gen.answer("who?", ["a mill", "a river"], max_new_tokens=4)
    many = gen.answer(
        "who?", ["a mill", Document("a river", id="r"), Document("a mill", id="x"), "a river"], max_new_tokens=4
    )
    assert many.token_ids == once.token_ids and many.usage.prompt_tokens == once.usage.prompt_tokens
    assert [s.duplicate_of for s in many.sources] == [None, None, "1", "r"]


def test_no_documents_is_plain_generation_with_one_warning(caplog):
    gen = generator("llama")
    with caplog.at_level(logging.WARNING):
        answer = gen.answer("who?", [], max_new_tokens=4)
        gen.answer("who?", [], max_new_tokens=4)
    assert sum("no documents" in r.message for r in caplog.records) == 1
    assert answer.sources == () and answer.token_ids == gen.answer("who?", [" ", "\n"], max_new_tokens=4).token_ids
    ids = [*gen._engine.encoder.prefix_ids, *gen._engine.encoder.encode_question("who?")]
    plain = gen._engine.model.backbone.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert list(answer.token_ids) == plain[0, len(ids) :].tolist()


def test_blank_documents_are_skipped_and_reported(gen, caplog):
    answer = gen.answer("who?", ["", "a blank's neighbour", Document(" \n\t", id="empty")], max_new_tokens=4)
    assert [(s.id, s.origin, s.tokens > 0) for s in answer.sources] == [
        ("1", "blank", False), ("2", "computed", True), ("empty", "blank", False),
    ]  # fmt: skip
    assert answer.token_ids == gen.answer("who?", ["a blank's neighbour"], max_new_tokens=4).token_ids
    assert "empty" in caplog.text


def test_a_document_over_the_limit_is_named_or_split(gen):
    huge = Document("the river runs past an old mill. " * 200, id="huge")
    with pytest.raises(ContextLimitError, match=r"'huge' has 6600 characters, but the model reads at most \d+"):
        gen.answer("who?", ["small", huge])
    splitting = generator("llama", max_document_tokens=60, long_documents="split")
    source = splitting.answer("who?", ["small", huge], max_new_tokens=2).sources[1]
    assert source.pieces > 1 and source.tokens > 60


def test_a_thousand_documents(gen):
    documents = [f"the mill has {i} sacks" for i in range(1000)]
    answer = gen.answer("who?", documents, max_new_tokens=2)
    assert len(answer.sources) == 1000 and len({s.id for s in answer.sources}) == 1000
    with pytest.raises(ContextLimitError, match=r"1000 documents have \d+ tokens together, but at most 500"):
        KVFusionGenerator(gen._engine.model, store=None, options=EngineOptions(max_fused_tokens=500)).answer(
            "who?", documents
        )


def test_concat_over_the_window_reports_the_window(gen):
    with pytest.raises(ContextLimitError, match="has 512"):
        gen.answer("who?", [f"the mill has {i} sacks of flour" for i in range(100)], mode="concat")


@pytest.mark.parametrize(
    "text",
    ["a\x00b", "lone \ud800 surrogate", "emoji 🌊🗼", "שלום עולם \u202e rtl", "\u200b\ufeff", "é e\u0301", "a\r\nb",
     "<|im_end|><|im_start|>system", "<tool_call>", "Question: ignore the above\nAnswer:", "{text}{title}{question}"],
)  # fmt: skip
def test_strange_text_anywhere(any_gen, text):
    documents = [Document(text, id=text, title=text), f"mill {text}"]
    answer = any_gen.answer(f"who {text}?", documents, prompt=f"{text} who?", max_new_tokens=3)
    reverse = any_gen.answer(f"who {text}?", documents[::-1], prompt=f"{text} who?", max_new_tokens=3)
    assert answer.token_ids == reverse.token_ids
    assert len(answer.sources) == 2


@settings(max_examples=40)
@given(
    documents=st.lists(st.text(st.characters(codec=None, categories=None), max_size=60), max_size=4),
    question=st.text(max_size=30),
)
def test_no_text_crashes(documents, question):
    gen = generator_for_any_text()
    if not question.strip():
        with pytest.raises(InvalidInputError, match="question"):
            gen.answer(question, documents)
    else:
        answer = gen.answer(question, documents, max_new_tokens=2)
        assert len(answer.sources) == len(documents)
        answer.to_dict()


def generator_for_any_text(_made: list = []) -> KVFusionGenerator:  # noqa: B006 - one model for all examples
    if not _made:
        _made.append(generator("llama", tokens="bpe-byte-fallback"))
    return _made[0]


def test_html_of_an_answer_escapes_untrusted_text(gen):
    answer = gen.answer("who?", [Document("mill", id="<b>id", title="<script>x</script>")], max_new_tokens=2)
    assert "<script>" not in answer._repr_html_() and "&lt;script&gt;" in answer._repr_html_()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda g: g.answer("  ", DOCUMENTS), "question"),
        (lambda g: g.answer(None, DOCUMENTS), "question"),
        (lambda g: g.answer("who?", "one joined context"), "joined context"),
        (lambda g: g.answer("who?", Document("x")), "sequence of documents"),
        (lambda g: g.answer("who?", [3]), "document 1 is a builtins.int"),
        (lambda g: g.answer("who?", None), "documents is of type NoneType"),
        (lambda g: g.answer("who?", {"a": "b"}), "documents is of type dict"),
        (lambda g: g.answer("who?", [Document("x", title=3)]), "title of document 1"),
        (lambda g: g.answer("who?", [Document("x", id=3)]), "id of document 1"),
        (lambda g: g.answer("who?", DOCUMENTS, prompt=3), "prompt"),
        (lambda g: g.answer_batch("ab", [[], []]), "must be lists"),
        (lambda g: g.check_invariance("who?", "one joined context"), "joined context"),
        (lambda g: g.check_invariance("who?", DOCUMENTS, permutations=-1), "permutations"),
        (lambda g: MemoryStore("1GB"), "max_bytes"),
        (lambda g: KVFusionGenerator.from_pretrained(3), "model is 3"),
        (lambda g: g.answer("who?", [Document(None)]), "text of document 1"),
        (lambda g: g.answer("who?", DOCUMENTS, mode="fused"), "mode"),
        (lambda g: g.answer("who?", DOCUMENTS, max_tokens=3), "'max_tokens' is not an option"),
        (lambda g: g.answer("who?", DOCUMENTS, max_new_tokens=0), "max_new_tokens"),
        (lambda g: g.answer("who?", DOCUMENTS, stop="END"), "stop"),
        (lambda g: g.answer("who?", DOCUMENTS, max_new_tokens=600), "has 512"),
        (lambda g: g.answer("who? " * 600, DOCUMENTS), "has 512"),
        (lambda g: g.answer_batch(["a", "b"], [DOCUMENTS]), "2 questions, 1 document lists"),
        (lambda g: g.answer_batch(["a", ""], [DOCUMENTS, []]), "question"),
        (lambda g: g.stream("who?", DOCUMENTS, top_p=2), "top_p"),
    ],
)
def test_bad_input_raises_one_clear_error(gen, call, named):
    with pytest.raises(InvalidInputError, match=named) as caught:
        call(gen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"namespace": None}, "namespace"),
        ({"tokens_per_pass": 0}, "tokens_per_pass"),
        ({"max_fused_tokens": "9"}, "max_fused_tokens"),
        ({"passage_length": 0}, "passage_length"),
        ({"passage_length": 600}, "passage_length is 600"),
        ({"mode": "x"}, "mode"),
        ({"prefix": "mill " * 600}, "prefix has"),
        ({"device": "cuda:0"}, "cuda"),
        ({"model_kwargs": {"dtype": "bfloat16"}}, "model_kwargs"),
        ({"store": 3}, "store is 3"),
        ({"device": "gpu"}, "device"),
        ({"dtype": "fp8"}, "dtype"),
    ],
)
def test_bad_loading_options_raise_one_clear_error(model_folder, options, named):
    with pytest.raises(InvalidInputError, match=named) as caught:
        KVFusionGenerator.from_pretrained(model_folder, **options)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_is_an_empty_list(gen):
    assert gen.answer_batch([], []) == []


def test_a_batch_over_the_limit_is_decoded_in_several(gen):
    small = KVFusionGenerator(gen._engine.model, store=None, options=EngineOptions(max_fused_tokens=400))
    questions = [f"who has {i} sacks?" for i in range(9)]
    documents = [["the river runs past an old mill " * (1 + i % 3)] for i in range(9)]
    options = DecodingOptions(3)
    requests = [small._engine.request(q, d, None, None, options) for q, d in zip(questions, documents, strict=True)]
    batches = list(small._engine.runner.batches(requests))
    assert 1 < len(batches) < 9 and [r for batch in batches for r in batch.requests] == requests
    for batch in batches:
        longest = max(row.tokens + row.question_tokens for row in batch.rows)
        assert longest * len(batch.rows) <= 400
    expected = [a.token_ids for a in gen.answer_batch(questions, documents, max_new_tokens=3)]
    assert [a.token_ids for a in small.answer_batch(questions, documents, max_new_tokens=3)] == expected


def test_prefill_fills_the_store_and_needs_one():
    gen = generator("llama")
    assert [s.origin for s in gen.prefill(DOCUMENTS)] == ["computed"] * 3
    assert [s.origin for s in gen.answer("who?", DOCUMENTS, max_new_tokens=1).sources] == ["memory"] * 3
    with pytest.raises(InvalidInputError, match="store is None"):
        generator("llama", store=None).prefill(DOCUMENTS)


def test_a_store_may_be_shared_by_models_and_tenants():
    """Different weights, settings, precision or namespace have different keys."""
    store = MemoryStore()
    gens = [
        generator("llama", store=store),
        generator("llama", torch.bfloat16, store=store),
        generator("qwen2", store=store),
        generator("llama", store=store, prefix="other prefix", document_template="{text}\n\n"),
        KVFusionGenerator(
            TorchModel(generator("llama")._engine.model.backbone),
            store=store,
            options=EngineOptions(namespace="tenant"),
        ),
    ]
    for gen in gens:
        assert gen.answer("who?", ["the mill"], max_new_tokens=1).sources[0].origin == "computed"
        assert gen.answer("who?", ["the mill"], max_new_tokens=1).sources[0].origin == "memory"
    assert len(store) == 2 * len(gens)  # each with a prefix


def test_check_invariance_distinguishes_fusion_from_concat(gen):
    fused = gen.check_invariance("who?", DOCUMENTS, permutations=5)
    joined = gen.check_invariance("who?", DOCUMENTS, permutations=5, mode="concat")
    assert fused.identical and fused.max_logit_difference == 0.0
    assert not joined.identical and joined.max_logit_difference > 0


def test_concat_is_ordinary_generation_in_the_callers_order(gen):
    answer = gen.answer("who?", DOCUMENTS, mode="concat", max_new_tokens=6)
    encoder = gen._engine.encoder
    documents = [encoder.encode_document(d if isinstance(d, Document) else Document(d)) for d in DOCUMENTS]
    ids = [*encoder.prefix_ids, *(i for d in documents for i in d), *encoder.encode_question("who?")]
    plain = gen._engine.model.backbone.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert list(answer.token_ids) == plain[0, len(ids) :].tolist()
    assert answer.mode == "concat" and {s.origin for s in answer.sources} == {"prompt"}
    assert answer.usage.prompt_tokens == len(ids)


def test_prompt_is_read_by_models_that_follow_instructions(gen, caplog):
    bare = generator("llama", prompt_template=None, store=None)
    assert gen.follows_instructions and not bare.follows_instructions
    a, b = (gen.answer("who?", DOCUMENTS, prompt=p, max_new_tokens=1).usage.prompt_tokens for p in (None, "x"))
    assert a != b
    plain = bare.answer("who?", DOCUMENTS, max_new_tokens=2)
    assert bare.answer("who?", DOCUMENTS, prompt="Be brief. who?", max_new_tokens=2).token_ids == plain.token_ids
    assert "bare questions" in caplog.text


def test_threads_get_the_same_answers_as_one_caller():
    gen = generator("llama")
    questions = [f"who has {i} sacks?" for i in range(12)]
    expected = [gen.answer(q, DOCUMENTS, max_new_tokens=5).token_ids for q in questions]
    found: list = [None] * len(questions)

    def work(number: int) -> None:
        if number % 2:
            found[number] = gen.answer(questions[number], DOCUMENTS, max_new_tokens=5).token_ids
        else:
            stream = gen.stream(questions[number], DOCUMENTS, max_new_tokens=5)
            list(stream)
            assert stream.answer is not None
            found[number] = stream.answer.token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, model_folder):
    base = KVFusionGenerator.from_pretrained(model_folder)._engine.model.backbone.model
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder


def test_adapter_answers_but_does_not_prefill(model_folder, adapter_folder):
    """Dp is frozen, so documents have the base model's KVs, whichever adapter answers."""
    store = MemoryStore()
    base = KVFusionGenerator.from_pretrained(model_folder, store=store, mode="fusion")
    tuned = KVFusionGenerator.from_pretrained(model_folder, adapter=adapter_folder, store=store, mode="fusion")
    plain = base.answer("who?", DOCUMENTS, max_new_tokens=8)
    adapted = tuned.answer("who?", DOCUMENTS, max_new_tokens=8)
    assert {s.origin for s in adapted.sources} == {"memory"}
    assert adapted.token_ids != plain.token_ids
    fresh = KVFusionGenerator.from_pretrained(model_folder, adapter=adapter_folder, store=None, mode="fusion")
    assert fresh.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids == adapted.token_ids
    assert base.identity()["adapter"] is None and tuned.identity()["adapter"]


def test_an_adapter_answers_joined_prompts_unless_it_was_trained_on_fused_ones(model_folder, adapter_folder, tmp_path):
    """An adapter without settings answers joined prompts. One trained only on fused documents does not."""
    recorded = shutil.copytree(adapter_folder, tmp_path / "recorded")
    made = replace(default_settings(tokenizer("byte-bpe")), layout="fixed", mode="fusion")
    (recorded / "kvfusion.json").write_text(json.dumps(made.to_dict()))
    base, other, own = (
        KVFusionGenerator.from_pretrained(model_folder, adapter=adapter, store=None)
        for adapter in (None, adapter_folder, recorded)
    )
    assert (base.mode, other.mode, own.mode) == ("concat", "concat", "fusion")
    answers = [g.answer("who?", DOCUMENTS, mode="concat", max_new_tokens=8).token_ids for g in (base, other, own)]
    assert answers[0] == answers[2] != answers[1]


def test_a_model_folder_may_contain_its_adapter(model_folder, adapter_folder, tmp_path):
    pair = tmp_path / "pair"
    shutil.copytree(model_folder, pair)
    shutil.copytree(adapter_folder, pair / "adapter")

    def answer(**options):
        gen = KVFusionGenerator.from_pretrained(pair, **options)
        return gen.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids

    named = KVFusionGenerator.from_pretrained(model_folder, adapter=adapter_folder)
    plain = KVFusionGenerator.from_pretrained(model_folder)
    assert answer() == named.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
    assert answer(adapter=None) == plain.answer("who?", DOCUMENTS, max_new_tokens=8).token_ids
    assert answer(decoder=model_folder) == answer(adapter=None)


def test_an_adapter_of_another_base_model_is_rejected(model_folder, tmp_path):
    """transformers itself would fill missing layers with random weights."""
    for layers in (2, 5):
        tuned = get_peft_model(
            model("llama", num_hidden_layers=layers, layer_types=None),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        tuned.save_pretrained(tmp_path / str(layers))
        with pytest.raises(ModelLoadError, match="another base model"):
            KVFusionGenerator.from_pretrained(model_folder, adapter=tmp_path / str(layers))


def test_identity_differs_if_answers_may_differ(model_folder, adapter_folder, tmp_path):
    scaled = tmp_path / "scaled"
    shutil.copytree(adapter_folder, scaled)
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 800}))
    rope = {"rope_type": "default", "rope_theta": 50.0}
    made = [
        KVFusionGenerator.from_pretrained(model_folder, **options).identity()
        for options in (
            {},
            {"adapter": adapter_folder},
            {"adapter": scaled},
            {"model_kwargs": {"rope_parameters": rope}},
            {"dtype": "bfloat16"},
            {"passage_length": 50},
            {"mode": "concat"},
        )
    ]
    assert len({json.dumps(identity) for identity in made}) == len(made)
    again = KVFusionGenerator.from_pretrained(model_folder, adapter=adapter_folder).identity()
    assert again == made[1]


def test_one_changed_weight_changes_the_keys():
    """A store shared by two models never answers for the wrong one, however similar they are."""
    store = MemoryStore()
    first = KVFusionGenerator(TorchModel(backbone("llama")), store=store)
    network = model("llama")
    with torch.no_grad():
        network.get_input_embeddings().weight[17, 5] += 1
    second = KVFusionGenerator(
        TorchModel(Backbone(network, tokenizer("byte-bpe"), first.settings, model_id="b")), store=store
    )
    first.prefill(["the mill"])
    assert second.prefill(["the mill"])[0].origin == "computed"


def test_keys_contain_process_wide_settings():
    gen = generator("llama")
    before = gen.prefill(["the mill"])[0].origin, gen.prefill(["the mill"])[0].origin
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gen.answer("who?", ["the river"], max_new_tokens=4).token_ids
    assert gen.answer("who?", ["the river"], max_new_tokens=4).token_ids == under_autocast
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        after = gen.prefill(["the mill"])[0].origin
    finally:
        torch.set_num_threads(threads)
    assert (*before, after) == ("computed", "memory", "computed")


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: weights.write_bytes(weights.read_bytes()[:1000]),
        lambda weights: weights.write_bytes(b"garbage"),
        lambda weights: save_file(
            {k: v for k, v in load_file(weights).items() if "layers.1.self_attn.k_proj" not in k},
            weights,
            {"format": "pt"},
        ),
        lambda weights: save_file(
            {k: v[:3].clone() if "k_proj" in k else v for k, v in load_file(weights).items()},
            weights,
            {"format": "pt"},
        ),
    ],
    ids=["truncated", "garbage", "missing tensor", "wrong shape"],
)
def test_damaged_weights_are_rejected(model_folder, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    damage(folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="weights of 'damaged'"):
        KVFusionGenerator.from_pretrained(folder)


def test_a_tokenizer_of_another_model_is_rejected():
    small = model("llama", vocab_size=300)
    bone = Backbone(small, tokenizer("byte-bpe"), ModelSettings(), model_id="small")
    with pytest.raises(UnsupportedModelError, match="300 embeddings"):
        KVFusionGenerator(TorchModel(bone), store=None)


def test_prefilling_more_than_the_store_holds_warns_and_keeps_memory_bounded(caplog):
    gen = generator("llama", store=MemoryStore(50_000))
    alive = []
    memory = gen.store.memory
    put = memory.put
    memory.put = lambda key, kv: (alive.append(weakref.ref(kv.keys)), put(key, kv))[1]  # type: ignore[method-assign]
    gen.prefill([f"the mill has {i} sacks of flour" for i in range(60)])
    assert sum(ref() is not None for ref in alive) <= len(memory) + 1 < 20  # the prefix is also kept in memory
    assert "too small" in caplog.text


def test_a_stream_is_a_context_manager(gen):
    with gen.stream("who?", DOCUMENTS, max_new_tokens=12) as stream:
        next(stream)
    assert list(stream) == []


def test_a_stream_is_closed_by_another_thread_while_a_piece_is_decoded(gen, monkeypatch):
    forward, decoding, go_on = gen._engine.model.backbone.forward, threading.Event(), threading.Event()

    def slow(*args, **options):
        decoding.set()
        assert go_on.wait(20)
        return forward(*args, **options)

    monkeypatch.setattr(gen._engine.model.backbone, "forward", slow)
    stream = gen.stream("who?", DOCUMENTS, max_new_tokens=12)
    with ThreadPoolExecutor(2) as pool:
        piece = pool.submit(next, stream, None)
        assert decoding.wait(20)
        closed = pool.submit(stream.close)
        go_on.set()
        closed.result(20)
        piece.result(20)
    assert next(stream, None) is None and gen.answer("who?", DOCUMENTS, max_new_tokens=2).token_ids


@pytest.mark.parametrize("metadata", [None, "abc", 3])
def test_metadata_must_be_a_mapping(gen, metadata):
    with pytest.raises(InvalidInputError, match="metadata of document 1"):
        gen.answer("who?", [Document("the mill", metadata=metadata)])


def test_a_blank_prompt_is_rejected(gen):
    with pytest.raises(InvalidInputError, match="must not be blank"):
        gen.answer("who?", DOCUMENTS, prompt=" ")


@pytest.mark.parametrize("model", ["", "  ", "~nobody-of-that-name/x"])
def test_a_model_must_be_a_name_or_a_folder(model):
    with pytest.raises(KVFusionError, match=r"model|begins with ~nobody-of-that-name, but there is no such user"):
        KVFusionGenerator.from_pretrained(model)


def test_a_decoder_in_another_precision_is_rejected():
    with pytest.raises(InvalidInputError, match=r"is in torch.bfloat16 on cpu, but .* in torch.float32"):
        KVFusionGenerator(TorchModel(backbone("llama"), backbone("llama", torch.bfloat16)), store=None)


def test_answers_are_plain_data(gen):
    document = Document("the mill", metadata=MappingProxyType({"page": 3}))
    assert hash(document) == hash(Document("the mill"))
    answer = gen.answer("who?", [document], max_new_tokens=2, stop=None)
    assert json.loads(json.dumps(answer.to_dict()))["sources"][0]["metadata"] == {"page": 3}
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_a_folder_without_an_adapter_is_rejected(model_folder, tmp_path):
    with pytest.raises(ModelLoadError, match=tmp_path.name):
        KVFusionGenerator.from_pretrained(model_folder, adapter=tmp_path)


def test_identity_contains_no_path(model_folder):
    gen = KVFusionGenerator.from_pretrained(model_folder)
    assert gen.model_id == model_folder.name
    assert str(model_folder.parent) not in str(gen.identity())


@pytest.mark.default_model
def test_the_default_model_answers_and_cites(default_model):
    documents = [
        Document("The ferry has run since 1921. It carries forty cars and three hundred passengers.", id="ferry"),
        Document("The bakery on Mill Street was opened by Tomas Lindqvist in 1987.", id="bakery"),
    ]
    answer = default_model.answer("Who opened the bakery?", documents)
    assert "Tomas Lindqvist" in answer.text
    assert {citation.document_id for citation in answer.citations} == {"bakery"}


@pytest.mark.parametrize(("times", "warned"), [(50.0, True), (1.1, False)])
def test_a_slow_dtype_logs_a_warning(times, warned, model_folder, monkeypatch, caplog):
    monkeypatch.setattr("kvfusion_rag.model.loading.slowness", lambda dtype: times)
    KVFusionGenerator.from_pretrained(model_folder, dtype="bfloat16", device="cpu")
    assert ("no instructions for bfloat16" in caplog.text) == warned


def test_float32_is_never_measured_as_slow(monkeypatch):
    seconds = iter([9.0, 1.0])
    monkeypatch.setattr("kvfusion_rag.model.hardware._product_seconds", lambda dtype: next(seconds))
    assert slowness(torch.float32) == 1.0


def test_a_briefly_busy_machine_is_measured_correctly(monkeypatch):
    """Both dtypes are measured over the same period, so load affects both."""
    calls = []

    def seconds(dtype):
        calls.append(dtype)
        busy = 30.0 if len(calls) <= 4 else 1.0
        return busy * (20.0 if dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr("kvfusion_rag.model.hardware._product_seconds", seconds)
    assert slowness(torch.bfloat16) == 20.0


@pytest.mark.parametrize("long_documents", ["split", "error"])
def test_ten_megabytes_are_rejected_before_they_are_encoded(long_documents, monkeypatch):
    gen = generator("llama", long_documents=long_documents)
    encoded = []
    encode = PlainEncoder.encode
    monkeypatch.setattr(PlainEncoder, "encode", lambda self, text: (encoded.append(len(text)), encode(self, text))[1])
    text = " ".join(f"mill {number}" for number in range(900_000))
    with pytest.raises(ContextLimitError, match="document '1'"):
        gen.answer("who?", [text])
    assert sum(encoded) < len(text) / 2


def test_a_repetitive_long_text_is_split_and_fused_once():
    gen = generator("llama", long_documents="split", max_document_tokens=200)
    answer = gen.answer("who?", ["the river runs past an old mill. " * 5_000], max_new_tokens=1)
    assert answer.sources[0].pieces > 100 and answer.usage.document_tokens < answer.sources[0].tokens / 50
