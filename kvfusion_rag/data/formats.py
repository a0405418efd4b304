"""Reads questions and passages from common file formats into one kind of object.

The formats are this project's rows, one-question-one-context JSON lines, SQuAD 1.1 and 2.0, Natural-Questions-open,
TriviaQA, PopQA, lost-in-the-middle and, through the optional library, Hugging Face ``datasets``. A malformed file
raises one error that names file, place and field. Whether a row is useful is decided elsewhere.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError
from ..retrieval.loaders import UnreadableFileError, find_files, read_document
from ..text.json_text import parse_json
from .rows import (
    Passage,
    QARow,
    checked,
    json_lines,
    open_text,
    reading_errors,
    require_answers,
    require_object,
    required_text,
    row_from,
)
from .tables import read_table

logger = logging.getLogger(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ID_FIELDS = ("id", "question_id", "QuestionId")
_CONTEXT_FIELDS = ("context", "ctxs", "passages")
_ANSWER_FIELDS = ("answers", "answer", "Answer", "possible_answers")


@dataclass(frozen=True, slots=True)
class Example:
    """A question as its file contains it.

    Attributes: where: file and place, for messages. answers: accepted answers; empty if the question cannot be
        answered from its context. passages: all passages that came with the question, in the file's order; those that
        contain the answer are gold. answer_start: offset of ``answers[0]`` in the gold passage, as the file gives it.
    """

    where: str
    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    answer_start: int | None = None

    @property
    def golds(self) -> tuple[Passage, ...]:
        return tuple(passage for passage in self.passages if passage.gold)

    @property
    def others(self) -> tuple[Passage, ...]:
        return tuple(passage for passage in self.passages if not passage.gold)


Record = tuple[Any, str, int]  # an object of a file, its place, and its line or number


def read_examples(path: str | Path) -> Iterator[Example]:
    """Read questions from a file (``.jsonl``, ``.json`` or ``.tsv``, also ``.gz``) whose fields decide its format.

    Raises:
        InvalidInputError: the file cannot be read, or a row is malformed. Names file, place and field.
    """
    for data, where, number in _read_records(Path(path)):
        yield parse_example(data, where, number)


def read_ready_rows(path: str | Path) -> Iterator[QARow]:
    """Read questions that come with their passages, unchanged and in the file's order.

    This project's rows and lost-in-the-middle's have passages. Nothing is checked for answers, dropped or mined.

    Raises:
        InvalidInputError: as :func:`read_examples`, or the format has at most one context per question.
    """
    path = Path(path)
    for data, where, number in _read_records(path):
        foreign = isinstance(data, Mapping) and not {"ctxs", "context", *_ANSWER_FIELDS}.isdisjoint(data)
        if not foreign or "passages" in data:
            yield row_from(data, where, number)
            continue
        example = parse_example(data, where, number)
        if "ctxs" not in data:
            raise InvalidInputError(
                f"{where} comes with {'one context' if example.passages else 'no passages'}, but it needs several, "
                f"with the gold one marked; kvfusion build-data makes such rows from {path.name}."
            )
        yield QARow(example.id, example.question, example.answers, example.passages)


def read_dataset(name: str, config: str | None = None, split: str = "train") -> Iterator[Example]:
    """Read questions from a Hugging Face dataset whose rows have the fields of one of the known formats.

    Raises:
        MissingDependencyError: the library ``datasets`` is not installed.
        InvalidInputError: the dataset cannot be loaded, or a row is malformed.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"the dataset {name!r} needs the library datasets: pip install datasets."
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise InvalidInputError(f"the dataset {name!r} ({config=}, {split=}) cannot be loaded: {cause}") from error
    for number, row in enumerate(rows):
        yield parse_example(row, f"{name}, row {number}", number)


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Read passages from a file, or from a folder with one document per file.

    A file contains rows {text, title}, as JSON lines, a JSON list or tab-separated, or questions in one of the known
    formats, whose contexts are used. Unreadable files of a folder are skipped with a warning.

    Raises:
        InvalidInputError: the path cannot be read, or a row is malformed. Names file, place and field.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path)
        return
    for data, where, number in _read_records(path):
        if isinstance(data, Mapping) and "text" in data:
            yield _passage(data, where, gold=False)
            continue
        if isinstance(data, Mapping) and all(data.get(name) is None for name in _CONTEXT_FIELDS):
            raise InvalidInputError(f"{where} of the corpus has neither text nor a context.")
        yield from (replace(passage, gold=False) for passage in parse_example(data, where, number).passages)


def parse_example(data: object, where: str, number: int) -> Example:
    """Return the question in one object of any known format.

    Raises:
        InvalidInputError: a field is missing or wrong. Names ``where`` and the field.
    """
    row = require_object(data, where, "a row must be an object")
    if "passages" in row:
        return _own_row(row, where, number)
    question = _text(row, "Question" if "Question" in row and "question" not in row else "question", where)
    identity = next((str(row[name]) for name in _ID_FIELDS if row.get(name) is not None), str(number))
    answers, start = _answers(row, where)
    example = Example(where, identity, question, answers, answer_start=start)
    if "ctxs" in row:
        return _with_contexts(example, row["ctxs"])
    if row.get("context") is None:
        if not answers:
            raise InvalidInputError(f"{where}: answers is empty, but a question without a context needs one.")
        return example
    context = Passage(_text(row, "context", where), _title(row, where), gold=bool(answers))
    return replace(example, passages=(context,))


# Files


def _read_records(path: Path) -> Iterator[Record]:
    """Read every object of a file with its place. SQuAD and TriviaQA files are unpacked."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    readers = {".tsv": _read_table, ".jsonl": json_lines, ".json": _read_json}
    if suffix not in readers:
        raise InvalidInputError(
            f"{str(path)!r} ends in {suffix!r}, but questions and passages are read from {', '.join(readers)} "
            "(and .gz of them)."
        )
    with reading_errors(path):
        yield from readers[suffix](path)


def _read_table(path: Path) -> Iterator[Record]:
    with open_text(path) as lines:
        for row, number in read_table(lines, path.name):
            answers = {name: _listed(row[name]) for name in _ANSWER_FIELDS if name in row}
            yield row | answers, f"{path.name}, line {number}", number


def _listed(cell: str) -> str | list[str]:
    """Return the list in a table's cell if it is a JSON list of texts, else the cell unchanged."""
    try:
        value = parse_json(cell) if cell.startswith("[") else None
    except ValueError:
        return cell
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else cell


def _read_json(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        text = file.read()
    try:
        whole = parse_json(text)
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines in a file named .json
            yield from json_lines(path)
            return
        raise InvalidInputError(f"{path.name} is not JSON: {error}.") from error
    if isinstance(whole, dict) and "data" in whole:
        yield from _squad_records(_list(whole, "data", path.name), path.name)
        return
    if isinstance(whole, dict) and "Data" in whole:
        whole, place = _list(whole, "Data", path.name), f"{path.name}: Data"
    else:
        place = f"{path.name}: row"
    if not isinstance(whole, list):
        raise InvalidInputError(
            f"{path.name} contains a {type(whole).__name__}, but it must be a list of rows, or have SQuAD's data or "
            "TriviaQA's Data."
        )
    for number, data in enumerate(whole):
        yield data, f"{place} [{number}]", number


def _squad_records(articles: list[Any], name: str) -> Iterator[Record]:
    number = 0
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{name}: data[{a}]")):
            place = f"{name}: data[{a}].paragraphs[{p}]"
            for q, question in enumerate(_list(paragraph, "qas", place)):
                where = f"{place}.qas[{q}]"
                number += 1
                around = {"context": _text(paragraph, "context", place), "title": article.get("title")}
                yield {**require_object(question, where, "it must be an object"), **around}, where, number


def _read_folder(folder: Path) -> Iterator[Passage]:
    files, skipped = find_files([folder])
    if skipped:
        logger.warning("%d files of %s are not in the corpus; the first is %s.", len(skipped), folder, skipped[0].path)
    for file in files:
        try:
            document = read_document(file)
        except UnreadableFileError as error:
            logger.warning("%s is not in the corpus: %s.", file, error)
        else:
            yield Passage(document.text, document.title)


# Fields


def _own_row(data: Mapping[str, Any], where: str, number: int) -> Example:
    row = row_from(data, where, number)
    passages = tuple(Passage(_clean(p.text), p.title and _clean(p.title), p.gold) for p in row.passages)
    return Example(where, row.id, _clean(row.question), _distinct(list(row.answers), "answers", where), passages)


def _with_contexts(example: Example, contexts: object) -> Example:
    if not isinstance(contexts, list) or not contexts:
        raise InvalidInputError(f"{example.where}: ctxs is {contexts!r:.100}, but it must be a list of passages.")
    passages: list[Passage] = []
    for n, context in enumerate(contexts, start=1):
        where = f"{example.where}: ctxs {n}"
        data = require_object(context, where, "it must be an object with a text")
        gold = checked({"isgold": False, **data}, "isgold", (bool,), "true or false", where)
        passages.append(_passage(data, where, gold=gold))
    return replace(example, passages=tuple(passages))


def _answers(data: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int | None]:
    """Return all accepted answers in the file's order, and the start of the first one if the file gives it."""
    if data.get("is_impossible") is True:
        return (), None
    name = next((n for n in _ANSWER_FIELDS if data.get(n) is not None), None)
    if name is None:
        raise InvalidInputError(f"{where}: answers is missing (it may also be named answer or possible_answers).")
    value, start = data[name], data.get("answer_start")
    if name == "possible_answers" and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise InvalidInputError(
                f"{where}: possible_answers is {value!r:.100}, but it must be a JSON list."
            ) from error
    if isinstance(value, Mapping):
        value, start = _answer_object(value, where, name)
    elif isinstance(value, str):
        value = [value]
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        start = value[0].get("answer_start")
        value = [one.get("text") for one in value]
    if not isinstance(start, int | None):
        raise InvalidInputError(f"{where}: answer_start is {start!r:.100}, but it must be a whole number.")
    return _distinct(value, name, where), start


def _answer_object(value: Mapping[str, Any], where: str, name: str) -> tuple[Any, Any]:
    """Return answers and start from SQuAD's columns {text, answer_start} or TriviaQA's {value, aliases}, in either
    spelling.
    """
    if "text" in value:
        starts = value.get("answer_start") or [None]
        return value["text"], starts[0] if isinstance(starts, list) else starts
    for main, aliases in (("value", "aliases"), ("Value", "Aliases")):
        if main in value:
            others = checked({aliases: None, **value}, aliases, (list, NoneType), "a list of texts", where)
            return [value[main], *(others or [])], None
    raise InvalidInputError(f"{where}: {name} is an object without text or value.")


def _distinct(value: object, name: str, where: str) -> tuple[str, ...]:
    """Return each answer of a list once, in order."""
    require_answers(value, name, where)
    assert isinstance(value, list)
    return tuple(dict.fromkeys(_clean(answer).strip() for answer in value))


def _passage(data: Mapping[str, Any], where: str, *, gold: bool) -> Passage:
    return Passage(_text(data, "text", where), _title(data, where), gold)


def _title(data: Mapping[str, Any], where: str) -> str | None:
    title = checked(data, "title", (str, NoneType), "a text or missing", where)
    return _clean(title) if title else None


def _text(data: object, name: str, where: str) -> str:
    return _clean(required_text(require_object(data, where, "it must be an object"), name, where))


def _list(data: object, name: str, where: str) -> list[Any]:
    return checked(require_object(data, where, "it must be an object"), name, (list,), "a list", where)


def _clean(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but a UTF-8 file cannot contain."""
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
