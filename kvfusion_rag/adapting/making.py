"""Builds rows from passages: questions are written, answered, filtered and given negatives, in resumable stages."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.answer_match import normalize_answer
from ..data.mining import text_key
from ..data.rows import Passage, QARow
from ..errors import InvalidInputError
from ..generator import KVFusionGenerator
from .filtering import answer_fault, question_fault, repeats, whole_sentences
from .judging import answer_rows
from .options import AdaptOptions
from .passages import PassagePool
from .questions import PassageQuestion, answer_from_passage, openings_of, question_writer, write_questions
from .rows import NegativeMiner, make_row, number_of_documents
from .stages import Stages

LEAST_TRAINED, LEAST_JUDGED = 8, 4  # minimum rows
QUESTIONS_AT_ONCE, ROWS_AT_ONCE = 32, 16
REPEAT_NEGATIVES = 2


@dataclass(frozen=True, slots=True)
class AdaptRows:
    """Rows for training and for judging.

    Attributes:
        asked: number of questions before any was dropped.
        dropped: number of dropped questions by reason.
    """

    trained: list[QARow]
    judged: list[QARow]
    asked: int
    dropped: dict[str, int]


class RowMaker:
    """Builds the rows of one run.

    Args:
        generator: generator of the untuned model.
        start: token that the model's tokenizer puts in front of a text.
        given: the user's own questions with their passages, if known; None if the model writes the questions.
    """

    def __init__(
        self,
        generator: KVFusionGenerator,
        pool: PassagePool,
        options: AdaptOptions,
        stages: Stages,
        *,
        start: str = "",
        given: Sequence[tuple[str, Passage | None]] | None = None,
    ) -> None:
        self._generator, self._options, self._stages, self._start = generator, options, stages, start
        self._pool, self._given = pool, given
        own = [passage for _, passage in given or () if passage is not None]
        by_key = {text_key(passage.text): passage for passage in [*pool.passages, *own]}
        self._passages = list(by_key.values())  # the pool's passages are first and keep their numbers
        self._numbers = {key: number for number, key in enumerate(by_key)}
        self._miner = NegativeMiner(self._passages, options.seed)
        self._dropped: Counter[str] = Counter()

    def make(self) -> AdaptRows:
        """Return all rows.

        Raises:
            InvalidInputError: too few questions are left.
        """
        asked, total = self._ask() if self._given is None else self._place_given(self._given)
        pairs = self._answer(asked)
        judged = [self._row(n, *pair) for n, pair in enumerate(pairs) if pair[0].held_out][: self._options.judged]
        trained = self._repeated([(n, *pair) for n, pair in enumerate(pairs) if not pair[0].held_out])
        for rows, least, use in ((trained, LEAST_TRAINED, "training"), (judged, LEAST_JUDGED, "judging")):
            if len(rows) < least:
                reasons = ", ".join(f"{count} {reason}" for reason, count in self._dropped.most_common())
                raise InvalidInputError(
                    f"{len(rows)} of {total} questions are left for {use}, but at least {least} are needed; increase "
                    f"--passages, name more documents, or give your own --questions (dropped: {reasons or 'none'})."
                )
        return AdaptRows(trained, judged, total, dict(self._dropped.most_common()))

    def _ask(self) -> tuple[list[PassageQuestion], int]:
        """Return the model's own useful questions, and how many it wrote."""
        options = self._options
        numbers = self._pool.sample(options.passages, options.seed)
        held_out = self._held_out(numbers)
        count = options.questions_per_passage
        tasks = [(n, opening) for n in numbers for opening in openings_of(n, count, options.seed)]
        writer: KVFusionGenerator | None = None

        def write(chunk: Sequence[tuple[int, str]]) -> list[str]:
            nonlocal writer
            writer = writer or question_writer(self._generator, self._start)
            return write_questions(writer, [(self._passages[number], opening) for number, opening in chunk])

        texts = self._stages.work("questions", tasks, QUESTIONS_AT_ONCE, write)
        useful: list[PassageQuestion] = []
        seen: set[str] = set()
        for (number, _), text in zip(tasks, texts, strict=True):
            if not self._drop(question_fault(text, self._passages[number], seen)):
                seen.add(normalize_answer(text))
                useful.append(PassageQuestion(text, number, number in held_out))
        return useful, len(tasks)

    def _place_given(self, given: Sequence[tuple[str, Passage | None]]) -> tuple[list[PassageQuestion], int]:
        """Return the user's questions with their passages, and how many were given."""
        placed: dict[str, tuple[str, int]] = {}
        for question, passage in given:
            number = self._miner.best(question) if passage is None else self._numbers[text_key(passage.text)]
            if number is None:
                self._drop("no passage shares a word with the question")
            elif not self._drop("question repeated" if normalize_answer(question) in placed else None):
                placed[normalize_answer(question)] = question, number
        numbers = sorted({number for _, number in placed.values()})
        random.Random(self._options.seed).shuffle(numbers)
        held_out = self._held_out(numbers)
        questions = [PassageQuestion(question, n, n in held_out) for question, n in placed.values()]
        return questions, len(given)

    def _held_out(self, numbers: Sequence[int]) -> set[int]:
        """Return the passages whose questions are judged and not trained on."""
        return set(numbers[: max(1, round(self._options.held_out * len(numbers)))])

    def _answer(self, asked: Sequence[PassageQuestion]) -> list[tuple[PassageQuestion, str]]:
        """Return the questions with useful answers from their passages, and these answers."""

        def answer(chunk: Sequence[PassageQuestion]) -> list[str]:
            pairs = [(one.question, self._passages[one.passage]) for one in chunk]
            answers = answer_from_passage(self._generator, pairs, self._options.answer_tokens)
            return [whole_sentences(one.text) if one.finish_reason == "length" else one.text for one in answers]

        answers = self._stages.work("answers", asked, QUESTIONS_AT_ONCE, answer)
        return [
            (one, text)
            for one, text in zip(asked, answers, strict=True)
            if not self._drop(answer_fault(text, one.question, self._passages[one.passage]))
        ]

    def _repeated(self, pairs: Sequence[tuple[int, PassageQuestion, str]]) -> list[QARow]:
        """Return rows of the questions whose answers the model repeats in a joined prompt with a few negatives."""
        small = [self._row(*pair, documents=1 + REPEAT_NEGATIVES) for pair in pairs]

        def repeat(chunk: Sequence[QARow]) -> list[str]:
            return answer_rows(self._generator, chunk, "concat", self._options.answer_tokens)

        again = self._stages.work("repeats", small, ROWS_AT_ONCE, repeat)
        rows: list[QARow] = []
        for (n, asked, answer), second in zip(pairs, again, strict=True):
            repeated = repeats(answer, second, asked.question, self._options.min_f1)
            if not self._drop(None if repeated else "answer not repeated among negatives"):
                documents = number_of_documents(asked.question, self._options.documents, self._options.seed)
                rows.append(self._row(n, asked, answer, documents=documents))
        return rows

    def _row(self, number: int, asked: PassageQuestion, answer: str, *, documents: int | None = None) -> QARow:
        count = (documents or self._options.documents) - 1
        negatives = self._miner.negatives(asked.question, answer, asked.passage, count)
        gold = self._passages[asked.passage]
        return make_row(number, asked.question, answer, gold, negatives, self._options.seed)

    def _drop(self, reason: str | None) -> bool:
        """Return whether there is a ``reason`` to drop a question, and count it if so."""
        if reason is not None:
            self._dropped[reason] += 1
        return reason is not None
