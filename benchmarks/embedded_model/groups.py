"""Groups of documents with their questions: what one training step of the base model reads.

A group holds documents of one topic (neighbours by BM25) or of any; all questions on its documents are asked over
all of them. Cloze questions, made of a name or number in a document and the words around it, teach copying where
real questions are few. Every batch is a function of the seed and the step alone, so a run can be taken up anywhere.
Knows tokenizers, but no weights.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from reader import GroupBatch
from transformers import PreTrainedTokenizerBase

from kvfusion_rag import Document
from kvfusion_rag.prompts import PromptEncoder
from kvfusion_rag.training.examples import UNANSWERABLE
from kvfusion_rag.training.formats import Example

LONGEST_QUESTION = 32  # tokens, marks included; longer ones are cut here (in training alone)
LONGEST_ANSWER = 13  # tokens
TITLE_SHARE = 0.6  # of the documents that have a title; users' documents often have none
BARE_SHARE = 0.5  # of questions lose their question mark: search queries have none, and a model must not miss it
MISSING_WORDS = 0.1  # of a question are left out, so that no question is learned by heart
# Names of several words and numbers, not at the start of a sentence, where a capital says nothing.
_CLOZE_ANSWER = re.compile(
    r"(?<=[a-z,;\)] )(?:[A-Z][\w'\-\.]*\w(?: (?:of |the |de |and )?[A-Z][\w'\-\.]*\w)*|\d[\d,\.]*\d|\d+)"
)
_CLOZE_REACH = 90  # characters on either side
_YEAR, _NUMBER = re.compile(r"1\d{3}|20\d\d"), re.compile(r"\d[\d,.]*")
_NAME = re.compile(r"[A-Z][\w'\-]+(?: [A-Z][\w'\-]+){0,3}")


@dataclass(slots=True)
class Text:
    """A document to train on: its text, its questions as (question, answer, where the answer starts)."""

    text: str
    title: str | None = None
    questions: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        documents, groups, tokens: G groups of D documents of at most T tokens make one step.
        steps: how many steps the stage has.
    """

    documents: int
    groups: int
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """What groups are made of, as shares.

    Attributes:
        related: groups whose documents are neighbours of one another.
        cloze: cloze questions beside each document's real ones, at the start; it halves towards the end.
        plain: documents without real questions among the unrelated ones.
        swapped: documents in which an answer is replaced by another of its kind, so that it has to be read and not
            remembered (the idea of NQ-swap).
        unanswerable: questions on a document that is not in the group, from ``large`` documents on.
        joined_every: one step in so many reads its documents as one joined prompt, of at most ``joined_documents`` and
            ``joined_tokens``.
    """

    related: float = 0.75
    cloze: float = 0.5
    plain: float = 0.2
    swapped: float = 0.25
    unanswerable: float = 0.04
    large: int = 8
    joined_every: int = 8
    joined_documents: int = 3
    joined_tokens: int = 448
    questions_a_document: int = 4


Pair = tuple[list[int], list[int]]  # ids of a question, and of its answer with the end token
Asked = tuple[Pair, int]  # and the number of the document that answers, -1 for none


class GroupSampler:
    """Batches of groups by step.

    Args:
        texts: documents with questions; ``neighbours[i]`` are indices of those most like the i-th, nearest first.
        plain: documents for cloze questions alone.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        plain: Sequence[Text],
        neighbours: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        *,
        end_id: int,
        question_position: int,
        mixture: Mixture,
        seed: int,
    ) -> None:
        self._texts, self._plain, self._neighbours = texts, plain, neighbours
        self._tokenizer, self._encoder = tokenizer, encoder
        self._end, self._position, self._mixture, self._seed = end_id, question_position, mixture, seed
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)
        self._answers: dict[str, list[str]] = {}
        for _, answer, _ in itertools.chain.from_iterable(text.questions for text in texts):
            if kind := _kind(answer):
                self._answers.setdefault(kind, []).append(answer)

    def batch(self, stage: Stage, step: int, first_document: int, progress: float) -> GroupBatch:
        """The batch of one step.

        Args:
            first_document: how many documents the steps before have taken, so that each comes once an epoch.
            progress: share of the run that is done.
        """
        rng = random.Random(f"{self._seed}/{step}")
        mixture = self._mixture
        joined = step % mixture.joined_every == 0
        count = min(stage.documents, mixture.joined_documents) if joined else stage.documents
        room = min(stage.tokens, mixture.joined_tokens // count) if joined else stage.tokens
        groups = stage.groups * stage.documents // count
        cloze = mixture.cloze * (1 - progress / 2)
        builder = _BatchBuilder(groups, count, room, joined=joined, position=self._position)
        for number in range(groups):
            anchor = first_document + number * count
            builder.add(number, *self._group(rng, anchor, count, room, cloze))
        return builder.build()

    def _group(
        self, rng: random.Random, anchor: int, count: int, room: int, cloze: float
    ) -> tuple[list[list[int]], list[Asked]]:
        chosen = self._choose(rng, anchor, count)
        order = rng.sample(range(count), count)
        documents: list[list[int]] = [[]] * count
        asked: list[Asked] = []
        for place, text in zip(order, chosen, strict=True):
            if rng.random() < self._mixture.swapped:
                text = self._swap_answer(rng, text)
            documents[place], window = self._window(rng, text, room)
            asked += [(pair, place) for pair in self._pairs(rng, text, window, cloze)]
        if count >= self._mixture.large:
            asked += [(pair, -1) for pair in self._unanswerable(rng, chosen, anchor)]
        rng.shuffle(asked)
        return documents, asked

    def _choose(self, rng: random.Random, anchor: int, count: int) -> list[Text]:
        """The anchor's document with neighbours, or with others that this epoch has not had yet."""
        first = self._at(anchor)
        chosen = [self._texts[first]]
        if count > 1 and rng.random() < self._mixture.related:
            wanted = rng.randint(count // 2, count - 1)
            near = [i for i in self._neighbours[first] if i != first][: max(2 * wanted, 8)]
            chosen += [self._texts[i] for i in rng.sample(near, min(wanted, len(near)))]
        for offset in range(len(chosen), count):
            is_plain = bool(self._plain) and rng.random() < self._mixture.plain
            chosen.append(rng.choice(self._plain) if is_plain else self._texts[self._at(anchor + offset)])
        return chosen

    def _at(self, number: int) -> int:
        epoch, place = divmod(number, len(self._texts))
        return self._epoch_order(epoch)[place]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._texts)))
        random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order

    def _swap_answer(self, rng: random.Random, text: Text) -> Text:
        """The document with one of its answers replaced wherever it stands, and the questions that still hold."""
        known = [answer for _, answer, _ in text.questions if _kind(answer) and answer not in (text.title or "")]
        if not known:
            return text
        old = rng.choice(known)
        new = rng.choice(self._answers[_kind(old)])
        pattern = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
        places = [match.start() for match in pattern.finditer(text.text)]
        questions = []
        for question, answer, start in text.questions:
            moved = start + (len(new) - len(old)) * sum(place < start for place in places)
            if old in question:
                continue
            if answer == old and start in places:
                questions.append((question, new, moved))
            elif all(place + len(old) <= start or start + len(answer) <= place for place in places):
                questions.append((question, answer, moved))
        return Text(pattern.sub(lambda _: new, text.text), text.title, questions)

    def _window(self, rng: random.Random, text: Text, room: int) -> tuple[list[int], tuple[int, int]]:
        """Ids of a document, cut to ``room`` tokens, and the characters of the text that they cover."""
        title = text.title if text.title and rng.random() < TITLE_SHARE else None
        frame = len(self._encoder.encode_document(Document("x", title=title))) - 1
        offsets = self._tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = max(room - frame, 1)
        spare = max(len(offsets) - keep, 0)
        start = rng.choice([0, spare, rng.randint(0, spare)])
        first, last = offsets[start][0], offsets[min(start + keep, len(offsets)) - 1][1]
        ids = self._encoder.encode_document(Document(text.text[first:last], title=title))
        return list(ids[:room]), (first, last)

    def _pairs(self, rng: random.Random, text: Text, window: tuple[int, int], cloze: float) -> list[Pair]:
        """Real questions whose answer stands in the window, and cloze questions."""
        first, last = window
        inside = [(q, a) for q, a, start in text.questions if first <= start and start + len(a) <= last]
        most = self._mixture.questions_a_document
        real = [pair for pair in rng.sample(inside, min(most, len(inside))) if rng.random() >= cloze / 2]
        made = [_cloze(rng, text.text, window) for _ in range(most) if rng.random() < cloze]
        encoded = [self._encode(_as_typed(rng, q), a) for q, a in (*real, *filter(None, made))]
        return [pair for pair in encoded if pair is not None]

    def _unanswerable(self, rng: random.Random, chosen: Sequence[Text], anchor: int) -> list[Pair]:
        near = self._neighbours[self._at(anchor)][:20]
        text = "\n".join(f"{one.title} {one.text}" for one in chosen)
        pairs = []
        for _ in range(len(chosen) * self._mixture.questions_a_document):
            if rng.random() < self._mixture.unanswerable:
                other = self._texts[rng.choice(near) if rng.random() < 0.5 else rng.randrange(len(self._texts))]
                question, answer, _ = rng.choice(other.questions)
                if answer not in text and (pair := self._encode(_as_typed(rng, question), UNANSWERABLE)):
                    pairs.append(pair)
        return pairs

    def _encode(self, question: str, answer: str) -> Pair | None:
        asked, target = self._encoder.encode_question(question), self._encoder.encode_answer(answer)
        if not target or len(target) > LONGEST_ANSWER:
            return None
        if len(asked) > LONGEST_QUESTION:
            asked = (*asked[: LONGEST_QUESTION - 1], asked[-1])
        return list(asked), [*target, self._end]


class _BatchBuilder:
    """Fills the tensors of a batch; their sizes depend on the stage alone, so that few shapes are compiled."""

    def __init__(self, groups: int, documents: int, tokens: int, *, joined: bool, position: int) -> None:
        self._joined, self._position = joined, position
        self._length = (72 if documents <= 8 else 60) * documents  # of packed questions
        self._most = 16 * documents * groups  # trained tokens
        shape = (groups, documents * tokens) if joined else (groups * documents, tokens)
        self._documents = torch.zeros(shape, dtype=torch.long)
        self._ids, self._positions = (torch.zeros(groups, self._length, dtype=torch.long) for _ in range(2))
        self._owner = torch.full((groups, self._length), -1)
        self._targets: list[int] = []
        self._labels: list[int] = []
        self._golds: list[int] = []
        self._sources = torch.arange(documents).repeat_interleave(tokens).repeat(groups, 1)
        self._questions = 0

    def add(self, group: int, documents: Sequence[Sequence[int]], asked: Iterable[Asked]) -> None:
        """Put a group in its place, with as many of its questions as fit."""
        position = self._position
        if self._joined:
            lengths = torch.tensor([len(document) for document in documents])
            self._sources[group, : lengths.sum()] = torch.arange(len(documents)).repeat_interleave(lengths)
            documents = [[i for document in documents for i in document]]
            position = len(documents[0])
        for row, ids in enumerate(documents, start=group * len(documents)):
            self._documents[row, : len(ids)] = torch.tensor(ids)
        used = 0
        for number, ((question, answer), gold) in enumerate(asked):
            read = question + answer[:-1]
            if used + len(read) > self._length or len(self._labels) + len(answer) > self._most:
                continue
            place = slice(used, used + len(read))
            self._ids[group, place] = torch.tensor(read)
            self._positions[group, place] = position + torch.arange(len(read))
            self._owner[group, place] = number
            first = group * self._length + used + len(question) - 1
            self._targets += range(first, first + len(answer))
            self._labels += answer
            self._golds += [gold] + [-1] * (len(answer) - 1)
            self._questions += 1
            used += len(read)

    def build(self) -> GroupBatch:
        padding = self._most - len(self._labels)
        return GroupBatch(
            self._documents,
            self._ids,
            self._positions,
            self._owner,
            torch.tensor(self._targets + [0] * padding),
            torch.tensor(self._labels + [-100] * padding),
            self._sources,
            torch.tensor(self._golds + [-1] * padding),
            self._questions,
        )


def texts_of(examples: Iterable[Example]) -> list[Text]:
    """Distinct contexts with their questions, in the order of the file; titles without underscores."""
    found: dict[str, Text] = {}
    for example in examples:
        for gold in example.golds:
            title = gold.title.replace("_", " ") if gold.title else None
            text = found.setdefault(gold.text, Text(gold.text, title))
            if example.answers:
                answer = example.answers[0]
                start = gold.text.find(answer) if example.answer_start is None else example.answer_start
                if start >= 0:
                    text.questions.append((example.question, answer, start))
    return [text for text in found.values() if text.questions]


def _kind(answer: str) -> str:
    """What an answer can be replaced by: a year, a number or a name of as many words; empty for anything else."""
    if _YEAR.fullmatch(answer):
        return "year"
    if _NUMBER.fullmatch(answer):
        return "number"
    return f"name of {len(answer.split())}" if _NAME.fullmatch(answer) else ""


def _as_typed(rng: random.Random, question: str) -> str:
    question = question.rstrip("? ") if rng.random() < BARE_SHARE else question
    words = question.split()
    return " ".join([word for word in words if rng.random() >= MISSING_WORDS] or words)


def _cloze(rng: random.Random, text: str, window: tuple[int, int]) -> tuple[str, str] | None:
    """A question made of the words around a name or number of the text, each left out at random, and its answer."""
    found = list(_CLOZE_ANSWER.finditer(text, *window))
    if not found:
        return None
    match = rng.choice(found)
    answer = match.group().rstrip(".,")
    before = text[max(window[0], match.start() - _CLOZE_REACH) : match.start()].split()[-rng.randint(3, 10) :]
    after = text[match.end() : min(window[1], match.end() + _CLOZE_REACH)].split()[: rng.randint(3, 10)]
    missing = rng.random() / 2
    before, after = ([word for word in words if rng.random() > missing] for words in (before, after))
    asked = ("how many", "when", "what year", "what") if answer[0].isdigit() else ("who", "what", "which", "where")
    word = rng.choice(asked)
    words = [word, *before, *after] if rng.random() < 0.3 else [*before, word, *after]
    return " ".join(words).replace(".", " "), answer
