"""Questions about towns for tests of training data: fixed ones, and Hypothesis strategies with few distinct words."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import strategies as st
from indexes import WordEmbedder, count_words

from kvfusion_rag import InvalidInputError
from kvfusion_rag.data import DataBuilder, DataOptions, Example
from kvfusion_rag.data.rows import Passage, QARow

# Few words, so that answers are in many contexts


WORDS = ["mill", "river", "tower", "harbour", "old", "red", "1901", "1902", "Ann", "Ben", "the", "north"]
sentences = st.lists(st.sampled_from(WORDS), min_size=2, max_size=7).map(lambda words: f"It is {' '.join(words)}.")
contexts = st.lists(sentences, min_size=1, max_size=4).map(" ".join)
titles = st.none() | st.sampled_from([*WORDS, "Town"])  # some contain an answer that the text does not
passages = st.builds(Passage, contexts, titles)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw a question with a context, which mostly contains its answer."""
    context, title = draw(contexts), draw(titles)
    others = tuple(draw(st.lists(passages, max_size=2)))
    question = f"What is {' '.join(draw(st.lists(st.sampled_from(WORDS), max_size=3)))}?"
    number = str(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["answered"] * 4 + ["elsewhere", "unanswerable"]))
    if kind == "unanswerable":
        return Example("world", number, question, (), (Passage(context, title), *others))
    answer = draw(st.sampled_from(context.replace(".", "").split() if kind == "answered" else WORDS))
    return Example("world", number, question, (answer, "Zeno"), (*others, Passage(context, title, True)))


worlds = st.lists(examples(), min_size=2, max_size=14, unique_by=lambda example: example.id)
corpora = st.lists(passages, min_size=4, max_size=14)


NAMES = ("Arda", "Bree", "Cairn", "Dorn", "Esk", "Firth", "Glen", "Holm", "Inch", "Jura", "Kell", "Lorn")
TOWNS = [
    Example(
        f"towns, line {n}",
        str(n),
        f"When was the mill of {town} built?",
        (str(1900 + n),),
        (Passage(f"{town} lies inland. Its mill was built in {1900 + n}. It is red.", town, True),),
    )
    for n, town in enumerate(NAMES)
]
MILLS = [Passage(f"A mill {word} a river.") for word in ("by", "on", "near", "under")]


def make_builder(world: list[Example], options: DataOptions, **parts) -> DataBuilder:
    return DataBuilder(lambda: world, options, count_tokens=count_words, embedder=WordEmbedder(), **parts)


def build(world: list[Example], options: DataOptions, **parts) -> tuple[DataBuilder, list[QARow]] | None:
    """Return builder and rows, or None if the world is too small for ``options``."""
    try:
        builder = make_builder(world, options, **parts)
    except InvalidInputError as error:
        assert "distinct passages" in str(error)
        return None
    return builder, list(builder.rows())


def rows_of(world: list[Example], **options) -> list[QARow]:
    return list(make_builder(world, DataOptions(**options)).rows())


def write(path: Path, content: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path
