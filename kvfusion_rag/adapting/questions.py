"""Lets the model write questions about passages, and answer them from their passage only.

Questions continue examples in plain text, so that base models without a chat template can write them too. Answers use
the layout in which the model will be used, since that is what the adapter learns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from ..data.rows import Passage, checked, json_lines, open_text, reading_errors, require_object, required_text
from ..generator import KVFusionGenerator
from ..schema import Answer

EXAMPLES = (
    ("Harrow Point Lighthouse", "The lighthouse stands at the mouth of the river Ash. It was built in 1874 by the "
     "engineer Amara Osei, and its tower is 31 metres high. The lamp burned oil until 1926.",
     "Who built the Harrow Point Lighthouse?", "Amara Osei"),
    ("Stomata", "Plants take in carbon dioxide through small openings in their leaves, called stomata. At night the "
     "stomata of most plants close, so that little water is lost.",
     "What do plants take in through their stomata?", "carbon dioxide"),
    ("Returns", "Goods can be returned within 30 days of delivery. The buyer pays for the transport, unless the goods "
     "were damaged when they arrived. Refunds are paid to the card that was used for the order.",
     "Within how many days of delivery can goods be returned?", "30 days"),
    ("Battle of Tarn Hill", "The armies met on Tarn Hill on 3 May 1412. The northern army lost because its horsemen "
     "sank into the wet ground, and King Osric fled to the coast with a few hundred men.",
     "Why did the northern army lose the Battle of Tarn Hill?", "its horsemen sank into the wet ground"),
)  # fmt: skip
OPENINGS = ("", " When", " Who", " Where", " How", " In which", " What")  # with "" the model chooses the first word
MAX_QUESTION_TOKENS = 40


@dataclass(frozen=True, slots=True)
class PassageQuestion:
    """A question, the number of its passage, and whether it is judged and not trained on."""

    question: str
    passage: int
    held_out: bool = False


def question_writer(generator: KVFusionGenerator, start: str = "") -> KVFusionGenerator:
    """Return a generator over the same weights that continues the examples with a question about one document.

    Args:
        start: token that the tokenizer puts in front of a text.
    """
    shots = "".join(f"Text: {t}. {text}\nQuestion: {q}\nAnswer: {a}\n\n" for t, text, q, a in EXAMPLES)
    return generator.with_settings(
        layout="fixed",
        prefix=f"{start}Each question asks for one fact of the text above it and names what it is about.\n\n{shots}",
        document_template="Text: {text}\n",
        titled_document_template="Text: {title}. {text}\n",
        question_template="{question}",
        prompt_template=None,
        tuned=True,  # one fused document is an ordinary prompt, which every model can read
    )


def openings_of(number: int, count: int, seed: int) -> tuple[str, ...]:
    """Return the first words of the ``count`` questions about passage ``number``. The model chooses the first one."""
    others = random.Random(f"{seed} {number}").sample(OPENINGS[1:], count - 1)
    return OPENINGS[0], *others


def write_questions(writer: KVFusionGenerator, passages: Sequence[tuple[Passage, str]]) -> list[str]:
    """Return one greedy question about each passage, which begins with its opening."""
    answers = writer.answer_batch(
        [f"Question:{opening}" for _, opening in passages],
        [[passage.document("1")] for passage, _ in passages],
        mode="fusion",
        max_new_tokens=MAX_QUESTION_TOKENS,
        stop=["\n"],
    )
    return [f"{opening} {answer.text}".strip() for (_, opening), answer in zip(passages, answers, strict=True)]


def answer_from_passage(
    generator: KVFusionGenerator, asked: Sequence[tuple[str, Passage]], answer_tokens: int
) -> list[Answer]:
    """Return greedy answers, each from its own passage only."""
    return generator.answer_batch(
        [question for question, _ in asked],
        [[passage.document("1")] for _, passage in asked],
        mode="concat",
        max_new_tokens=answer_tokens,
        max_reasoning_tokens=0,  # the adapter learns answers without reasoning
    )


def read_questions(path: str | Path) -> Iterator[tuple[str, Passage | None]]:
    """Read the user's own questions: JSON lines {question, passage?, title?}, or a text with one question per line.

    Raises:
        InvalidInputError: the file cannot be read, or a line is not a question. Names file and line.
    """
    path = Path(path)
    with reading_errors(path):
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            for data, where, _ in json_lines(path):
                yield _question_from(data, where)
        else:
            with open_text(path) as lines:
                yield from ((line.strip(), None) for line in lines if line.strip())


def _question_from(data: object, where: str) -> tuple[str, Passage | None]:
    row = require_object(data, where, "it must be an object with a question")
    question = required_text(row, "question", where).strip()
    passage, title = (checked(row, name, (str, NoneType), "a text or missing", where) for name in ("passage", "title"))
    return question, Passage(passage.strip(), title) if passage and passage.strip() else None
