"""Finds negatives: passages that look like the right one and hold no answer.

A pool of distinct passages, rankings of it for a question (BM25, sentence vectors, chance), and the draw that takes
turns among them. Knows texts and answers only, neither files nor rows.
"""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import xxhash

from ..errors import MissingDependencyError
from ..retrieval.embedding import Embedder
from .answer_match import normalize_answer
from .rows import Passage

FIRST_LOOK = 128  # passages sorted at once; the rest only if all of these are refused
EMBEDDED_AT_ONCE = 16_384
FILLED = "fill"  # the ranking of chance, where the chosen ones ran out

_WORD = re.compile(r"\w+")


def text_key(text: str) -> bytes:
    """Equal for texts that are equal once normalised as answers are."""
    return xxhash.xxh3_128_digest(normalize_answer(text).encode())


@dataclass(frozen=True, slots=True)
class MatchText:
    """A text made ready to look for answers: normalised as the metrics do, and as bare words.

    The second form finds what the first joins with its neighbour ("Nixon" in "Nixon's", "67" in "67-member"), is blind
    to accents, and has each sign of a script without spaces as a word.
    """

    normal: str
    words: str

    @classmethod
    def of(cls, text: str) -> MatchText:
        return cls(f" {normalize_answer(text)} ", f" {' '.join(_WORD.findall(_plain(text).lower()))} ")

    @property
    def blank(self) -> bool:
        """Whether the metrics see no word in it, as in "the"; such an answer is found nowhere."""
        return not self.normal.strip()

    def holds(self, answers: Iterable[MatchText]) -> bool:
        """Whether one of ``answers`` stands here on whole words, in either form."""
        return any(
            answer.normal in self.normal or (bool(answer.words.strip()) and answer.words in self.words)
            for answer in answers
            if not answer.blank
        )


def _plain(text: str) -> str:
    """``text`` without accents, with spaces around every letter that has no case, as of Chinese and Thai."""
    if text.isascii():
        return text
    bare = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    letters = unicodedata.normalize("NFC", bare)
    return "".join(f" {char} " if unicodedata.category(char) == "Lo" else char for char in letters)


def shows_answer(passage: Passage, answers: Sequence[MatchText]) -> bool:
    """Whether an answer stands in the text or in the title, for a model reads both."""
    return any(MatchText.of(part).holds(answers) for part in (passage.text, passage.title or ""))


@dataclass
class Pool:
    """Distinct passages that negatives, and missing golds, are taken from.

    ``matches`` are their texts, by which a gold passage is judged; of a negative, the title counts too (``shows``).
    """

    passages: list[Passage] = field(default_factory=list)
    matches: list[MatchText] = field(default_factory=list)
    _titles: dict[str, MatchText] = field(default_factory=dict)  # each once, for many passages share one
    _sources: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    _texts: dict[bytes, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.passages)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sources

    def add(self, key: bytes, pieces: Iterable[Passage]) -> None:
        """Take the pieces of one text in, whose key must be new; a piece that is here already is not taken twice."""
        self._sources[key] = tuple(dict.fromkeys(self._add_piece(piece) for piece in pieces))

    def numbers(self, key: bytes) -> tuple[int, ...]:
        """Numbers of the passages made of the text of ``key``; none where it is not here."""
        return self._sources.get(key, ())

    def shows(self, number: int, answers: Sequence[MatchText]) -> bool:
        """What ``shows_answer`` says of passage ``number``."""
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


class Ranking(Protocol):
    """An order of the pool for a question, or for one of its own passages."""

    def prepare(self, questions: Sequence[str]) -> None:
        """These questions will be ranked for next; what is cheaper for all of them together may be done now."""
        ...

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        """Numbers of passages, the likeliest first, each at most once; only such as have to do with the question."""
        ...

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        """Numbers of passages, the nearest to passage ``number`` first; that one itself may be among them."""
        ...


class BM25Ranking:
    """Passages that share words with the question, by the library bm25s (Lucene's variant, English stop words)."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingDependencyError('mining with BM25 needs bm25s: pip install "kvfusion-rag[train]".') from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._tokenize: Callable[..., list[list[str]]] = bm25s.tokenize  # pyright: ignore[reportAttributeAccessIssue]
        self._index = bm25s.BM25()
        self._texts = [f"{p.title or ''} {p.text}" for p in passages]
        self._index.index(self._words(self._texts), show_progress=False)

    def prepare(self, questions: Sequence[str]) -> None:
        """Nothing is cheaper for several questions together."""

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        ids = self._index.get_tokens_ids(self._words([question])[0])
        return _best_first(self._index.get_scores_from_ids(ids), above=0.0) if ids else iter(())

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return self.rank(self._texts[number], rng)

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


class DenseRanking:
    """All passages by the likeness of their vectors to the question's."""

    def __init__(self, passages: Sequence[Passage], embedder: Embedder) -> None:
        self._embedder = embedder
        texts = [f"{p.title}\n{p.text}" if p.title else p.text for p in passages]
        parts = range(0, len(texts), EMBEDDED_AT_ONCE)
        self._vectors = np.concatenate([embedder.embed_documents(texts[n : n + EMBEDDED_AT_ONCE]) for n in parts])
        self._asked: dict[str, np.ndarray] = {}

    def prepare(self, questions: Sequence[str]) -> None:
        """Embed them in one call; the vectors are kept until the next ones come."""
        self._asked = dict(zip(questions, self._embedder.embed_questions(questions), strict=True)) if questions else {}

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        if question not in self._asked:
            self.prepare([question])
        return _best_first(self._vectors @ self._asked[question], above=-np.inf)

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return _best_first(self._vectors @ self._vectors[number], above=-np.inf)


class RandomRanking:
    """All passages in an order drawn from the row's own random numbers."""

    def __init__(self, size: int) -> None:
        self._size = size

    def prepare(self, questions: Sequence[str]) -> None:
        """Chance asks for nothing."""

    def rank(self, question: str, rng: random.Random) -> Iterator[int]:
        moved: dict[int, int] = {}  # a shuffle that costs only as much as is read of it
        for n in range(self._size):
            drawn = rng.randrange(n, self._size)
            yield moved.get(drawn, drawn)
            moved[drawn] = moved.get(n, n)

    def near(self, number: int, rng: random.Random) -> Iterator[int]:
        return self.rank("", rng)


def take_turns(
    count: int, rankings: Mapping[str, Iterator[int]], taken: set[int], refuse: Callable[[int], bool]
) -> dict[int, str]:
    """Up to ``count`` passages, one from each ranking in turn, with the name of the ranking that gave each.

    ``taken`` passages and those that ``refuse`` says no to are passed over; what is chosen joins ``taken``. The
    ranking named ``FILLED`` is asked only when the others have nothing left.
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
    """Numbers of the scores greater than ``above``, best first, equal ones in the order of the pool."""
    numbers = np.flatnonzero(scores > above)
    given = 0
    for look in sorted({min(FIRST_LOOK, len(numbers)), len(numbers)} - {0}):
        values = scores[numbers]
        near = numbers[values >= np.partition(values, len(values) - look)[len(values) - look]]
        order = near[np.argsort(-scores[near], kind="stable")].tolist()
        yield from order[given:]
        given = len(order)
