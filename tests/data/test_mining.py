"""Rankings of passages, matching of answers, and how passages are cut."""

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import WordEmbedder, count_words
from towns import TOWNS, contexts, make_builder
from tqdm import tqdm

from kvfusion_rag.data import DataBuilder, DataOptions
from kvfusion_rag.data.mining import SORTED_FIRST, BM25Ranking, DenseRanking, MatchText, RandomRanking, _best_first
from kvfusion_rag.data.rows import Passage
from kvfusion_rag.data.windows import cut_around, evidence_of, find_answer, split_passage
from kvfusion_rag.evaluation import answer_in_text


@given(st.lists(st.integers(0, 5), min_size=1, max_size=SORTED_FIRST * 3))
def test_best_first_is_a_stable_sort_of_positive_scores(scores):
    expected = sorted((n for n, score in enumerate(scores) if score > 0), key=lambda n: -scores[n])
    assert list(_best_first(np.array(scores, dtype=np.float32), above=0.0)) == expected


@given(st.integers(0, 30), st.integers())
def test_random_ranking_is_a_permutation(size, seed):
    assert sorted(RandomRanking(size).rank("", random.Random(seed))) == list(range(size))


def test_rankings_find_by_words_and_by_vectors():
    passages = [passage for example in TOWNS for passage in example.golds]
    rng = random.Random(0)
    for ranking in (BM25Ranking(passages), DenseRanking(passages, WordEmbedder(4096))):  # no two words in one bucket
        assert next(ranking.rank("the mill of Glen", rng)) == 6
        assert next(ranking.near(6, rng)) == 6
    assert list(BM25Ranking(passages).rank("the of", rng)) == []


def test_embedding_of_the_pool_shows_its_progress(monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            bars.append((self, options["disable"]))
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr("kvfusion_rag.retrieval.embedding.tqdm", Bar)
    monkeypatch.setattr("kvfusion_rag.retrieval.embedding.TEXTS_PER_STEP", 2)
    passages = [Passage(f"mill number {n}") for n in range(5)]
    embedder = WordEmbedder()
    for progress in (True, False):
        ranking = DenseRanking(passages, embedder, progress=progress)
        bar, disabled = bars[-1]
        assert disabled is (None if progress else True)  # None: unless stderr is not a terminal
        assert (bar.n, bar.total) == (5, 5)
        np.testing.assert_array_equal(ranking._vectors, embedder.embed_documents([p.text for p in passages]))


def test_embedding_questions_together_does_not_change_rankings(monkeypatch):
    calls: list[int] = []
    embed = WordEmbedder.embed_questions

    def counted(self, texts):
        calls.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(WordEmbedder, "embed_questions", counted)
    wanted = DataOptions(passages=(3, 3), negatives=("dense",))
    together = list(make_builder(TOWNS, wanted).rows())
    assert calls == [len(TOWNS)]
    monkeypatch.setattr("kvfusion_rag.data.build.PREPARED", 5)
    assert list(make_builder(TOWNS, wanted).rows()) == together and calls[1:] == [5, 5, 2]
    monkeypatch.setattr(DataBuilder, "_prepare", lambda self, examples: None)
    assert list(make_builder(TOWNS, wanted).rows()) == together and calls[4:] == [1] * len(TOWNS)


signs = "aAbthe 1.'-’_\u0301éß東京ก"


@given(st.text(signs, max_size=30), st.text(signs, max_size=3))
def test_answer_found_by_the_metric_is_found_by_matching(text, answer):
    if answer_in_text(text, [answer]) and answer_in_text(answer, [answer]) and MatchText.of(answer).normal.strip():
        assert MatchText.of(text).holds([MatchText.of(answer)])


def test_answers_next_to_hyphens_and_genitives_match():
    text = MatchText.of("Nixon's 67-member crew")
    assert text.holds([MatchText.of("Nixon")]) and text.holds([MatchText.of("67")])
    assert not text.holds([MatchText.of("ember"), MatchText.of("the"), MatchText.of("?!")])


@pytest.mark.parametrize(
    ("answer", "holding", "other"),
    [
        ("绍兴", "鲁迅的故居在绍兴市。", "鲁迅的故居在北京。"),
        ("Beyoncé", "Then Beyonce\u0301 sang.", "Then Bey sang."),
        ("Zurich", "Zürich lies there.", "Zuric lies there."),
        ("สมชาย", "คุณสมชายมา", "คุณมา"),
        ("서울", "서울은 크다", "부산은 크다"),
        ("art", "An art.", "A part."),
    ],
)
def test_answers_match_in_every_script_and_spelling(answer, holding, other):
    wanted = [MatchText.of(answer)]
    assert MatchText.of(holding).holds(wanted) and not MatchText.of(other).holds(wanted)


# Windows


@settings(max_examples=40)
@given(contexts, st.integers(1, 12), st.integers(0, 9), st.data())
def test_cut_keeps_the_answer_and_the_budget(text, limit, seed, data):
    words = [(start, start + len(word)) for word in set(text.split()) for start in [text.index(word)]]
    span = data.draw(st.sampled_from(sorted(words)))
    cut = cut_around(text, span, lambda piece: count_words(piece) <= limit, random.Random(seed))
    assert cut is not None and cut[0] <= span[0] and span[1] <= cut[1]
    piece = text[slice(*cut)]
    assert piece == piece.strip() and count_words(piece) <= limit
    assert count_words(piece) == count_words(text) or count_words(text) > limit


@settings(max_examples=40)
@given(contexts, st.integers(1, 12))
def test_pieces_fit_and_contain_every_word(text, limit):
    pieces = split_passage(text, lambda piece: count_words(piece) <= limit)
    assert all(count_words(piece) <= limit for piece in pieces)
    assert " ".join(pieces).split() == text.split()


def test_evidence_covers_all_sentences_of_the_answer():
    text = "One. Two is here. Three is there. Four."
    assert evidence_of(text, (5, 7)) == "Two is here."
    assert evidence_of(text, (12, 23)) == "Two is here. Three is there."
    assert find_answer(text, ["four"]) == (34, 38) and find_answer(text, ["Two"], 5) == (5, 8)
    assert find_answer(text, ["Two"], 9) == (5, 8) and find_answer(text, ["five"]) is None
