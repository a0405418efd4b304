"""Focus: scores are the model's own likelihoods, and answers equal those over the kept documents only."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, WORDS, generator, untuned

from kvfusion_rag import Document, InvalidInputError
from kvfusion_rag.engine.focus import LEAD, best_documents, document_scores, scored_question
from kvfusion_rag.text.documents import EncodedDocument, EncodedDocuments

VOCABULARY = WORDS.split()
QUESTION = "Who keeps the lamp of the mill?"


def made_documents(count: int, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    return [Document(" ".join(rng.choices(VOCABULARY, k=rng.randint(2, 30))), id=f"d{n}") for n in range(count)]


def used(answer) -> list[str]:
    return [source.id for source in answer.sources if source.used]


def scores(answer) -> dict[str, float | None]:
    return {source.id: source.focus_score for source in answer.sources}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_focus_scores_equal_log_probabilities_of_one_ordinary_pass(architecture):
    gen, documents = generator(architecture), made_documents(4)
    found = scores(gen.answer(QUESTION, documents, focus=1, max_new_tokens=1))
    encoder = gen._engine.encoder
    ids, lead = scored_question(encoder.plain, QUESTION)
    assert encoder.plain.encode(LEAD, continues=True) == list(ids[:lead])
    for document in documents:
        before = [*encoder.prefix_ids, *encoder.encode_document(document)]
        with torch.inference_mode():
            logits = gen._engine.model.backbone.model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
        at = range(len(before) + lead - 1, len(before) + len(ids) - 1)
        expected = sum(float(logits[i, token]) for i, token in zip(at, ids[lead:], strict=True))
        assert found[document.id] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["fusion", "ape", "concat"])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_answer_equals_the_answer_over_the_kept_documents(mode, most):
    gen, documents = generator(), made_documents(6)
    answer = gen.answer(QUESTION, documents, mode=mode, focus=most)
    kept = [document for document in documents if document.id in used(answer)]
    assert len(kept) == most and max(scores(answer), key=scores(answer).get) in used(answer)
    alone = gen.answer(QUESTION, kept, mode=mode, focus=None)
    assert (answer.token_ids, answer.text, answer.citations) == (alone.token_ids, alone.text, alone.citations)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert (
        gen.show_prompt(QUESTION, documents, mode=mode, focus=most).text
        == gen.show_prompt(QUESTION, kept, mode=mode).text
    )


def test_keeping_all_documents_is_plain_fusion():
    gen, documents = generator(), [*made_documents(3), Document(" "), made_documents(3)[0]]
    plain = gen.answer(QUESTION, documents, focus=None)
    for most in (3, 9):
        answer = gen.answer(QUESTION, documents, focus=most)
        assert answer.token_ids == plain.token_ids
        assert set(scores(answer).values()) == {None}
        assert [source.used for source in answer.sources] == [True, True, True, False, True]


@pytest.mark.parametrize("store", ["memory", None, "disk"])
@pytest.mark.parametrize("mode", ["fusion", "ape"])
def test_any_order_gives_the_same_bits_from_every_store(mode, store, tmp_path):
    gen = generator(store=tmp_path if store == "disk" else store)
    report = gen.check_invariance(QUESTION, made_documents(7), permutations=6, mode=mode, focus=3)
    assert report.identical, report


def test_a_batch_equals_single_questions():
    gen = generator()
    questions = [f"{QUESTION} {word}" for word in VOCABULARY[:5]]
    rows = [made_documents(3 + number % 4, seed=number // 2) for number in range(5)]
    together = gen.answer_batch(questions, rows, focus=2)
    alone = [gen.answer(question, row, focus=2) for question, row in zip(questions, rows, strict=True)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [scores(a) for a in together] == [scores(a) for a in alone]
    assert [used(a) for a in together] == [used(a) for a in alone]


def test_a_document_chosen_for_one_question_may_be_the_only_one_of_another():
    gen, documents = generator(), made_documents(4)
    kept = next(s.id for s in gen.answer(QUESTION, documents, focus=1, max_new_tokens=3).sources if s.used)
    [only] = [document for document in documents if document.id == kept]
    for order in ([documents, [only]], [[only], documents]):
        answers = generator().answer_batch([QUESTION] * 2, order, focus=1, max_new_tokens=3)
        assert answers[0].token_ids == answers[1].token_ids


def test_streams_and_tasks_choose_the_same_documents():
    gen, documents = generator(), made_documents(6)
    answer = gen.answer(QUESTION, documents, focus=2)
    stream = gen.stream(QUESTION, documents, focus=2)
    assert "".join(stream).strip() == answer.text
    found = asyncio.run(gen.aanswer(QUESTION, documents, focus=2))
    for other in (stream.answer, found):
        assert (other.token_ids, used(other), scores(other)) == (answer.token_ids, used(answer), scores(answer))


def test_documents_are_computed_once_even_without_a_store(monkeypatch):
    gen, documents = generator(store=None), made_documents(5)
    computed = []
    kvs = type(gen._engine.document_kvs)
    fetch = kvs.fetch
    monkeypatch.setattr(
        kvs,
        "fetch",
        lambda self, wanted, *args, **options: computed.extend(wanted) or fetch(self, wanted, *args, **options),
    )
    answer = gen.answer(QUESTION, documents, focus=2)
    prefixes = 1
    assert len(computed) == len(set(computed)) == len(documents) + prefixes
    assert {source.origin for source in answer.sources} == {"computed"}


def test_duplicates_count_once_and_blank_documents_do_not_count():
    gen = generator()
    documents = made_documents(4)
    best = used(gen.answer(QUESTION, documents, focus=1))[0]
    twin = Document(next(d.text for d in documents if d.id == best), id="twin")
    answer = gen.answer(QUESTION, [twin, Document("", id="blank"), *documents], focus=1)
    assert used(answer) == ["twin", best]
    assert scores(answer)["blank"] is None
    assert scores(answer)["twin"] == scores(answer)[best]


def test_sources_report_origins_of_dropped_documents():
    gen, documents = generator(), made_documents(5)
    gen.prefill(documents[:3])
    answer = gen.answer(QUESTION, documents, focus=1)
    assert [source.origin for source in answer.sources] == ["memory"] * 3 + ["computed"] * 2
    assert [source.miss for source in answer.sources] == [None] * 3 + ["absent"] * 2
    joined = gen.answer(QUESTION, documents, focus=1, mode="concat")
    assert [source.origin == "prompt" for source in joined.sources] == [s.used for s in joined.sources]


def test_split_documents_are_kept_whole():
    gen = generator(max_document_tokens=40, long_documents="split")
    documents = [*made_documents(3), Document(" ".join(VOCABULARY * 2), id="long")]
    answer = gen.answer(QUESTION, documents, focus=3)
    long = next(source for source in answer.sources if source.id == "long")
    assert long.pieces > 1 and long.focus_score is not None
    kept = [document for document in documents if document.id in used(answer)]
    assert gen.answer(QUESTION, kept).token_ids == answer.token_ids


def test_dropped_documents_get_no_attribution():
    answer = generator().answer(QUESTION, made_documents(5), focus=2, attribution="effects", max_new_tokens=4)
    assert all((source.effect == 0 and source.attention == 0) for source in answer.sources if not source.used)
    assert all(source.attention > 0 for source in answer.sources if source.used)


def test_auto_focus_uses_the_models_setting_in_mode_fusion_only():
    documents = made_documents(5)
    focused = generator(focus=2)
    assert len(used(focused.answer(QUESTION, documents))) == 2
    assert len(used(focused.answer(QUESTION, documents, focus=None))) == 5
    for mode in ("concat", "ape"):
        assert len(used(focused.answer(QUESTION, documents, mode=mode))) == 5
    assert len(used(untuned().answer(QUESTION, documents))) == 5


@settings(max_examples=40)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.1, 10))
def test_the_scale_of_retriever_scores_does_not_matter(values, weight, shift, scale):
    likelihoods = {(n,): -float(n) for n in range(len(values))}

    def ranked(given_scores):
        documents = [
            EncodedDocument(Document(str(n), score=score), str(n), ((n,),)) for n, score in enumerate(given_scores)
        ]
        return document_scores(documents, likelihoods, weight)

    moved = ranked([scale * value + shift for value in values])
    assert ranked(values) == pytest.approx(moved, abs=1e-3 * weight) or max(values) - min(values) < 1e-6
    partial = ranked([None, *values[1:]])
    assert partial == tuple(likelihoods.values())  # one document has no score, so scores are ignored


def test_a_heavy_weight_follows_the_retriever():
    documents = [Document(d.text, id=d.id, score=float(n)) for n, d in enumerate(made_documents(5))]
    assert used(generator(focus=1, focus_weight=1e4).answer(QUESTION, documents)) == ["d4"]
    assert used(generator(focus=1).answer(QUESTION, documents)) == used(
        generator(focus=1).answer(QUESTION, made_documents(5))
    )


def test_ties_are_broken_by_content():
    read = tuple(EncodedDocument(Document(str(n)), str(n), ((n,),)) for n in range(4))
    encoded = EncodedDocuments(read, {f"key{3 - n}": (n,) for n in range(4)})
    tokens = {(n,): [-1.0, -2.0] for n in range(4)}
    assert best_documents(encoded, tokens, 0.0, 2) == (2, 3)
    assert best_documents(encoded, tokens, 0.0, 9) == (0, 1, 2, 3)
    turned = EncodedDocuments(read[::-1], encoded.keys)
    assert {turned.documents[n].id for n in best_documents(turned, tokens, 0.0, 2)} == {"2", "3"}


def test_further_documents_add_to_what_the_first_explains():
    """The second best document alone explains nothing that the best one does not."""
    tokens = {(0,): [-1.0, -1.0, -6.0], (1,): [-1.5, -1.5, -6.0], (2,): [-7.0, -7.0, -1.0]}
    read = tuple(EncodedDocument(Document(str(n)), str(n), ((n,),)) for n in range(3))
    encoded = EncodedDocuments(read, {f"key{n}": (n,) for n in range(3)})
    assert best_documents(encoded, tokens, 0.0, 1) == (0,)
    assert best_documents(encoded, tokens, 0.0, 2) == (0, 2)
    assert best_documents(encoded, tokens, 0.0, 3) == (0, 1, 2)
    scored = tuple(replace(one, document=replace(one.document, score=1.0 - n)) for n, one in enumerate(read))
    assert best_documents(EncodedDocuments(scored, encoded.keys), tokens, 5.0, 2) == (0, 1)


def test_pieces_of_one_document_explain_together():
    """A split document is fused whole, so a token counts with the best of its pieces."""
    tokens = {(0,): [-1.0, -9.0, -9.0], (1,): [-9.0, -1.0, -9.0], (2,): [-9.0, -1.5, -9.5], (3,): [-9.5, -9.5, -4.0]}
    split = EncodedDocument(Document("0"), "0", ((0,), (1,)))
    read = (split, *(EncodedDocument(Document(str(n)), str(n), ((n,),)) for n in (2, 3)))
    encoded = EncodedDocuments(read, {f"key{n}": (n,) for n in range(4)})
    assert best_documents(encoded, tokens, 0.0, 1) == (0,)
    assert best_documents(encoded, tokens, 0.0, 2) == (0, 2)


@pytest.mark.parametrize("focus", [0, -1, 1.5, True, "all", "2"])
def test_a_wrong_focus_is_rejected(focus):
    with pytest.raises(InvalidInputError, match=r"focus is .* but it must be a number of documents from 1"):
        generator().answer(QUESTION, made_documents(3), focus=focus)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "0.5"])
def test_a_wrong_score_is_rejected(score):
    with pytest.raises(InvalidInputError, match="the score of document 1 is"):
        generator().answer(QUESTION, [Document("text", score=score)])


def test_settings_reject_wrong_values():
    with pytest.raises(InvalidInputError, match="focus is 'auto'"):
        generator(focus="auto")
    with pytest.raises(InvalidInputError, match="focus_weight is -1"):
        generator(focus_weight=-1)
