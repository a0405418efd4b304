"""The model asks about passages and answers: questions by examples in plain text, answers from the passage only.

Questions need no chat template, so base models write them as well as instruction models. The answer comes in the
layout in which the model will be used, since that is what the adapter learns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.rows import Passage, open_text
from ..errors import InvalidInputError
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
OPENINGS = ("", " When", " Who", " Where", " How", " In which", " What")  # "" leaves the first word to the model
LONGEST_QUESTION = 40  # tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the number of the passage that it is about."""

    question: str
    passage: int
    held_out: bool = False


def question_writer(generator: KVFusionGenerator, start: str = "") -> KVFusionGenerator:
    """A generator over the same weights that continues the examples with a question about its one document.

    Args:
        start: token that the tokenizer puts in front of a text.
    """
    shown = "".join(f"Text: {t}. {text}\nQuestion: {q}\nAnswer: {a}\n\n" for t, text, q, a in EXAMPLES)
    return generator.with_settings(
        layout="fixed",
        prefix=f"{start}Each question asks for one fact of the text above it and names what it is about.\n\n{shown}",
        document_template="Text: {text}\n",
        titled_document_template="Text: {title}. {text}\n",
        question_template="{question}",
        prompt_template=None,
        tuned=True,  # one fused document is an ordinary prompt, which every model reads
    )


def openings_of(number: int, count: int, seed: int) -> tuple[str, ...]:
    """The first words of the ``count`` questions about passage ``number``; the first one is the model's choice."""
    others = random.Random(f"{seed} {number}").sample(OPENINGS[1:], count - 1)
    return OPENINGS[0], *others


def write_questions(writer: KVFusionGenerator, passages: Sequence[tuple[Passage, str]]) -> list[str]:
    """One greedy question about each passage, which goes on from its opening."""
    answers = writer.answer_batch(
        [f"Question:{opening}" for _, opening in passages],
        [[passage.document("1")] for passage, _ in passages],
        mode="fusion",
        max_new_tokens=LONGEST_QUESTION,
        stop=["\n"],
    )
    return [f"{opening} {answer.text}".strip() for (_, opening), answer in zip(passages, answers, strict=True)]


def answer_alone(
    generator: KVFusionGenerator, asked: Sequence[tuple[str, Passage]], answer_tokens: int
) -> list[Answer]:
    """Greedy answers, each from its own passage only."""
    return generator.answer_batch(
        [question for question, _ in asked],
        [[passage.document("1")] for _, passage in asked],
        mode="concat",
        max_new_tokens=answer_tokens,
    )


def read_questions(path: str | Path) -> Iterator[tuple[str, Passage | None]]:
    """The user's own questions: JSON lines {question, passage?, title?}, or a text with one a line.

    Raises:
        InvalidInputError: the file cannot be read, or a line holds no question; names file and line.
    """
    path = Path(path)
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    yield _from_json(line, where) if is_json else (line.strip(), None)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path.name} cannot be read: {error}.") from error


def _from_json(line: str, where: str) -> tuple[str, Passage | None]:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"{where} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise InvalidInputError(f"{where} holds a {type(data).__name__}, but it must be an object with a question.")
    question, passage, title = data.get("question"), data.get("passage"), data.get("title")
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"{where}: question is {question!r:.100}, but it must be a text that is not blank.")
    for name, value in (("passage", passage), ("title", title)):
        if not isinstance(value, str | None):
            raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but it must be a text or absent.")
    return question.strip(), Passage(passage.strip(), title) if passage and passage.strip() else None
