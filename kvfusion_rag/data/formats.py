"""Reads questions and passages out of the file formats that are in use: what a file says, as one kind of object.

Known are this project's rows, one-question-one-context JSON lines, SQuAD 1.1 and 2.0, Natural-Questions-open,
TriviaQA, PopQA, lost-in-the-middle and, through the optional library, Hugging Face ``datasets``. A file that is not
what it should be ends in one error that names file, place and field; whether a row is of use is judged elsewhere.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError
from ..retrieval.loaders import UnreadableFileError, find_files, read_document
from .rows import Passage, QARow, open_text, row_from

logger = logging.getLogger(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SUFFIXES = (".jsonl", ".json", ".tsv")
_ID_FIELDS = ("id", "question_id", "QuestionId")
_CONTEXT_FIELDS = ("context", "ctxs", "passages")
_ANSWER_FIELDS = ("answers", "answer", "Answer", "possible_answers")


@dataclass(frozen=True, slots=True)
class Example:
    """A question as a file holds it, before anything is judged or mined.

    Attributes:
        where: file and place, for messages.
        answers: empty where the question is known to have no answer in its context.
        passages: all that came with the question, in the file's order; those said to hold the answer are marked gold.
        answer_start: where ``answers[0]`` stands in the gold passage, as the file says.
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


@dataclass(frozen=True, slots=True)
class _Record:
    """One object of a file with its place in it."""

    data: Any
    where: str
    number: int


def read_examples(path: str | Path) -> Iterator[Example]:
    """Questions of a file (``.jsonl``, ``.json`` or ``.tsv``, also with ``.gz``), the format told by its fields.

    Raises:
        InvalidInputError: the file cannot be read, or a row is malformed; names file, place and field.
    """
    for record in _read_records(Path(path)):
        yield parse_example(record.data, record.where, record.number)


def read_ready_rows(path: str | Path) -> Iterator[QARow]:
    """Questions of a file that come with the passages to ask them over, as they are and in the file's order.

    Those are this project's rows and lost-in-the-middle's. Nothing is judged, dropped or mined.

    Raises:
        InvalidInputError: as :func:`read_examples`; or the file's format has one context a question, or none.
    """
    path = Path(path)
    for record in _read_records(path):
        data = record.data
        foreign = isinstance(data, Mapping) and not {"ctxs", "context", *_ANSWER_FIELDS}.isdisjoint(data)
        if not foreign or "passages" in data:
            yield row_from(data, record.where, record.number)
            continue
        example = parse_example(data, record.where, record.number)
        if "ctxs" not in data:
            raise InvalidInputError(
                f"{record.where} comes with {'one context' if example.passages else 'no passages'}, but a question is "
                f"asked over several, the gold one marked; kvfusion build-data makes such rows out of {path.name}."
            )
        yield QARow(example.id, example.question, example.answers, example.passages)


def read_dataset(name: str, config: str | None = None, split: str = "train") -> Iterator[Example]:
    """Questions of a Hugging Face dataset whose rows have the fields of one of the known formats.

    Raises:
        MissingDependencyError: the library ``datasets`` is not installed.
        InvalidInputError: the dataset cannot be loaded, or a row is malformed.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(f"the dataset {name!r} needs the library: pip install datasets.") from error
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise InvalidInputError(f"the dataset {name!r} ({config=}, {split=}) cannot be loaded: {cause}") from error
    for number, row in enumerate(rows):
        yield parse_example(row, f"{name}, row {number}", number)


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Passages of a file, or of a folder with one document a file (txt, md, html, pdf).

    A file holds rows {text, title}, as JSON lines, a JSON list or tab-separated, or questions in one of the known
    formats, whose contexts are taken. Files of a folder that cannot be read are left out with a warning.

    Raises:
        InvalidInputError: the path cannot be read, or a row is malformed; names file, place and field.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path)
        return
    for record in _read_records(path):
        if isinstance(record.data, Mapping) and "text" in record.data:
            yield _passage(record.data, record.where, gold=False)
            continue
        if isinstance(record.data, Mapping) and all(record.data.get(name) is None for name in _CONTEXT_FIELDS):
            raise InvalidInputError(f"{record.where} of the corpus has neither text nor a context.")
        found = parse_example(record.data, record.where, record.number).passages
        yield from (replace(passage, gold=False) for passage in found)


def parse_example(data: object, where: str, number: int) -> Example:
    """One object of any known format.

    Raises:
        InvalidInputError: a field is absent or wrong; ``where`` and the field are named.
    """
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{where} holds a {type(data).__name__}, but a row must be an object.")
    if "passages" in data:
        return _own_row(data, where, number)
    question = _required(data, ("question", "Question"), where)
    identity = next((str(data[name]) for name in _ID_FIELDS if data.get(name) is not None), str(number))
    answers, start = _answers(data, where)
    example = Example(where, identity, question, answers, answer_start=start)
    if "ctxs" in data:
        return _with_contexts(example, data["ctxs"])
    if data.get("context") is None:
        if not answers:
            raise InvalidInputError(f"{where}: answers is empty, but a question without a context needs one.")
        return example
    context = Passage(_required(data, ("context",), where), _title(data, where), gold=bool(answers))
    return replace(example, passages=(context,))


# Files


def _read_records(path: Path) -> Iterator[_Record]:
    """Every object of a file with its place; containers (SQuAD, TriviaQA) are taken apart."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _SUFFIXES:
        raise InvalidInputError(
            f"{str(path)!r} ends in {suffix!r}, but questions and passages are read from {', '.join(_SUFFIXES)} "
            "(and .gz of them)."
        )
    try:
        if suffix == ".tsv":
            yield from _read_table(path)
        elif suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield from _read_json(path)
    except OSError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{str(path)!r} is damaged or no UTF-8 text: {error}.") from error


def _read_lines(path: Path) -> Iterator[_Record]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    yield _Record(json.loads(line), where, number)
                except (ValueError, RecursionError) as error:
                    raise InvalidInputError(f"{where} is not JSON: {error}.") from error


def _read_table(path: Path) -> Iterator[_Record]:
    with open_text(path) as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        for row in rows:
            answers = {name: _listed(row[name]) for name in _ANSWER_FIELDS if name in row}
            yield _Record(row | answers, f"{path.name}, line {rows.line_num}", rows.line_num)


def _listed(cell: str | None) -> str | list[str] | None:
    """The answers of a table's cell that holds a JSON list of texts, or the cell as it stands."""
    try:
        found = json.loads(cell) if cell and cell.startswith("[") else None
    except (ValueError, RecursionError):
        return cell
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else cell


def _read_json(path: Path) -> Iterator[_Record]:
    with open_text(path) as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON lines under the name of JSON
            yield from _read_lines(path)
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
            f"{path.name} holds a {type(whole).__name__}, but it must be a list of rows, or have SQuAD's data or "
            "TriviaQA's Data."
        )
    for number, data in enumerate(whole):
        yield _Record(data, f"{place} [{number}]", number)


def _squad_records(articles: list[Any], name: str) -> Iterator[_Record]:
    number = 0
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{name}: data[{a}]")):
            place = f"{name}: data[{a}].paragraphs[{p}]"
            for q, question in enumerate(_list(paragraph, "qas", place)):
                where = f"{place}.qas[{q}]"
                if not isinstance(question, dict):
                    raise InvalidInputError(f"{where} is a {type(question).__name__}, but it must be an object.")
                number += 1
                around = {"context": _required(paragraph, ("context",), place), "title": article.get("title")}
                yield _Record(question | around, where, number)


def _read_folder(folder: Path) -> Iterator[Passage]:
    files, skipped = find_files([folder])
    if skipped:
        logger.warning("%d files of %s are left out of the corpus, %s first.", len(skipped), folder, skipped[0].path)
    for file in files:
        try:
            document = read_document(file)
        except UnreadableFileError as error:
            logger.warning("%s is left out of the corpus: %s.", file, error)
        else:
            yield Passage(document.text, document.title)


# Fields


def _own_row(data: Mapping[str, Any], where: str, number: int) -> Example:
    row = row_from(data, where, number)
    answers = _texts(list(row.answers), "answers", where)
    passages = tuple(Passage(_clean(p.text), p.title and _clean(p.title), p.gold) for p in row.passages)
    return Example(where, row.id, _clean(row.question), answers, passages)


def _with_contexts(example: Example, contexts: object) -> Example:
    if not isinstance(contexts, list) or not contexts:
        raise InvalidInputError(f"{example.where}: ctxs is {contexts!r:.100}, but it must be a list of passages.")
    passages: list[Passage] = []
    for n, context in enumerate(contexts, start=1):
        where = f"{example.where}: ctxs {n}"
        if not isinstance(context, Mapping):
            raise InvalidInputError(f"{where} is a {type(context).__name__}, but it must be an object with a text.")
        gold = context.get("isgold", False)
        if not isinstance(gold, bool):
            raise InvalidInputError(f"{where}: isgold is {gold!r:.100}, but it must be true or false.")
        passages.append(_passage(context, where, gold=gold))
    return replace(example, passages=tuple(passages))


def _answers(data: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int | None]:
    """All accepted answers in the file's order, and where the first one starts if the file says so."""
    if data.get("is_impossible") is True:
        return (), None
    name = next((n for n in _ANSWER_FIELDS if data.get(n) is not None), None)
    if name is None:
        raise InvalidInputError(f"{where}: answers is absent (it may also be named answer or possible_answers).")
    value, start = data[name], data.get("answer_start")
    if name == "possible_answers" and isinstance(value, str):
        try:
            value = json.loads(value)
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
    return _texts(value, name, where), start


def _answer_object(value: Mapping[str, Any], where: str, name: str) -> tuple[Any, Any]:
    """SQuAD's columns {text, answer_start} or TriviaQA's {value, aliases}, in either spelling."""
    if "text" in value:
        starts = value.get("answer_start") or [None]
        return value["text"], starts[0] if isinstance(starts, list) else starts
    for main, aliases in (("value", "aliases"), ("Value", "Aliases")):
        if main in value:
            return [value[main], *(value.get(aliases) or [])], None
    raise InvalidInputError(f"{where}: {name} is an object without text or value.")


def _texts(value: object, name: str, where: str) -> tuple[str, ...]:
    """Answers, each once and in order."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but it must be a list of texts.")
    texts = tuple(dict.fromkeys(_clean(one).strip() for one in value))
    if "" in texts:
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but an answer must not be blank.")
    return texts


def _passage(data: Mapping[str, Any], where: str, *, gold: bool) -> Passage:
    return Passage(_required(data, ("text",), where), _title(data, where), gold)


def _title(data: Mapping[str, Any], where: str) -> str | None:
    title = data.get("title")
    if not isinstance(title, str | None):
        raise InvalidInputError(f"{where}: title is {title!r:.100}, but it must be a text or absent.")
    return _clean(title) if title else None


def _required(data: object, names: tuple[str, ...], where: str) -> str:
    """The first field of ``names`` that is there, as a text that is not blank."""
    if not isinstance(data, Mapping):
        raise InvalidInputError(f"{where} is a {type(data).__name__}, but it must be an object.")
    value = next((data[name] for name in names if name in data), None)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{where}: {names[0]} is {value!r:.100}, but it must be a text that is not blank.")
    return _clean(value)


def _list(data: object, name: str, where: str) -> list[Any]:
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, list):
        raise InvalidInputError(f"{where}: {name} is {value!r:.100}, but it must be a list.")
    return value


def _clean(text: str) -> str:
    """Half a character, which JSON can spell, cannot be written to a file."""
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)
