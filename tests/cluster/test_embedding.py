"""Texts that the workers of a cluster embed, here in this process: the model's own vectors, in order."""

from __future__ import annotations

from functools import partial
from itertools import count

import numpy as np
import pytest
from indexes import WordEmbedder, open_index

from kvfusion_rag import RetrievalError
from kvfusion_rag.cluster import ClusterEmbedder
from kvfusion_rag.cluster.embedding import TEXTS_FOR_WORKERS, EmbedTask

TEXTS = [f"mill {n} has {n} sacks" for n in range(TEXTS_FOR_WORKERS + 100)]


def test_vectors_are_those_of_the_model_in_order():
    loaded: list[WordEmbedder] = []

    def load() -> WordEmbedder:
        loaded.append(WordEmbedder())
        return loaded[-1]

    embedder = ClusterEmbedder(load, None)
    assert np.array_equal(embedder.embed_documents(TEXTS), WordEmbedder().embed_documents(TEXTS))
    assert loaded[0].texts == [] and loaded[1].texts == TEXTS
    assert np.array_equal(embedder.embed_documents(TEXTS[:9]), WordEmbedder().embed_documents(TEXTS[:9]))
    assert loaded[0].texts == TEXTS[:9] and len(loaded) == 2
    assert np.array_equal(embedder.embed_questions(["a b"])[0], embedder.embed_question("a b"))
    assert (embedder.name, embedder.fingerprint) == (loaded[0].name, loaded[0].fingerprint)


def test_worker_with_another_model_is_refused():
    sizes = count(8)
    with pytest.raises(RetrievalError, match="words-9"):
        ClusterEmbedder(lambda: WordEmbedder(next(sizes)), None).embed_documents(TEXTS)
    assert EmbedTask(partial(WordEmbedder, 8), "words-8").start(None)(["x"])


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_index_is_the_same_whatever_the_size_of_a_step(tmp_path, step):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"The mill number {number} was built by family {number % 7}. " * 5)
    found = []
    for size in (64, step):
        with open_index(chunks_per_step=size) as index:
            index.update(tmp_path)
            found.append((index.documents(), index.search("who built mill number 3?", 9)))
    assert found[0] == found[1]
