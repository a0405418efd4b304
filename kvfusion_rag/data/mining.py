"""Finds negatives: passages that are similar to the gold passage and do not contain an answer.

Contains a pool of distinct passages, rankings of it for a question (BM25, sentence vectors, random order), and the
draw that takes passages from the rankings in turn.
"""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from ..errors import MissingDependencyError
from ..retrieval.embedding import Embedder, embed_in_steps
from .answer_match import normalize_answer
from .rows import Passage

SORTED_FIRST = 128  # best passages; the rest are sorted only if all of these are rejected
FILLED = "fill"  # name of the random ranking that is used when the chosen ones are exhausted

_WORD = re.compile(r"\w+")


def text_key(text: str) -> bytes:
    """Return a key that is equal for texts that are equal after answers' normalisation."""
    return xxhash.xxh3_128_digest(normalize_answer(text).encode())


@dataclass(frozen=True, slots=True)
class MatchText:
    """A text prepared for matching answers: normalised as in the metrics, and as plain words.

    The second form finds words that the first joins with their neighbour ("Nixon" in "Nixon's", "67" in "67-member"),
    ignores accents, and treats each character of a script without spaces as a word.
    """

    normal: str
    words: str

    @classmethod
    def of(cls, text: str) -> MatchText:
        return cls(f" {normalize_answer(text)} ", f" {' '.join(_WORD.findall(_plain(text).lower()))} ")

    @property
    def blank(self) -> bool:
        """Whether normalisation leaves no word, as for "the". Such an answer never matches."""
        return not self.normal.strip()

    def holds(self, answers: Iterable[MatchText]) -> bool:
        """Return whether the text contains one of ``answers`` as whole words, in either form."""
        return any(
            answer.normal in self.normal or (bool(answer.words.strip()) and answer.words in self.words)
            for answer in answers
            if not answer.blank
        )


def _plain(text: str) -> str:
    """Return ``text`` without accents, with spaces around letters without case, such as Chinese and Thai ones."""
    if text.isascii():
        return text
    bare = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    letters = unicodedata.normalize("NFC", bare)
    return "".join(f" {char} " if unicodedata.category(char) == "Lo" else char for char in letters)


def shows_answer(passage: Passage, answers: Sequence[MatchText]) -> bool:
    """Return whether an answer is in the text or in the title, since the model reads both."""
    return any(MatchText.of(part).holds(answers) for part in (passage.text, passage.title or ""))


@dataclass
class Pool:
    """Distinct passages that negatives and missing gold passages are taken from.

    ``matches`` contains their texts. A gold passage is judged by its text, a negative also by its title (``shows``).
    """

    passages: list[Passage] = field(default_factory=list)
    matches: list[MatchText] = field(default_factory=list)
    _titles: dict[str, MatchText] = field(default_factory=dict)  # each once, since many passages share a title
    _sources: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    _texts: dict[bytes, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.passages)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sources

    def add(self, key: bytes, pieces: Iterable[Passage]) -> None:
        """Add the pieces of a text with a new key. A piece that is already here is not added again."""
        self._sources[key] = tuple(dict.fromkeys(self._add_piece(piece) for piece in pieces))

    def numbers(self, key: bytes) -> tuple[int, ...]:
        """Return the numbers of the passages that were cut from the text with ``key``, or () if there are none."""
        return self._sources.get(key, ())

    def shows(self, number: int, answers: Sequence[MatchText]) -> bool:
        """Return whether passage ``number`` contains an answer, as ``shows_answer`` does."""
        title = self.passages[number].title
        return self.matches[number].holds(answers) or (title is not None and self._titles[title].holds(answers))

    def _add_piece(self, piece: Passage) -> int:
        number = self._texts.setdefault(text_key(piece.text), len(self.passages))
        if number == len(self.passages):
            self.passages.append(piece)
            self.matches.append(MatchText.of(piece.text))
            if piece.title is not None and piece.title not in self._titles:
                self._titles[piece.title] = MatchText.of(piece.title)
        return number


class Ranking(ABC):
    """Orders the pool for a question, or for one of its own passages."""

    def prepare(self, questions: Sequence[str]) -> None:  # noqa: B027 - optional
        """Prepare for the next questions, if that is cheaper for several together."""

    @abstractmethod
    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        """Yield numbers of passages that are related to the question, the best first, each at most once."""

    @abstractmethod
    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        """Yield numbers of passages, the nearest to passage ``number`` first. It may include ``number`` itself."""


class BM25Ranking(Ranking):
    """Ranks passages that share words with the question, by bm25s (Lucene's variant, English stop words)."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingDependencyError.of_extra("mining with BM25", "bm25s", "train") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._tokenize: Callable[..., list[list[str]]] = bm25s.tokenize  # pyright: ignore[reportAttributeAccessIssue]
        self._index = bm25s.BM25()
        self._texts = [f"{p.title or ''} {p.text}" for p in passages]
        self._index.index(self._words(self._texts), show_progress=False)

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        ids = self._index.get_tokens_ids(self._words([question])[0])
        return _best_first(self._index.get_scores_from_ids(ids), above=0.0) if ids else iter(())

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return self.rank(self._texts[number], rng)

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


class DenseRanking(Ranking):
    """Ranks all passages by the similarity of their vectors to the question's."""

    def __init__(self, passages: Sequence[Passage], embedder: Embedder, *, progress: bool = False) -> None:
        self._embedder = embedder
        texts = [f"{p.title}\n{p.text}" if p.title else p.text for p in passages]
        self._vectors = embed_in_steps(embedder, texts, progress=progress)
        self._questions: dict[str, np.ndarray] = {}

    def prepare(self, questions: Sequence[str]) -> None:
        """Embed the questions in one call. The vectors are kept until the next call."""
        vectors = self._embedder.embed_questions(questions) if questions else []
        self._questions = dict(zip(questions, vectors, strict=True))

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        if question not in self._questions:
            self.prepare([question])
        return _best_first(self._vectors @ self._questions[question], above=-np.inf)

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return _best_first(self._vectors @ self._vectors[number], above=-np.inf)


class RandomRanking(Ranking):
    """Yields all passages in an order drawn by the row's own random numbers."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        moved: dict[int, int] = {}  # a lazy shuffle, since few numbers are read
        for n in range(self._size):
            drawn = rng.randrange(n, self._size)
            yield moved.get(drawn, drawn)
            moved[drawn] = moved.get(n, n)

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return self.rank("", rng)


def take_turns(
    count: int, rankings: Mapping[str, Iterator[int]], taken: set[int], refuse: Callable[[int], bool]
) -> dict[int, str]:
    """Return up to ``count`` passages, one from each ranking in turn, with the name of the ranking of each.

    Passages in ``taken`` and those that ``refuse`` rejects are skipped. Chosen ones are added to ``taken``. The
    ranking named ``FILLED`` is used only when the others are exhausted.
    """
    chosen: dict[int, str] = {}
    waiting = [name for name in rankings if name != FILLED] or [FILLED]
    while waiting and len(chosen) < count:
        name = waiting.pop(0)
        number = next((n for n in rankings[name] if n not in taken and not refuse(n)), None)
        if number is not None:
            taken.add(number)
            chosen[number] = name
            waiting.append(name)
        elif not waiting and name != FILLED and FILLED in rankings:
            waiting.append(FILLED)
    return chosen


def _best_first(scores: np.ndarray, *, above: float) -> Iterator[int]:
    """Yield the indices of scores greater than ``above``, best first, equal ones in order."""
    numbers = np.flatnonzero(scores > above)
    done = 0
    for count in sorted({min(SORTED_FIRST, len(numbers)), len(numbers)} - {0}):
        values = scores[numbers]
        near = numbers[values >= np.partition(values, len(values) - count)[len(values) - count]]
        order = near[np.argsort(-scores[near], kind="stable")].tolist()
        yield from order[done:]
        done = len(order)
