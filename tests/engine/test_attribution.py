"""Attribution: attention equals the model's own weights, and effects equal those of separate requests."""

import asyncio
import json
import random
import time
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import block_masks

from kvfusion_rag import Document, InvalidInputError, KVFusionGenerator, MemoryLimitError
from kvfusion_rag.engine import attribution
from kvfusion_rag.engine.attribution import Influence
from kvfusion_rag.fusion.torch_model import TorchModel
from kvfusion_rag.model.positions import fused_positions
from tests.fusion.test_fusion_laws import VOCABULARY, architectures, logits_of, random_documents
from tests.test_generator import DOCUMENTS

modes = pytest.mark.parametrize("mode", ["fusion", "concat", "ape"])


def dense(architecture, gen, pieces, question, answer):
    """Return the answer's logits and attention from one block-masked pass of transformers' eager model."""
    network = tiny.model(architecture).requires_grad_(False)
    network.set_attn_implementation("eager")
    prefix, lengths = list(gen._engine.encoder.prefix_ids), [len(ids) for ids in pieces]
    question_ids = [*question, *answer[:-1]]
    ids = [*prefix, *(i for piece in pieces for i in piece), *question_ids]
    start = len(prefix) + max([gen.settings.passage_length or 0, *lengths]) if lengths else len(prefix)
    positions = fused_positions(len(prefix), lengths, start, len(question_ids))
    out = network(
        input_ids=torch.tensor([ids]),
        position_ids=positions[None],
        attention_mask=block_masks(network.config, len(prefix), lengths, len(question_ids), positions, torch.float32),
        output_attentions=True,
    )
    weights = torch.stack(out.attentions)[:, 0, :, -len(answer) :].mean(dim=(0, 1, 2))  # (L, H, A, S) -> (S,)
    return out.logits[0, -len(answer) :], weights


def log_probability(logits, answer):
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


@architectures
@settings(max_examples=4)
@given(seed=st.integers(0, 2**16), passage_length=st.none() | st.integers(1, 60))
def test_effects_and_attention_equal_dense_passes(architecture, seed, passage_length):
    rng = random.Random(seed)
    gen = tiny.generator(architecture, prefix="the river ", passage_length=passage_length)
    documents = [*random_documents(rng, most=4), Document("  ", id="blank")]
    question = " ".join(rng.choices(VOCABULARY, k=4))
    answer = gen.answer(question, documents, max_new_tokens=5)
    question_ids = gen._engine.encoder.encode_question(question)
    found = gen.attribute(question, documents, answer=answer)

    def pieces(number=None):
        kept = [d for n, d in enumerate(documents) if n != number]
        return list(gen._engine.read(kept).keys.values())

    logits, weights = dense(architecture, gen, pieces(), question_ids, answer.token_ids)
    assert found.answer == answer.text and found.mode == "fusion"
    assert found.log_probability == pytest.approx(log_probability(logits, answer.token_ids), rel=1e-3, abs=1e-4)
    places, at = {}, len(gen._engine.encoder.prefix_ids)
    for ids in pieces():
        places[ids] = float(weights[at : at + len(ids)].sum())
        at += len(ids)
    for number, (document, influence) in enumerate(zip(documents, found.documents, strict=True)):
        own = gen._engine.encoder.encode_document(document)
        assert influence.attention == pytest.approx(places.get(own, 0.0), abs=1e-4)
        without, _ = dense(architecture, gen, pieces(number), question_ids, answer.token_ids)
        expected = log_probability(without, answer.token_ids)
        assert influence.log_probability == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert influence.effect == found.log_probability - influence.log_probability


@modes
def test_effects_equal_separate_requests_in_every_mode(mode):
    gen = tiny.generator("qwen3", mode=mode)
    documents = [*DOCUMENTS, DOCUMENTS[0]]
    answer = gen.answer("who?", documents, max_new_tokens=4)
    found = gen.attribute("who?", documents, answer=answer)
    logits, _ = logits_of(gen, "who?", documents)
    chosen = log_probability(logits[: len(answer.token_ids)], answer.token_ids)
    assert found.log_probability == pytest.approx(chosen, rel=1e-3)
    for number, influence in enumerate(found.documents):
        alone = gen.attribute("who?", documents[:number] + documents[number + 1 :], answer=answer)
        assert influence.log_probability == pytest.approx(alone.log_probability, rel=1e-3)
    assert 0 < sum(d.attention for d in found.documents[:-1]) < 1
    assert (found.documents[0].effect == 0) == (mode != "concat")  # its duplicate stays fused


def test_attribution_does_not_depend_on_order_or_store():
    bone = tiny.backbone("llama")
    expected = None
    for seed, store in ((0, "memory"), (1, None), (2, "memory")):
        documents = random.Random(seed).sample([*DOCUMENTS, "one more document"], len(DOCUMENTS) + 1)
        made = KVFusionGenerator(TorchModel(bone), store=store).attribute("who?", documents, max_new_tokens=5)
        texts = [d if isinstance(d, str) else d.text for d in documents]
        by_text = {t: (d.attention, d.effect) for t, d in zip(texts, made.documents, strict=True)}
        expected = expected or by_text
        assert by_text == expected


def test_attribution_in_parts_equals_one_pass(monkeypatch):
    gen = tiny.generator("llama")
    documents = [f"document {n} of the old mill" for n in range(7)]
    whole = gen.attribute("who?", documents, max_new_tokens=6)
    monkeypatch.setattr(attribution, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr("kvfusion_rag.fusion.attention_shares.WEIGHTS_AT_ONCE", 1)
    parts = gen.attribute("who?", documents, max_new_tokens=6)
    for one, other in zip(whole.documents, parts.documents, strict=True):
        assert one.attention == pytest.approx(other.attention, abs=1e-6)
        assert one.effect == pytest.approx(other.effect, abs=1e-4)


@modes
async def test_every_call_measures_the_requested_attribution(mode):
    gen = tiny.generator("llama", mode=mode)
    plain = gen.answer("who?", DOCUMENTS, max_new_tokens=5)
    assert all(source.attention is source.effect is None for source in plain.sources)
    expected = gen.attribute("who?", DOCUMENTS, answer=plain).documents
    for kind in ("attention", "effects"):
        stream = gen.stream("who?", DOCUMENTS, attribution=kind, max_new_tokens=5)
        assert "".join(stream) == plain.text
        answers = [
            gen.answer("who?", DOCUMENTS, attribution=kind, max_new_tokens=5),
            *gen.answer_batch(["who?"] * 2, [DOCUMENTS] * 2, attribution=kind, max_new_tokens=5),
            await gen.aanswer("who?", DOCUMENTS, attribution=kind, max_new_tokens=5),
            stream.answer,
        ]
        for answer in answers:
            assert answer.token_ids == plain.token_ids
            assert [source.attention for source in answer.sources] == [d.attention for d in expected]
            effects = [source.effect for source in answer.sources]
            assert effects == ([None] * 3 if kind == "attention" else [d.effect for d in expected])
        assert 0 < sum(source.attention for source in answers[0].sources) <= 1
        json.dumps(answers[0].to_dict())
        assert answers[0]._repr_html_().count("<th>") == (6 if kind == "attention" else 7)


def test_unknown_attribution_is_rejected():
    gen = tiny.generator("llama")
    for call in (gen.answer, gen.stream):
        with pytest.raises(InvalidInputError, match="'attention', 'effects' or None"):
            call("who?", DOCUMENTS, attribution="shapley")


def test_attribution_without_documents_is_empty():
    found = tiny.generator("llama").attribute("who?", [], max_new_tokens=3)
    assert found.documents == () and found.log_probability < 0


def test_a_text_can_be_attributed():
    gen = tiny.generator("llama")
    for text in ("the miller", "nobody knows"):
        found = gen.attribute("who?", DOCUMENTS, answer=text)
        ids = [*gen._engine.encoder.encode_answer(text), gen._engine.model.backbone.end_id]
        pieces = list(gen._engine.read(DOCUMENTS).keys.values())
        whole, _ = dense("llama", gen, pieces, gen._engine.encoder.encode_question("who?"), ids)
        assert found.log_probability == pytest.approx(log_probability(whole, ids), rel=1e-3)
    nothing = replace(gen.answer("who?", DOCUMENTS, max_new_tokens=1), token_ids=())
    with pytest.raises(InvalidInputError, match="no tokens"):
        gen.attribute("who?", DOCUMENTS, answer=nothing)


def test_html_is_escaped_and_the_plot_has_bars_for_every_document():
    pytest.importorskip("matplotlib").use("agg")
    documents = [Document("the mill", id="<b>1</b>", title="<script>$x$"), Document("the lamp", id="2" * 80)]
    found = tiny.generator("llama").attribute("who?", documents, max_new_tokens=3)
    shown = found._repr_html_()
    assert "<script>" not in shown and "<b>1" not in shown and "&lt;script&gt;" in shown
    axes = found.plot()
    axes.figure.canvas.draw()
    assert len(axes.patches) == len(axes.get_yticklabels()) == 2
    json.dumps(found.to_dict())
    assert found.to_dict()["question"] == "who?" and "who?" in shown


@pytest.mark.parametrize("effects", [[12.0, -0.5], [-3.0, -1.0], [0.0, 0.0], [1e-3, 2e-4], []])
@pytest.mark.parametrize("question", ["Who?", "Who built the mill for $5, and who for $6? " * 20])
def test_plot_shows_question_answer_and_one_zero(effects, question):
    pytest.importorskip("matplotlib").use("agg")
    documents = tuple(Influence(str(n), "W" * 60, 0.2, -1.0, effect) for n, effect in enumerate(effects))
    axes = attribution.Attribution(question, "Thomas Grant", -0.1, "fusion", documents).plot()
    figure = axes.figure
    figure.canvas.draw()
    shared = next(other for other in figure.axes if other is not axes)
    zeros = [one.transData.transform((0, 0))[0] for one in (axes, shared)]
    assert zeros[0] == pytest.approx(zeros[1])
    assert all(tick > 0 for tick in shared.get_xticks())  # the zero is at the other axis
    (title,) = figure.texts
    text = " ".join(title.get_text().split()).replace("\\$", "$")
    assert text.startswith(f"Question: {question[:100].strip()}") and text.endswith("Answer: Thomas Grant")
    assert len(text) < 250
    box, area = title.get_window_extent(), figure.bbox
    assert area.x0 <= box.x0 and box.x1 <= area.x1 and box.y1 <= area.y1


@pytest.mark.default_model
@pytest.mark.parametrize("mode", ["concat", "fusion"])
def test_the_document_with_the_answer_matters_most(mode, default_model):
    documents = [
        Document("The ferry has run since 1921. It carries forty cars and three hundred passengers.", id="ferry"),
        Document("The bakery on Mill Street was opened by Tomas Lindqvist in 1987.", id="bakery"),
        Document("The lighthouse was built by Edda Marsh.", id="lighthouse"),
    ]
    found = default_model.attribute("Who opened the bakery?", documents, answer="Tomas Lindqvist", mode=mode)
    best = max(found.documents, key=lambda d: d.effect)
    assert best.id == "bakery" and best.effect > 1
    assert "most='bakery'" in repr(found)


def test_attribution_measures_changed_weights(monkeypatch):
    gen = tiny.generator("llama")
    gen.prefill(DOCUMENTS)
    values = gen._engine.model.backbone.model.model.layers[0].self_attn.v_proj.weight
    answer_all = gen._engine.answer_all

    def changed_meanwhile(requests, options):
        with torch.no_grad():
            values.mul_(-1)
        return answer_all(requests, options)

    gen._queue._answer_all = changed_meanwhile
    late = gen.answer("who?", DOCUMENTS, attribution="effects", max_new_tokens=3)
    text = late.text
    after = KVFusionGenerator(gen._engine.model, store=None).attribute("who?", DOCUMENTS, answer=late)
    assert [s.effect for s in late.sources] == [d.effect for d in after.documents]
    with torch.no_grad():
        values.mul_(-1)
    fresh = KVFusionGenerator(gen._engine.model, store=None).attribute("who?", DOCUMENTS, answer=text or "the mill")
    assert gen.attribute("who?", DOCUMENTS, answer=text or "the mill").documents == fresh.documents


def test_removing_a_duplicate_moves_documents_at_global_positions():
    gen = tiny.generator("llama", positions="global")
    documents = [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]
    answer = gen.answer("who?", documents, max_new_tokens=3)
    found = gen.attribute("who?", documents, answer=answer)
    for number, influence in enumerate(found.documents):
        alone = gen.attribute("who?", documents[:number] + documents[number + 1 :], answer=answer)
        assert influence.log_probability == pytest.approx(alone.log_probability, rel=1e-3)
    assert found.documents[0].effect != 0 == found.documents[2].effect


def test_attribute_checks_arguments_and_uses_the_answers_mode():
    gen = tiny.generator("llama")
    with pytest.raises(InvalidInputError, match="an Answer, a text or None"):
        gen.attribute("who?", DOCUMENTS, answer=3)
    with pytest.raises(InvalidInputError, match="temprature"):
        gen.attribute("who?", DOCUMENTS, answer="x", temprature=3)
    joined = gen.answer("who?", DOCUMENTS, mode="concat", max_new_tokens=2)
    assert gen.attribute("who?", DOCUMENTS, answer=joined).mode == "concat"


async def test_a_cancelled_task_stops_measuring_at_the_next_pass(monkeypatch):
    gen = tiny.generator("llama")
    monkeypatch.setattr(attribution, "LOGITS_AT_ONCE", 1)
    documents = [f"document {n} of the old mill" for n in range(8)]
    begun, passes = asyncio.Event(), []
    loop, measure = asyncio.get_running_loop(), attribution._row_log_probabilities

    def counted(*arguments):
        passes.append(1)
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.1)
        return measure(*arguments)

    monkeypatch.setattr(attribution, "_row_log_probabilities", counted)
    task = asyncio.create_task(gen.aanswer("who?", documents, attribution="effects", max_new_tokens=2))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    done = len(passes)
    assert done < 9
    await asyncio.sleep(0.3)
    assert len(passes) == done


def test_running_out_of_memory_while_measuring_raises_our_error(monkeypatch):
    gen = tiny.generator("llama")

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gen._engine.model, "answer_likelihoods", fails)
    with pytest.raises(MemoryLimitError):
        gen.answer("who?", DOCUMENTS, attribution="effects", max_new_tokens=2)
